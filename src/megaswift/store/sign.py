"""Ed25519 signatures of manifests: manifest.json.sig says who vouches for a directory."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError, UserError
from megaswift.store.manifest import MANIFEST

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = f"{MANIFEST}.sig"
_INSTALL = "in the checkout: pip install '.[sign]'"


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """An Ed25519 private key from a PEM file (openssl genpkey -algorithm ed25519). Raises UserError."""
    serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"the signing key cannot be read: {error}",
            where=str(path),
            fix="make one: openssl genpkey -algorithm ed25519 -out key.pem",
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UserError(
            "the signing key is not an Ed25519 key.",
            where=str(path),
            fix="make one: openssl genpkey -algorithm ed25519 -out key.pem",
        )
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """An Ed25519 public key from a PEM file. Raises UserError."""
    serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"the public key cannot be read: {error}", where=str(path), fix="openssl pkey -in key.pem -pubout -out key.pub"
        ) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UserError("the public key is not an Ed25519 key.", where=str(path))
    return key


def sign_manifest(directory: Path, key: Ed25519PrivateKey) -> None:
    """Sign the manifest of a directory."""
    data = (directory / MANIFEST).read_bytes()
    content = {"algorithm": "ed25519", "public_key": _text(_raw(key.public_key())), "signature": _text(key.sign(data))}
    (directory / SIGNATURE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_signature(directory: Path, trusted: Ed25519PublicKey | None = None) -> str | None:
    """The public key that signed a directory's manifest, as text; None where there is no signature.

    Args:
        trusted: the signature must be there and be made by this key.

    Raises DataError for a signature that does not fit.
    """
    path = directory / SIGNATURE
    if not path.exists():
        if trusted is not None:
            raise DataError("the manifest is not signed.", where=str(directory), fix="sign it when it is made: --sign KEY")
        return None
    _, ed25519 = _library()
    from cryptography.exceptions import InvalidSignature

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        public, signature = base64.b64decode(content["public_key"]), base64.b64decode(content["signature"])
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, (directory / MANIFEST).read_bytes())
    except InvalidSignature as error:
        raise DataError(
            "the signature does not fit manifest.json: one of them was changed.", where=str(path), fix="use another copy"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"the signature cannot be read: {error}", where=str(path), fix="use another copy") from error
    if trusted is not None and public != _raw(trusted):
        raise DataError(
            "the manifest is signed by another key.", where=str(path), fix="use a copy from the owner of --public_key"
        )
    return _text(public)


def _raw(key: Any) -> bytes:
    serialization, _ = _library()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UserError("signatures need the package cryptography.", where="--sign, --public_key", fix=_INSTALL) from error
    return serialization, ed25519
