"""Manifests walked and checked: a directory's files and tensors, its signature, and what it was made from, up to the base."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError, MegaswiftError
from megaswift.models import parameters_of
from megaswift.store.manifest import MANIFEST, older_links, quick_check, read_manifest, sha256_of
from megaswift.store.sign import SIGNATURE, check_signature
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.folder import check_config
from megaswift.weights.hf.read import HFCheckpoint

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_THREADS = 2
_OURS = (MANIFEST, SIGNATURE)


@dataclass(frozen=True)
class Link:
    """One directory of a chain: what was found, and what is wrong with it (empty: nothing)."""

    directory: Path
    kind: str
    note: str
    signed_by: str
    problem: str


def require_whole(directory: Path) -> None:
    """Raise DataError unless every file is byte for byte the one that was written; names the changed tensors where it can."""
    problem = quick_check(directory)
    if problem:
        raise DataError(
            f"the checkpoint is incomplete: {problem}.", where=str(directory), fix="use another checkpoint (--iteration N)"
        )
    content = read_manifest(directory)
    changed = _changed(directory, content["files"])
    if changed:
        tensors = changed_tensors(directory, content)
        named = f" Changed tensors: {', '.join(tensors[:5])}{' ...' if len(tensors) > 5 else ''}." if tensors else ""
        raise DataError(
            f"{changed[0]} is not the file that was written: its SHA-256 differs.{named}",
            where=str(directory / changed[0]),
            fix="use another copy",
        )


def _changed(directory: Path, files: dict[str, Any]) -> list[str]:
    """Names of files whose SHA-256 is not the recorded one."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: sha256_of(directory / Path(name).name), files)
        return [name for name, value in zip(files, found) if value != files[name].get("sha256")]


def changed_tensors(directory: Path, content: dict[str, Any]) -> list[str]:
    """Hugging Face names of the tensors whose SHA-256 is not the recorded one; empty where none is recorded or readable."""
    recorded = content.get("hf_tensors")
    if not isinstance(recorded, dict):
        return []
    try:
        found = _digests_of_folder(directory) if content.get("kind") == "huggingface" else _digests_of_checkpoint(directory)
    except MegaswiftError:  # too damaged to say which: the file is named anyway
        return []
    return sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))


def _digests_of_folder(directory: Path) -> dict[str, str]:
    from megaswift.weights.convert.model import digest

    source = HFCheckpoint.open(directory)
    return {name: digest(source.tensor(name)) for name in source.names}


def _digests_of_checkpoint(directory: Path) -> dict[str, str]:
    from megaswift.weights.convert.model import digest, read_hf
    from megaswift.weights.torch_dist.reader import Reader

    reader = Reader(directory)
    found: dict[str, str] = {}
    for parameter in parameters_of(load_config(directory.parent)):
        try:
            values = read_hf(reader, parameter)
        except DataError:
            values = []  # its tensors count as changed
        found.update(zip(parameter.labels, (digest(value) for value in values)))
    return found


def examine(directory: Path, deep: bool, trusted: Ed25519PublicKey | None = None) -> Link:
    """Check one directory that has a manifest.

    Args:
        deep: hash every file, not only compare sizes.
        trusted: the manifest must be signed by this key.
    """
    content: dict[str, Any] = {}
    signed = ""
    try:
        content = read_manifest(directory)
        signed = check_signature(directory, trusted) or ""
        if deep:
            require_whole(directory)
        else:
            problem = quick_check(directory)
            if problem:
                raise DataError(f"{problem}.", where=str(directory))
        _require_no_strangers(directory, content)
        root = directory if content.get("kind") == "huggingface" else directory.parent
        check_config(root, content)
        _check_beside(root, content, deep)
        problem = ""
    except MegaswiftError as error:
        problem = error.what
    return Link(directory, str(content.get("kind", "?")), _note(content), signed, problem or "")


def _note(content: dict[str, Any]) -> str:
    parts = [f"{len(content.get('files', {}))} files"]
    if isinstance(content.get("hf_tensors"), dict):
        parts.append(f"{len(content['hf_tensors'])} tensors")
    if content.get("iteration"):
        parts.append(f"step {content['iteration']}")
    verified = content.get("verified")
    logits = verified.get("logits") if isinstance(verified, dict) else None
    if isinstance(logits, dict) and isinstance(logits.get("max_abs"), float):
        parts.append(f"logits within {logits['max_abs']:.1e}")
    return ", ".join(parts)


def _require_no_strangers(directory: Path, content: dict[str, Any]) -> None:
    """Raise DataError for weight files that the manifest does not list."""
    known = set(content["files"]) | set(_OURS)
    weights = (".safetensors", ".distcp", ".bin", ".pt")
    strangers = sorted(
        path.name for path in directory.iterdir() if path.is_file() and path.name not in known and path.name.endswith(weights)
    )
    if strangers:
        raise DataError(f"{strangers[0]} is not listed in the manifest.", where=str(directory))


def _check_beside(root: Path, content: dict[str, Any], deep: bool) -> None:
    """The config and tokenizer files beside a converted checkpoint are those of the conversion."""
    beside = content.get("beside")
    for name, entry in (beside if isinstance(beside, dict) else {}).items():
        path, entry = root / Path(name).name, entry if isinstance(entry, dict) else {}
        if not path.is_file():
            raise DataError(f"{name} is missing.", where=str(root))
        if path.stat().st_size != entry.get("size") or (deep and sha256_of(path) != entry.get("sha256")):
            raise DataError(f"{name} was changed since the conversion.", where=str(path))


def walk(directory: Path, deep: bool, trusted: Ed25519PublicKey | None = None) -> list[Link]:
    """A directory and everything that it was made from, newest first."""
    links = [examine(directory, deep, trusted)]
    try:
        chain = older_links(read_manifest(directory))
    except DataError:
        return links
    for entry in chain:
        place = (directory / entry["directory"]).resolve()
        if not (place / MANIFEST).is_file():
            links.append(
                Link(
                    place,
                    str(entry.get("kind")),
                    f"not here any more; manifest {str(entry.get('manifest_sha256'))[:12]}",
                    "",
                    "",
                )
            )
            continue
        found = examine(place, deep)
        if not found.problem and sha256_of(place / MANIFEST) != entry.get("manifest_sha256"):
            found = Link(
                place, found.kind, found.note, found.signed_by, "its manifest is not the one that this chain was made from"
            )
        links.append(found)
    return links
