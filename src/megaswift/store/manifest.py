"""manifest.json: what a checkpoint or an exported model consists of, written last, so that its presence means complete."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megaswift import __version__
from megaswift.errors import DataError
from megaswift.store.files import sha256_of
from megaswift.store.publish import put

MANIFEST = "manifest.json"

__all__ = [
    "MANIFEST", "ancestry", "changed_fields", "check_hashes", "digest_files", "link", "older_links", "quick_check", "read_manifest",
    "sha256_of", "versions", "write_manifest",
]  # fmt: skip

FORMAT_VERSION = 1
LONGEST_CHAIN = 100  # links; a run that was resumed often keeps the newest ones


def digest_files(directory: Path, known: dict[str, Any] | None = None, threads: int = 2) -> dict[str, dict[str, Any]]:
    """Name -> size and SHA-256 of every file directly in `directory`; `known` ones were hashed while written."""
    known = known or {}
    names = sorted(path.name for path in directory.iterdir() if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor(threads) as pool:
        hashes = pool.map(lambda name: known[name] if name in known else sha256_of(directory / name), names)
        return {name: {"size": (directory / name).stat().st_size, "sha256": value} for name, value in zip(names, hashes)}


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write manifest.json, which appears whole and is on the disk then."""
    text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=1, ensure_ascii=False)
    put(directory / MANIFEST, text + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory. Raises DataError where it is missing or not JSON."""
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError("manifest.json is missing: the directory was not finished.", where=str(directory)) from error
    except (ValueError, RecursionError) as error:
        raise DataError("manifest.json is not JSON.", where=str(path)) from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise DataError("manifest.json lists no files.", where=str(path))
    if not all(isinstance(entry, dict) for entry in content["files"].values()):
        raise DataError("manifest.json lists files in a form that is not known.", where=str(path))
    return content


def quick_check(directory: Path) -> str | None:
    """None if the manifest is there and every file has its size, else what is wrong."""
    try:
        files = read_manifest(directory)["files"]
    except DataError as error:
        return error.what.rstrip(".")
    for name, entry in files.items():
        path = directory / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("size"):
            return f"{name} has {path.stat().st_size} bytes, {entry.get('size')} expected"
    return None


def versions() -> dict[str, str]:
    """Versions of what made a file."""
    from contextlib import suppress
    from importlib.metadata import PackageNotFoundError, version

    found = {"megaswift": __version__}
    for name in ("torch", "megatron-core", "transformers", "safetensors"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def link(directory: Path, seen_from: Path | None = None) -> dict[str, Any]:
    """What names another directory in a manifest: its manifest's SHA-256, and where it lay when the link was made."""
    content = read_manifest(directory)
    path = os.path.relpath(directory, seen_from) if seen_from is not None else str(directory)
    return {
        "directory": path,
        "kind": content.get("kind"),
        "iteration": content.get("iteration"),
        "manifest_sha256": sha256_of(directory / MANIFEST),
    }


def older_links(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The links of a manifest to what it was made from, newest first; empty for a base."""
    links = content.get("made_from")
    return (
        [item for item in links if isinstance(item, dict) and isinstance(item.get("directory"), str)]
        if isinstance(links, list)
        else []
    )


def ancestry(directory: Path, seen_from: Path | None = None) -> list[dict[str, Any]]:
    """The chain of a directory that is made from `directory`: that one, what it was made from, and so on to the base.

    Args:
        seen_from: the new directory; links then hold relative paths, so that the chain survives a move of all together.
    """
    chain = [link(directory, seen_from)]
    for older in older_links(read_manifest(directory)):
        path = directory / older["directory"]
        chain.append({**older, "directory": os.path.relpath(path, seen_from) if seen_from is not None else str(path)})
    return chain[:LONGEST_CHAIN]


def changed_fields(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Fields that differ between two configs, as `name was X, is Y`."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names]


def check_hashes(directory: Path) -> None:
    """Raise DataError unless every file is byte for byte the one that was written."""
    problem = quick_check(directory)
    if problem:
        raise DataError(
            f"the checkpoint is incomplete: {problem}.", where=str(directory), fix="use another checkpoint (--iteration N)"
        )
    files = read_manifest(directory)["files"]
    with ThreadPoolExecutor(2) as pool:
        for name, found in zip(files, pool.map(lambda name: sha256_of(directory / Path(name).name), files)):
            if found != files[name].get("sha256"):
                raise DataError(
                    f"{name} is not the file that was written: its SHA-256 differs.",
                    where=str(directory / name),
                    fix="use another checkpoint",
                )
