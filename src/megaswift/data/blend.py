"""Blends by weight as they are written: `--dataset a.jsonl:0.7 b.jsonl:0.3`."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

from megaswift.config.parse import split_commas
from megaswift.data.registry import entries
from megaswift.data.spec import DatasetSpec, names_text, parse_spec
from megaswift.errors import UserError

LONGEST_PERIOD = 1_000_000  # rows
_WEIGHT = re.compile(r"(.+):(\d+\.\d*|\.\d+|\d+)\Z", re.DOTALL)


def parse_weighted(items: list[str], custom_dataset_info: str | None = None) -> list[tuple[DatasetSpec, Fraction | None]]:
    """Items of `--dataset` with their weights: `[HF::|MS::]name|hub/id|path[:subset/...][:WEIGHT][#N]`.

    A text that names a file is that file, whatever stands at its end. A number after a file is its weight; after another name a number
    with a point is a weight, and a whole number might as well be a subset.

    Raises UserError where that is unclear, where some items have a weight and others none, and for weights that cannot be.
    """
    parts = [part.strip() for item in items for part in split_commas(item) if part.strip()]
    found = [_parse(part, custom_dataset_info) for part in parts]
    weighted = [spec.text for spec, weight in found if weight is not None]
    if weighted and len(weighted) < len(found):
        without = next(spec.text for spec, weight in found if weight is None)
        raise UserError(
            f"{weighted[0]} has a weight and {without} has none.",
            where="--dataset",
            fix="give each dataset a weight, as in a.jsonl:0.7 b.jsonl:0.3, or none",
        )
    if len(weighted) == 1 and found[0][1] != 1:
        raise UserError(
            f"{weighted[0]} is the only dataset, so its weight means nothing.",
            where="--dataset",
            fix="leave the weight out; for a subset of that name write name:subset:1",
        )
    return found


def _parse(text: str, custom_dataset_info: str | None) -> tuple[DatasetSpec, Fraction | None]:
    if re.fullmatch(r"\d*\.?\d+", text) and not names_text(text):
        raise UserError(
            f"{text!r} is no dataset.", where="--dataset", fix="a weight follows its dataset here: a.jsonl:0.7 b.jsonl:0.3"
        )
    if names_text(text):
        return parse_spec(text), None
    rest, mark, count = text.rpartition("#") if re.search(r"#\d+\Z", text) else (text, "", "")
    match = None if names_text(rest) else _WEIGHT.fullmatch(rest)
    if match is None:
        return parse_spec(text), None
    name, number = match[1], match[2]
    inner = name.split("::")[-1]
    if "." not in number and ":" not in inner and not _is_file(name) and not _has_no_subset(name, number, custom_dataset_info):
        raise UserError(
            f"{text}: {number} may be a weight or a subset.",
            where="--dataset",
            fix=f"write {name}:{number}.0 for the weight, or {name}:{number}:1 for the subset, with a weight of 1",
        )
    weight = Fraction(number)
    if weight <= 0:
        raise UserError(f"{text}: a weight is above 0.", where="--dataset", fix="leave out what shall not be read")
    return parse_spec(f"{name}{mark}{count}"), weight


def written(spec: DatasetSpec, weight: Fraction | None) -> str:
    """An item of `--dataset` that means this dataset and weight, with a local path made absolute."""
    local = spec.hub is None and names_text(spec.name)
    name = (
        str(Path(spec.name).expanduser().absolute()) if local else f"{spec.hub.upper()}::{spec.name}" if spec.hub else spec.name
    )
    subsets = f":{'/'.join(spec.subsets)}" if spec.subsets else ""
    share = "" if weight is None else f":{float(weight):.12g}" if weight.denominator > 1 else f":{weight}.0"
    return f"{name}{subsets}{share}{'' if spec.count is None else f'#{spec.count}'}"


def _is_file(name: str) -> bool:
    return names_text(name) and not Path(name).expanduser().is_dir()


def _has_no_subset(name: str, number: str, custom_dataset_info: str | None) -> bool:
    """Whether a registered name has subsets, and none of that name."""
    entry = entries(custom_dataset_info).get(name)
    return entry is not None and bool(entry.subsets) and number not in entry.subsets


def shares(weights: list[Fraction]) -> list[int]:
    """Rows of each dataset in one period: the smallest whole numbers in the ratio of the weights.

    Raises UserError where the period would be longer than a million rows.
    """
    total = sum(weights)
    parts = [weight / total for weight in weights]
    period = math.lcm(*(part.denominator for part in parts))
    if period > LONGEST_PERIOD:
        raise UserError(
            f"these weights repeat only after {period:,} rows.",
            where="--dataset",
            fix="give weights of at most six digits, as in a:0.123456 b:0.876544",
        )
    return [int(part * period) for part in parts]
