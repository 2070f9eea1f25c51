"""Tensors that a folder holds beside the model that is trained: carried along to the next folder, bit for bit, and read by no rank.

They are the towers of models that read pictures, too, and layers that predict further ahead. Converted weights hold a copy in files
of their own; a run's checkpoints hold their digests and say where they lie. What is written is compared with the digests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError, MegaswiftError
from megaswift.models import family_of, parameters_of
from megaswift.models.parameters import HFTensor, hf_shapes
from megaswift.store.manifest import MANIFEST, older_links, read_manifest
from megaswift.weights.base import digests_of
from megaswift.weights.hf.header import read_header
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.hf.shards import DEFAULT_SHARD_SIZE, PlannedTensor, plan_shards, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.store.files import FileRecord

STEM = "carried"  # of the names of their files beside converted weights
FIELD = "carried"  # in manifests
Record = dict[str, Any]  # name -> "sha256", "dtype" (as in a file's header) and "shape"


def carried_names(source: HFCheckpoint, config: PreTrainedConfig) -> list[str]:
    """The names of a folder's carried tensors, in the order of its files."""
    patterns, own = family_of(config.model_type).carried(config), hf_shapes(parameters_of(config))
    return [name for name in source.names if name not in own and any(fnmatchcase(name, mark) for mark in patterns)]


def planned(source: HFCheckpoint, names: Iterable[str]) -> list[PlannedTensor]:
    """These tensors as they are, for whatever writes them: one is read at a time, and released."""
    return [
        PlannedTensor(
            name,
            source.dtype(name),
            source.shape(name),
            partial(source.tensor, name),
            partial(source.prefetch, name),
            partial(source.release, name),
        )
        for name in names
    ]


def write_beside(source: HFCheckpoint, names: list[str], directory: Path) -> tuple[dict[str, FileRecord], Record]:
    """Copy these tensors into files of their own beside converted weights; the files, and what a manifest says of the tensors."""
    if not names:
        return {}, {}
    files: dict[str, FileRecord] = {}
    digests: dict[str, str] = {}
    for shard in plan_shards(planned(source, names), DEFAULT_SHARD_SIZE, STEM):
        path = directory / shard.file
        path.unlink(missing_ok=True)  # an interrupted conversion may have left it
        written = write_shard(shard, path)
        files[shard.file] = written.record
        digests |= written.tensors
    return files, record_of(source, digests)


def record_of(source: HFCheckpoint, digests: Mapping[str, str]) -> Record:
    """What manifests say of tensors with these digests."""
    return {
        name: {"sha256": value, "dtype": source.entry(name).dtype, "shape": list(source.shape(name))}
        for name, value in digests.items()
    }


def of_start(place: Path, config: PreTrainedConfig, origin: str | None) -> dict[str, Any] | None:
    """What a run's checkpoints say of the tensors that are carried along from where it begins; None where there are none.

    Args:
        place: a Hugging Face folder, converted weights, or a checkpoint of a run, which says what that run was told.
        origin: how the folder is called elsewhere.
    """
    if (place / MANIFEST).is_file() and not (place / "config.json").is_file():
        manifest = read_manifest(place)
        told = manifest.get(FIELD)
        if not told:
            return None
        named = dict(manifest.get("source") or {}).get("origin")
        return {"path": str(place.absolute()), "origin": str(named or place.absolute()), **told}
    source = HFCheckpoint.open(place)
    names = carried_names(source, config)
    if not names:
        return None
    digests = digests_of(place, {name: HFTensor(name, source.shape(name)) for name in names})
    tensors = record_of(source, {name: digests[name] for name in names})
    return {"path": str(place.absolute()), "origin": origin or str(place.absolute()), "tensors": tensors}


def told_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of a folder says of the tensors that are in it as they were, by the manifest of what it is made from."""
    told = manifest.get(FIELD)
    if not told:
        return {}
    origin = told.get("origin") or dict(manifest.get("source") or {}).get("origin")
    return {FIELD: {"origin": origin, "tensors": told["tensors"]}}


def open_beside(directory: Path) -> HFCheckpoint:
    """The files of carried tensors in a directory of converted weights."""
    files = sorted(directory.glob(f"{STEM}*.safetensors"))
    return HFCheckpoint(directory, {}, {entry.name: entry for file in files for entry in read_header(file)})


def find_carried(
    manifest: Mapping[str, Any], checkpoint: Path, named: Path | None = None
) -> tuple[HFCheckpoint, Record] | None:
    """The carried tensors that a checkpoint tells of, where they lie, and its record of them; None where it tells of none.

    Args:
        named: the directory that the user names for them: nothing else is looked at then.

    Raises DataError where they are not to be found. Their values are not read here (`require_same`).
    """
    told = manifest.get(FIELD)
    if not told:
        return None
    record: Record = told["tensors"]
    places = [named] if named is not None else _places(manifest, checkpoint)
    wrong = []
    for place in places:
        source = None
        with suppress(MegaswiftError, OSError):
            source = HFCheckpoint.open(place) if (place / "config.json").is_file() else open_beside(place)
        problem = "it is not there" if source is None or not source.table else _differs(source, record)
        if source is not None and not problem:
            return source, record
        wrong.append(f"{place} ({problem})")
    raise DataError(
        f"the {len(record)} tensors that were carried along, {next(iter(record))} among them, are not to be found: without them the "
        "model would not be whole.",
        where="; ".join(wrong),
        fix=f"name the folder that has them: --model_id_or_path DIR; they were {told.get('origin')}",
    )


def _places(manifest: Mapping[str, Any], checkpoint: Path) -> list[Path]:
    """Where carried tensors may lie: in the checkpoint, where it says, in what it was made from (all may have been moved together)."""
    told = manifest[FIELD]
    made_from = [Path(os.path.normpath(checkpoint / link["directory"])) for link in older_links(dict(manifest))]
    places = [checkpoint, *(Path(str(told[name])) for name in ("path", "origin") if told.get(name)), *made_from]
    held = [
        place
        for place in places
        if place.is_dir() and (any(place.glob(f"{STEM}*.safetensors")) or place not in (checkpoint, *made_from))
    ]
    return list(dict.fromkeys(held)) or [Path(str(told.get("path", checkpoint)))]


def _differs(source: HFCheckpoint, record: Record) -> str:
    """What is other than recorded by the headers of files, or ""."""
    for name, told in record.items():
        if name not in source.table:
            return f"without {name}"
        if (source.entry(name).dtype, list(source.shape(name))) != (told["dtype"], list(told["shape"])):
            return f"{name} is {source.entry(name).dtype} {list(source.shape(name))} there, not {told['dtype']} {told['shape']}"
    return ""


def require_same(digests: Mapping[str, str], record: Record, where: Path | str) -> int:
    """Raise DataError unless every carried tensor was written with the value that was recorded; how many there are."""
    wrong = [name for name, told in record.items() if digests.get(name) != told["sha256"]]
    if wrong:
        raise DataError(
            f"{len(wrong)} of the {len(record)} tensors that are carried along are not those that were recorded.",
            where=f"{where}: {', '.join(wrong[:5])}",
            fix="the folder that they come from was changed: name one with the same tensors, --model_id_or_path DIR",
        )
    return len(record)


def read_back(source: HFCheckpoint, record: Record, where: Path | str) -> int:
    """The same of what a directory holds, by reading it."""
    from megaswift.weights.convert.model import digest

    problem = _differs(source, record)
    if problem:
        raise DataError(f"of the tensors that are carried along {problem}.", where=str(where), fix="convert again")
    digests = {}
    for name in record:
        digests[name] = digest(source.tensor(name))
        source.release(name)
    return require_same(digests, record, where)


def nbytes(source: HFCheckpoint, names: Iterable[str]) -> int:
    """Their size in bytes."""
    return sum(source.entry(name).nbytes for name in names)


__all__ = [
    "FIELD", "STEM", "carried_names", "find_carried", "nbytes", "of_start", "open_beside", "planned", "read_back", "record_of", "require_same", "told_of",
    "write_beside",
]  # fmt: skip
