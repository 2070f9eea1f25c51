"""From one `--dataset` item to its rows: a local file, a registered name or a hub id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaswift.data import hubs
from megaswift.data.read import files_of, open_path
from megaswift.data.registry import Entry, entries
from megaswift.data.spec import DatasetSpec
from megaswift.errors import DataError, UserError, nearest
from megaswift.hub.remote import hubs as preferred

SELF_COGNITION = "self-cognition"
SELF_COGNITION_CONVERTERS = {"default": None, "qwen3": "no_think", "empty_think": "empty_think"}


@dataclass(frozen=True)
class Dataset:
    """Rows of one `--dataset` item.

    Attributes:
        spec: the item.
        source: its rows: a tables.Source, or a stream.Stream.
        place: where they come from, for the report.
        digest: text that changes when the rows do.
        columns: column to read -> name under which it is read.
        converter: name of a row function of the registry.
        self_cognition: whether {{NAME}} and {{AUTHOR}} are filled in.
    """

    spec: DatasetSpec
    source: Any
    place: str
    digest: str
    columns: dict[str, str] = field(default_factory=dict)
    converter: str | None = None
    self_cognition: bool = False


@dataclass(frozen=True)
class Found:
    """Where the rows of one item are, before they are opened: a local path, or ids on hubs in the order to try.

    Other attributes are those of Dataset and of hubs.load.
    """

    spec: DatasetSpec
    path: Path | None = None
    places: tuple[tuple[str, str], ...] = ()
    subsets: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)
    columns: dict[str, str] = field(default_factory=dict)
    converter: str | None = None
    self_cognition: bool = False

    def dataset(self, source: Any, digest: str) -> Dataset:
        """The dataset, once its rows are open."""
        if self.path is None:
            hub, dataset_id, *_ = digest.split("|")
            place = f"{hubs.HUB_NAMES[hub]} {dataset_id}"
        else:
            place = "built in" if self.self_cognition else str(self.path)
        return Dataset(self.spec, source, place, digest, self.columns, self.converter, self.self_cognition)


def resolve(spec: DatasetSpec, custom_dataset_info: str | None = None) -> Dataset:
    """Find and open the rows of one item. Raises UserError for an unknown name, DataError for what cannot be read."""
    found = find(spec, custom_dataset_info)
    if found.path is None:
        return found.dataset(*hubs.load(found.places, found.subsets, found.splits, spec.text))
    return found.dataset(open_path(found.path, found.subsets), _digest(files_of(found.path, found.subsets)))


def find(spec: DatasetSpec, custom_dataset_info: str | None = None) -> Found:
    """Find one item without opening it. Raises UserError for an unknown name or subset, DataError for a missing file."""
    if spec.is_local:
        return _local(spec, Path(spec.name).expanduser(), None)
    table = entries(custom_dataset_info)
    entry = table.get(spec.name) or next((item for item in table.values() if spec.name in (item.ms, item.hf)), None)
    if entry is None:
        if _looks_like_a_path(spec.name):
            place = Path(spec.name).expanduser().absolute()
            raise DataError("no such dataset file.", where=f"--dataset {spec.text}", fix=f"checked: {place}")
        if "/" not in spec.name:
            near = nearest(spec.name, list(table))
            raise UserError(
                f"dataset {spec.name!r} is no file and no registered name.",
                where=f"--dataset {spec.text}",
                fix=f"did you mean: {near}? Hub ids look like owner/name",
            )
        entry = Entry(spec.name, ms=spec.name, hf=spec.name)
    wrong = [part for part in spec.subsets if entry.subsets and part not in entry.subsets]
    if wrong:
        known = ", ".join(entry.subsets)
        raise UserError(
            f"{entry.name} has no subset {wrong[0]!r}.", where=f"--dataset {spec.text}", fix=f"its subsets: {known}"
        )
    return _local(spec, Path(entry.path), entry) if entry.path and spec.hub is None else _on_hubs(spec, entry)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix in (
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".parquet",
        ".txt",
        ".gz",
    )


def _local(spec: DatasetSpec, path: Path, entry: Entry | None) -> Found:
    columns = entry.columns if entry else {}
    if entry is not None and entry.name == SELF_COGNITION:
        if len(spec.subsets) > 1:
            fix = "default, qwen3 or empty_think"
            raise UserError("self-cognition takes one subset at a time.", where=f"--dataset {spec.text}", fix=fix)
        converter = SELF_COGNITION_CONVERTERS[spec.subsets[0]] if spec.subsets else None
        return Found(spec, path, columns=columns, converter=converter, self_cognition=True)
    if spec.subsets and path.is_file():
        raise UserError("a file has no subsets.", where=f"--dataset {spec.text}", fix="write the path alone, or path#N")
    return Found(spec, path, subsets=spec.subsets, columns=columns, converter=entry.converter if entry else None)


def _on_hubs(spec: DatasetSpec, entry: Entry) -> Found:
    order = [spec.hub] if spec.hub else [hub.key for hub in preferred()]
    places = tuple((hub, dataset_id) for hub in order if (dataset_id := entry.hf if hub == "hf" else entry.ms))
    if not places:
        name = hubs.HUB_NAMES[order[0]]
        raise UserError(f"{entry.name} is not on {name}.", where=f"--dataset {spec.text}", fix="leave the prefix out")
    own = entry.name == SELF_COGNITION
    return Found(spec, None, places, spec.subsets or entry.default, entry.split, entry.columns, entry.converter, own)


def _digest(files: list[Path]) -> str:
    state = hashlib.sha256()
    for path in files:
        state.update(f"\0{path.name}\0".encode())
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                state.update(block)
    return state.hexdigest()
