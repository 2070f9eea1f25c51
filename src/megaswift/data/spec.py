"""The grammar of one `--dataset` item: `[HF::|MS::]name|hub/id|path[:subset/...][#N]`."""

from __future__ import annotations

from dataclasses import dataclass

from megaswift.config.parse import exists, split_commas
from megaswift.errors import UserError

HUBS = ("hf", "ms")


@dataclass(frozen=True)
class DatasetSpec:
    """One item of `--dataset`, taken apart.

    Attributes:
        text: the item as the user wrote it.
        hub: "hf" or "ms" when written as a prefix, else None.
        name: registered name, hub id or local path.
        subsets: names after the colon; empty for the default ones.
        count: N of `#N`, or None for all rows.
    """

    text: str
    hub: str | None
    name: str
    subsets: tuple[str, ...] = ()
    count: int | None = None

    @property
    def is_local(self) -> bool:
        """Whether `name` is a file or folder of this machine."""
        return self.hub is None and exists(self.name)


def names_text(text: str) -> bool:
    """Whether a text names a file or folder of this machine, or what the names of Megatron's pair of indexed files begin with."""
    return exists(text) or exists(f"{text}.idx")


def parse_spec(text: str) -> DatasetSpec:
    """Take one `--dataset` item apart. Raises UserError for a wrong prefix or count."""
    hub, rest = _split_hub(text)
    if exists(rest):
        return DatasetSpec(text, hub, rest)
    rest, count = _split_count(text, rest)
    if exists(rest):
        return DatasetSpec(text, hub, rest, (), count)
    name, colon, tail = rest.partition(":")
    subsets = tuple(part for part in tail.split("/") if part)
    if not name or (colon and not subsets):
        raise UserError(
            f"{text!r} names no dataset or no subset.", where="--dataset", fix="write name, name:subset or name:subset#500"
        )
    return DatasetSpec(text, hub, name, subsets, count)


def parse_specs(items: list[str]) -> list[DatasetSpec]:
    """Take several items apart; one item may hold several, separated by commas."""
    specs: list[DatasetSpec] = []
    for item in items:
        specs.extend(parse_spec(part.strip()) for part in split_commas(item) if part.strip())
    return specs


def _split_hub(text: str) -> tuple[str | None, str]:
    prefix, colons, rest = text.partition("::")
    if not colons:
        return None, text
    if prefix.lower() not in HUBS:
        raise UserError(f"{prefix!r} is no hub.", where=f"--dataset {text}", fix="use HF:: or MS::, or no prefix")
    return prefix.lower(), rest


def _split_count(text: str, rest: str) -> tuple[str, int | None]:
    name, mark, digits = rest.rpartition("#")
    if not mark:
        return rest, None
    if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
        raise UserError(
            f"'#{digits}' is no number of rows.", where=f"--dataset {text}", fix="write a whole number above 0, as in name#500"
        )
    return name, int(digits)
