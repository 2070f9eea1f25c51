"""One pass over all datasets: rows are checked, drawn, tokenized, cut and packed into a new directory of the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megaswift.config.options import DataArguments
from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import BadRow
from megaswift.data.encoding import refuse_encoding
from megaswift.data.packing import pack
from megaswift.data.pipeline import Encoding, Note, Recipe
from megaswift.data.report import DataReport, DatasetReport, Dropped
from megaswift.data.resolve import Dataset
from megaswift.data.sampling import sample_validation, split_and_sample
from megaswift.data.store import RowWriter
from megaswift.data.workers import Workers
from megaswift.errors import DataError, UserError
from megaswift.terminal import LiveLine
from megaswift.weights.hf.tokenizer import no_rows

T = TypeVar("T")

CHUNK = 512  # rows of one unit of work
SHOW_PROGRESS = 20_000  # rows from which on progress is shown


class Table:
    """The model's embedding, as far as the data must know it: a token that it has no row for is an error.

    Args:
        template: knows the tokens by their ids.
        rows: of the embedding; None: not known, and nothing is judged.
    """

    def __init__(self, template: ChatTemplate, rows: int | None) -> None:
        self.template, self.rows = template, rows

    def judge(self, encoding: Encoding, place: Callable[[int], str]) -> None:
        """Raise DataError at the first row (within the encoding) that has a token beyond the embedding.

        Args:
            place: row number -> file and line.
        """
        if self.rows is None or encoding.ids.max(initial=-1) < self.rows:
            return
        sample = int(np.searchsorted(np.cumsum(encoding.sizes), np.argmax(encoding.ids >= self.rows), side="right"))
        row = int(np.searchsorted(np.cumsum(encoding.counts), sample, side="right"))
        first = int(sum(encoding.sizes[:sample]))
        ids = encoding.ids[first : first + encoding.sizes[sample]]
        beyond = {self.template.decode(ids[ids == token][:1]): int(token) for token in np.unique(ids[ids >= self.rows])}
        raise no_rows(beyond, self.rows, place(row), "this row has")


class Build:
    """One pass over all datasets into a new cache directory.

    Args:
        args: how rows are drawn, cut and judged.
        recipes: how the rows of each dataset are read, by id() of the dataset.
        report: filled in on the way.
        workers: what checks and tokenizes.
        table: the model's embedding.
        answers: samples of one example, which are never divided over rows: 2 for pairs.
        mismatched: the second of two is no example itself.
    """

    def __init__(
        self,
        args: DataArguments,
        recipes: dict[int, Recipe],
        report: DataReport,
        workers: Workers,
        table: Table,
        answers: int = 1,
        mismatched: bool = False,
    ) -> None:
        self.table, self.answers, self.mismatched = table, answers, mismatched
        self.args, self.recipes, self.report, self.workers = args, recipes, report, workers
        self.seed = args.seed if args.dataset_seed is None else args.dataset_seed
        self.columns: set[str] = set()  # those of --columns that some row has

    def run(self, directory: Path, train: list[Dataset], val: list[Dataset], packing: bool, stream_rows: int | None) -> None:
        """Write directory/train and directory/val. Raises DataError when no usable row is left."""
        writers = {"train": RowWriter(directory / "train"), "val": RowWriter(directory / "val")}
        try:
            self._fill(writers, train, val, packing, stream_rows)
        finally:
            for writer in writers.values():
                writer.abandon()

    def _fill(
        self,
        writers: dict[str, RowWriter],
        train: list[Dataset],
        val: list[Dataset],
        packing: bool,
        stream_rows: int | None,
    ) -> None:
        orders: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        ratio = 0.0 if val else self.args.dataset_test_ratio
        for number, dataset in enumerate(train):
            entry = self._entry(dataset)
            if stream_rows is not None:
                share = (number + 1) * stream_rows // len(train) - number * stream_rows // len(train)
                orders["train"].append(self._take(dataset, entry, share, packing, writers["train"]))
                continue
            usable = self._usable(dataset, entry)
            chosen, held_out = split_and_sample(len(usable), dataset.spec.count, ratio, self.seed)
            entry.train, entry.val = len(chosen), len(held_out)
            entry.repeated = entry.train - len(np.unique(chosen))
            for part, picks in (("train", chosen), ("val", held_out)):
                orders[part].append(self._encode(dataset, entry, usable, picks, writers[part]))
        for dataset in val:
            entry = self._entry(dataset)
            usable = self._usable(dataset, entry)
            chosen = sample_validation(len(usable), dataset.spec.count, self.seed, dataset.spec.text)
            entry.val = len(chosen)
            orders["val"].append(self._encode(dataset, entry, usable, chosen, writers["val"]))
        self._require_columns()
        self._finish(writers, orders, packing)

    def _entry(self, dataset: Dataset) -> DatasetReport:
        entry = DatasetReport(dataset.spec.text, dataset.place, asked=dataset.spec.count)
        self.report.datasets.append(entry)
        return entry

    def _take(self, dataset: Dataset, entry: DatasetReport, share: int, packing: bool, writer: RowWriter) -> np.ndarray:
        """Tokenize the front of a stream, until it gives `share` rows (or packs); returns their sample numbers."""
        first = len(writer)
        share *= self.answers
        wanted = share * self.args.max_length if packing else share
        source = dataset.source
        encoded = self.workers.stream(source.rows(dataset.spec.count), self.recipes[id(dataset)], CHUNK)
        for row, encoding in self._watch(encoded, f"reading {entry.item}", SHOW_PROGRESS):
            self._add(entry, encoding, writer, source, np.arange(row, row + len(encoding.counts)))
            entry.rows += len(encoding.counts)
            entry.usable += len(encoding.counts) - len(encoding.bad)
            self._tell(entry, encoding.shapes, encoding.notes, source, row)
            have = writer.sizes[first:]
            if (int(have.sum()) if packing else len(have)) >= wanted:
                break
        order = np.arange(first, len(writer) if packing else min(len(writer), first + share))
        entry.train = len(order)
        entry.files = list(source.notes)
        self._require_some(entry, len(order))
        self._count(entry, writer, order)
        return order

    def _usable(self, dataset: Dataset, entry: DatasetReport) -> np.ndarray:
        """Indices of the rows of a recognised, complete shape. Raises DataError when there are none."""
        source, recipe = dataset.source, self.recipes[id(dataset)]
        entry.rows = len(source)
        good = np.ones(len(source), bool)
        checked = self.workers.check(source, recipe, CHUNK)
        for first, (bad, shapes, found, notes) in self._watch(checked, f"reading {entry.item}", len(source)):
            self.columns |= found
            for number, error in bad.items():
                good[first + number] = False
                self._drop(entry, partial(source.where, first + number), error)
            self._tell(entry, shapes, notes, source, first)
        entry.usable = int(good.sum())
        entry.files = list(source.notes)
        self._require_some(entry, entry.usable)
        return np.flatnonzero(good)

    def _encode(
        self, dataset: Dataset, entry: DatasetReport, usable: np.ndarray, chosen: np.ndarray, writer: RowWriter
    ) -> np.ndarray:
        """Tokenize the chosen rows (indices into `usable`), each once; returns their sample numbers in the chosen order."""
        source, recipe = dataset.source, self.recipes[id(dataset)]
        needed = np.unique(chosen)
        first_sample = np.zeros(len(needed) + 1, np.int64)
        first_sample[0] = done = len(writer)
        encoded = self.workers.encode(source, usable[needed], recipe, CHUNK)
        for first, encoding in self._watch(encoded, f"tokenizing {entry.item}", len(needed)):
            self._add(entry, encoding, writer, source, usable[needed[first : first + len(encoding.counts)]])
            for number, count in enumerate(encoding.counts):
                done += count
                first_sample[first + number + 1] = done
        at = np.searchsorted(needed, chosen)
        counts = (first_sample[at + 1] - first_sample[at]).astype(np.int64)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.repeat(first_sample[at], counts) + within
        self._count(entry, writer, order)
        return order

    def _add(self, entry: DatasetReport, encoding: Encoding, writer: RowWriter, source: Any, rows: np.ndarray) -> None:
        """Write the samples of these rows of a source, and count the rows that gave none."""
        self.table.judge(encoding, lambda row: source.where(int(rows[row])))
        writer.add(encoding.ids, encoding.kept, encoding.sizes, encoding.weights, encoding.desirable, encoding.values)
        self.columns |= encoding.found
        entry.unsupervised_turns += encoding.unsupervised
        entry.seen.add(encoding.seen)
        entry.weighted += encoding.weighted[0]
        entry.weight += encoding.weighted[1]
        for token, count in encoding.control.items():
            entry.control_tokens[token] = entry.control_tokens.get(token, 0) + count
        for number, count in encoding.cut.items():
            entry.cut.add(partial(source.where, int(rows[number])), f"{count:,} message{'s' * (count > 1)}")
        for number, error in encoding.bad.items():
            self._drop(entry, partial(source.where, int(rows[number])), error)
        for number, size in encoding.long.items():
            entry.too_long.add(partial(source.where, int(rows[number])), f"{size:,} tokens" if size > 0 else "")

    def _tell(self, entry: DatasetReport, shapes: Counter[str], notes: list[Note], source: Any, first: int) -> None:
        """Count the shapes of usable rows, and what is to be told of them; `first` is the number of the first row."""
        for shape, count in shapes.items():
            entry.shapes[shape] = entry.shapes.get(shape, 0) + count
        for number, text, detail in notes:
            entry.notes.setdefault(text, Dropped()).add(partial(source.where, first + number), detail)

    def _watch(self, chunks: Iterator[tuple[int, T]], what: str, total: int) -> Iterator[tuple[int, T]]:
        """Show how far a long pass over rows has come."""
        line = LiveLine()
        for first, chunk in chunks:
            if total >= SHOW_PROGRESS:
                line.show(f"{what}: {first:,} of {total:,} rows")
            yield first, chunk
        line.close()

    def _count(self, entry: DatasetReport, writer: RowWriter, order: np.ndarray) -> None:
        entry.samples += len(order)
        entry.tokens += int(writer.sizes[order].sum())
        entry.supervised += int(writer.supervised[order].sum())

    def _finish(self, writers: dict[str, RowWriter], orders: dict[str, list[np.ndarray]], packing: bool) -> None:
        report = self.report
        for part, writer in writers.items():
            order = np.concatenate(orders[part]) if orders[part] else np.zeros(0, np.int64)
            sizes = writer.sizes[order]
            bounds, capacity = None, self.args.max_length * self.answers
            if packing and len(order):
                examples = order.reshape(-1, self.answers)
                packs = pack(sizes.reshape(-1, self.answers).sum(axis=1), capacity)
                order = examples[np.concatenate([np.array(group) for group in packs])].reshape(-1)
                bounds = np.concatenate([[0], np.cumsum([len(group) * self.answers for group in packs])])
            rows = len(order) // self.answers if bounds is None else len(bounds) - 1
            writer.finish(order, bounds, self.answers, self.mismatched)
            if part == "train":
                report.train_rows, report.train_samples = rows, len(order)
                report.longest = int(sizes.max()) if len(sizes) else 0
                report.fill = float(sizes.sum() / (rows * capacity)) if packing and rows else None
            else:
                report.val_rows = rows
        if not report.train_rows:
            for entry in report.datasets:
                self._require_some(entry, entry.samples)

    def _require_columns(self) -> None:
        """Raise UserError for a column of --columns that no row of any dataset has: a slip would change what rows mean.

        Where one has no usable row, what was read so far is judged: the slip is why.
        """
        asked = frozenset[str]().union(*(recipe.asked for recipe in self.recipes.values()))
        if missing := sorted(asked - self.columns):
            shapes = ", ".join(sorted({shape for entry in self.report.datasets for shape in entry.shapes}))
            raise UserError(
                f"no row has the column {', '.join(map(repr, missing))}; rows were read as: {shapes or 'nothing'}.",
                where="--columns",
                fix="write the names as they stand in the data",
            )

    def _drop(self, entry: DatasetReport, place: Callable[[], str], error: BadRow) -> None:
        refuse_encoding(error, place())
        if self.args.strict:
            raise DataError(f"bad row: {error}.", where=place(), fix="mend it, or leave --strict out to skip such rows")
        entry.drop(error.reason, place, error.detail)

    def _require_some(self, entry: DatasetReport, count: int) -> None:
        if count:
            return
        if entry.rows:
            self._require_columns()
        reasons = [f"{item.count:,} x {reason}, first at {item.places[0]}" for reason, item in entry.dropped.items()]
        if entry.too_long.count:
            reasons.append(f"{entry.too_long.count:,} x longer than --max_length {self.args.max_length}")
        why = "; ".join(reasons) if entry.rows else "it is empty"
        raise DataError(
            f"dataset {entry.item} has no usable row: {why}.",
            where=entry.place,
            fix="mend the rows, name their columns with --columns, or raise --max_length" if entry.rows else "check the path",
        )
