"""From one `--dataset` item to numbered rows: a local file, a registered name or a hub id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from megaswift.data import hubs
from megaswift.data.read import Source, files_of, open_path
from megaswift.data.registry import Entry, entries
from megaswift.data.spec import DatasetSpec
from megaswift.errors import DataError, UserError, nearest
from megaswift.hf.hubs import hubs as preferred

SELF_COGNITION = "self-cognition"
SELF_COGNITION_CONVERTERS = {"default": None, "qwen3": "no_think", "empty_think": "empty_think"}


@dataclass(frozen=True)
class Dataset:
    """Rows of one `--dataset` item.

    Attributes:
        spec: the item.
        source: its rows.
        place: where they come from, for the report.
        digest: text that changes when the rows do.
        columns: column to read -> name under which it is read.
        converter: name of a row function of the registry.
        self_cognition: whether {{NAME}} and {{AUTHOR}} are filled in.
    """

    spec: DatasetSpec
    source: Source
    place: str
    digest: str
    columns: dict[str, str] = field(default_factory=dict)
    converter: str | None = None
    self_cognition: bool = False


def resolve(spec: DatasetSpec, custom_dataset_info: str | None = None) -> Dataset:
    """Find and open the rows of one item. Raises UserError for an unknown name, DataError for what cannot be read."""
    if spec.is_local:
        return _local(spec, Path(spec.name).expanduser(), None)
    table = entries(custom_dataset_info)
    entry = table.get(spec.name) or next((item for item in table.values() if spec.name in (item.ms, item.hf)), None)
    if entry is None:
        if (
            "/" not in spec.name
            or spec.name.startswith((".", "/", "~"))
            or Path(spec.name).suffix in (".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz")
        ):
            _unknown(spec, list(table))
        entry = Entry(spec.name, ms=spec.name, hf=spec.name)
    _check_subsets(spec, entry)
    if entry.path and spec.hub is None:
        return _local(spec, Path(entry.path), entry)
    return _from_hub(spec, entry)


def _unknown(spec: DatasetSpec, names: list[str]) -> None:
    if Path(spec.name).suffix or spec.name.startswith((".", "/", "~")):
        raise DataError(
            "no such dataset file.", where=f"--dataset {spec.text}", fix=f"checked: {Path(spec.name).expanduser().absolute()}"
        )
    raise UserError(
        f"dataset {spec.name!r} is no file and no registered name.",
        where=f"--dataset {spec.text}",
        fix=f"did you mean: {nearest(spec.name, names)}? Hub ids look like owner/name",
    )


def _check_subsets(spec: DatasetSpec, entry: Entry) -> None:
    wrong = [part for part in spec.subsets if entry.subsets and part not in entry.subsets]
    if wrong:
        raise UserError(
            f"{entry.name} has no subset {wrong[0]!r}.",
            where=f"--dataset {spec.text}",
            fix=f"its subsets: {', '.join(entry.subsets)}",
        )


def _local(spec: DatasetSpec, path: Path, entry: Entry | None) -> Dataset:
    own = entry is not None and entry.name == SELF_COGNITION
    if own and len(spec.subsets) > 1:
        raise UserError(
            "self-cognition takes one subset at a time.", where=f"--dataset {spec.text}", fix="default, qwen3 or empty_think"
        )
    subsets = () if own else spec.subsets
    converter = SELF_COGNITION_CONVERTERS[spec.subsets[0]] if own and spec.subsets else entry.converter if entry else None
    if subsets and path.is_file():
        raise UserError("a file has no subsets.", where=f"--dataset {spec.text}", fix="write the path alone, or path#N")
    return Dataset(
        spec,
        open_path(path, subsets),
        "built in" if own else str(path),
        _digest(files_of(path, subsets)),
        entry.columns if entry else {},
        converter,
        own,
    )


def _from_hub(spec: DatasetSpec, entry: Entry) -> Dataset:
    order = [spec.hub] if spec.hub else [hub.key for hub in preferred()]
    places = [(hub, dataset_id) for hub in order if (dataset_id := entry.hf if hub == "hf" else entry.ms)]
    if not places:
        raise UserError(
            f"{entry.name} is not on {hubs.HUB_NAMES[order[0]]}.", where=f"--dataset {spec.text}", fix="leave the prefix out"
        )
    source, mark = hubs.load(places, spec.subsets or entry.default, entry.split, spec.text)
    hub, dataset_id, *_ = mark.split("|")
    own = entry.name == SELF_COGNITION
    return Dataset(spec, source, f"{hubs.HUB_NAMES[hub]} {dataset_id}", mark, entry.columns, entry.converter, own)


def _digest(files: list[Path]) -> str:
    state = hashlib.sha256()
    for path in files:
        state.update(f"\0{path.name}\0".encode())
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                state.update(block)
    return state.hexdigest()
