"""What became of every row: counts for plan.json and a page for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megaswift.data.seen import Seen
from megaswift.data.tokens import Encoded, weights_of

if TYPE_CHECKING:
    from rich.console import Console

    from megaswift.data.chat import ChatTemplate
    from megaswift.data.text import TextTokens

SHOWN = 5  # places named for each reason
LABEL = 20  # columns of a dataset's name in the table


@dataclass
class Dropped:
    """Rows dropped for one reason: how many, and the first places as `file:line (detail)`."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: Callable[[], str], detail: str = "") -> None:
        """Count one more row; `place` is only asked for when it is shown."""
        self.count += 1
        if len(self.places) < SHOWN:
            self.places.append(f"{place()} ({detail})" if detail else place())


@dataclass
class DatasetReport:
    """One item of --dataset or --val_dataset.

    Attributes:
        item: as the user wrote it. place: where its rows come from.
        rows: rows found. usable: those of a recognised, complete shape. asked: N of #N.
        train, val: rows used, repeats included, before the cut to max_length.
        repeated: how many of `train` are repeats. shapes: shape -> rows.
        dropped: reason -> rows that could not be used. too_long: rows above max_length.
        notes: what was changed in rows, or is doubtful -> the rows. files: the same of whole files.
        samples: samples that training and validation got, repeats included.
        tokens, supervised: their tokens, and those with loss.
        unsupervised_turns: assistant turns without loss because the chat template leaves out their thoughts.
        weighted: samples on disk whose rows give tokens a weight other than 0 and 1; weight: the sum of these samples' weights.
        cut: rows with messages after their last answer, which are left out.
        control_tokens: control token -> how often it stands in the text rows that were tokenized.
        seen: what inference would see of some rows of chats.
    """

    item: str
    place: str
    rows: int = 0
    usable: int = 0
    asked: int | None = None
    train: int = 0
    val: int = 0
    repeated: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    notes: dict[str, Dropped] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    too_long: Dropped = field(default_factory=Dropped)
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    unsupervised_turns: int = 0
    weighted: int = 0
    weight: float = 0.0
    cut: Dropped = field(default_factory=Dropped)
    control_tokens: dict[str, int] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)

    def drop(self, reason: str, place: Callable[[], str], detail: str = "") -> None:
        """Count a row that cannot be used."""
        self.dropped.setdefault(reason, Dropped()).add(place, detail)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def dataset_report(item: dict[str, Any]) -> DatasetReport:
    """The report of `DatasetReport.to_dict`."""
    parts = {part: {key: Dropped(**value) for key, value in item[part].items()} for part in ("dropped", "notes")}
    alone = {"too_long": Dropped(**item["too_long"]), "cut": Dropped(**item["cut"]), "seen": Seen(**item["seen"])}
    return DatasetReport(**{**item, **alone, **parts})


@dataclass
class DataReport:
    """All datasets of a run.

    Attributes:
        train_rows, val_rows: rows of the two TokenRows (packs when packed); these are what a run's steps count.
        train_samples: samples in the training rows.
        parse_special_tokens: control tokens in text rows are tokens, not characters.
        fill: share of max_length that packs use; None when not packed.
        example: the first training sample as (text, weight in the loss) stretches.
        blend: of text that is blended by weight: item, its share of the rows, and the rows that one pass over it has.
    """

    template: str
    max_length: int
    truncation: str
    packing: bool
    parse_special_tokens: bool = True
    datasets: list[DatasetReport] = field(default_factory=list)
    train_rows: int = 0
    val_rows: int = 0
    train_samples: int = 0
    longest: int = 0
    fill: float | None = None
    example: list[tuple[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    from_cache: bool = False
    blend: list[tuple[str, float, int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, for plan.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DataReport:
        """The report of `to_dict`."""
        data = dict(data)
        data["datasets"] = [dataset_report(item) for item in data["datasets"]]
        data["example"] = [(text, kept) for text, kept in data["example"]]
        return cls(**data)

    @property
    def tokens(self) -> int:
        """Tokens of all samples, repeats included."""
        return sum(item.tokens for item in self.datasets)

    @property
    def supervised(self) -> int:
        """Tokens with loss."""
        return sum(item.supervised for item in self.datasets)


def print_report(report: DataReport, console: Console, *, example: bool = True) -> None:
    """Show the counts, what was dropped and why, and one example with its supervised text marked."""
    from rich.table import Table

    title = "Data" + (" (from the cache)" if report.from_cache else "")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("dataset", "rows", "usable", "train", "val", "bad", "long", "tokens", "loss"):
        table.add_column(name, justify="left" if name == "dataset" else "right", no_wrap=True)
    for item in report.datasets:
        bad = sum(entry.count for entry in item.dropped.values())
        share = f"{item.supervised / item.tokens:.0%}" if item.tokens else "-"
        counts = (item.rows, item.usable, item.train, item.val, bad, item.too_long.count, item.tokens)
        label = Path(item.item).name if item.item.startswith(item.place) else item.item
        label = label if len(label) <= LABEL else f"{label[: LABEL // 2]}...{label[3 - LABEL // 2 :]}"  # whole below the table
        table.add_row(label, *(f"{count:,}" for count in counts), share)
    console.print(table)
    for item in report.datasets:
        _print_details(item, report, console)
    packs = ""
    if report.fill is not None:
        packs = f" ({report.train_samples:,} samples in packs that are {report.fill:.1%} full)"
    line = (
        f"{report.train_rows:,} training rows{packs}, {report.val_rows:,} validation rows; longest: {report.longest:,} tokens"
    )
    console.print(line, highlight=False)
    if example:
        print_example(report.example, console)


def stretches(template: ChatTemplate | TextTokens, sample: Encoded) -> list[tuple[str, float]]:
    """A sample as (text, weight in the loss) stretches."""
    weights = weights_of(sample)
    borders = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(sample.ids)]
    return [(template.decode(sample.ids[first:last]), float(weights[first])) for first, last in pairwise(borders)]


def _print_details(item: DatasetReport, report: DataReport, console: Console) -> None:
    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    shapes = ", ".join(f"{shape} ({count:,})" for shape, count in sorted(item.shapes.items(), key=lambda pair: -pair[1]))
    line(
        f"{item.item}: {item.place}; read as {shapes}"
        + (f"; {item.repeated:,} of {item.train:,} rows are repeats" if item.repeated else "")
    )
    for text in item.files:
        line(f"  {text}", "yellow")
    told = [(f"dropped {entry.count:,}: {reason}", entry) for reason, entry in item.dropped.items()]
    told += [(f"{entry.count:,} row{'s' * (entry.count != 1)}: {text}", entry) for text, entry in item.notes.items()]
    for text, entry in told:
        line(f"  {text}", "yellow")
        for place in entry.places:
            line(f"    {place}")
    if item.too_long.count:
        what = {"delete": "left out", "truncation_left": "cut to their last", "split": "split into pieces of"}[
            report.truncation
        ]
        size = "" if report.truncation == "delete" else f" {report.max_length:,} tokens"
        line(f"  {item.too_long.count:,} rows longer than {report.max_length:,} tokens, {what}{size}", "yellow")
        for place in item.too_long.places:
            line(f"    {place}")
    for text, places in remarks(item, report):
        line(f"  {text}", "yellow")
        for place in places:
            line(f"    {place}")


def remarks(item: DatasetReport, report: DataReport) -> list[tuple[str, list[str]]]:
    """What is worth knowing about rows that are used: (text, first places) each."""
    result: list[tuple[str, list[str]]] = []
    if item.unsupervised_turns:
        text = f"{item.unsupervised_turns:,} earlier answers carry no loss: the chat template leaves out their thoughts"
        result.append((text, []))
    if item.weighted:
        text = f"{item.weighted:,} samples bring weights of their own: {item.weight:,.6g} in all; the loss is divided by the sum of weights"
        result.append((text, []))
    result += ((text, []) for text in item.seen.remarks())
    if item.cut.count:
        text = f"{item.cut.count:,} rows do not end with an answer: what follows their last one is left out"
        result.append((text, item.cut.places))
    if item.control_tokens:
        most = sorted(item.control_tokens.items(), key=lambda pair: (-pair[1], pair[0]))
        named = ", ".join(f"{token} ({count:,})" for token, count in most[:SHOWN]) + (", ..." if len(most) > SHOWN else "")
        read = "tokens (--parse_special_tokens false: as characters)" if report.parse_special_tokens else "characters"
        total = sum(item.control_tokens.values())
        result.append((f"text rows hold {total:,} control tokens, read as {read}: {named}", []))
    return result


def print_example(example: list[tuple[str, float]], console: Console, title: str = "One training sample") -> None:
    """One sample with its supervised text marked, and with weights other than 1 before what has them."""
    from rich.text import Text

    if not example:
        return
    coloured = console.is_terminal and not console.no_color
    console.print(
        f"{title}; loss is on the " + ("green" if coloured else "[[marked]]") + " text:",
        markup=False,
        highlight=False,
    )
    text = Text()
    for part, weight in example:
        if weight not in (0.0, 1.0):
            text.append(f"({weight:g} x)", style="bold yellow" if coloured else "")
        style = "" if not coloured or not weight else "bold green" if weight == 1.0 else "bold yellow"
        text.append(part if coloured or not weight else f"[[{part}]]", style=style)
    console.print(text, soft_wrap=True)
