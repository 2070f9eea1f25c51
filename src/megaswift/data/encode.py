"""From `--dataset` to tokenized rows in the cache: runs once, before any rank starts.

data = prepare(args, template, cache_dir=cache_root())
data.train.path                       # ranks: TokenRows.open(path)
"""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from megaswift.arguments import DataArguments
from megaswift.cache import published
from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import BadRow
from megaswift.data.packing import pack
from megaswift.data.pipeline import Pipeline, Recipe
from megaswift.data.report import DataReport, DatasetReport, stretches
from megaswift.data.resolve import Dataset, resolve
from megaswift.data.sampling import sample_validation, split_and_sample
from megaswift.data.spec import parse_specs
from megaswift.data.store import RowWriter, TokenRows
from megaswift.data.workers import Workers
from megaswift.errors import DataError, UserError
from megaswift.terminal import LiveLine

T = TypeVar("T")

CHUNK = 512  # rows of one unit of work
SHOW_PROGRESS = 20_000  # rows from which on progress is shown


@dataclass
class PreparedData:
    """Training rows, validation rows (None when there are none) and what became of every row."""

    train: TokenRows
    val: TokenRows | None
    report: DataReport


def prepare(
    args: DataArguments, template: ChatTemplate, *, cache_dir: Path, packing: bool = False, processes: int | None = None
) -> PreparedData:
    """Read, check, sample, tokenize, cut and pack the data of a run, or take it from the cache.

    Args:
        args: dataset, val_dataset and the options that say how rows are read, drawn and cut.
        template: the chat template, with its tokenizer.
        cache_dir: directory of the cache; rows go to data/<digest of everything that matters> in it.
        packing: join samples into rows of up to max_length tokens.
        processes: worker processes; default: one a core when there is enough to do.

    Raises:
        UserError: an option, a name or a count that cannot work.
        DataError: a file that cannot be read, a bad row with --strict true, or no usable row at all.
    """
    _check(args, packing)
    started = time.monotonic()
    train = [resolve(spec, args.custom_dataset_info) for spec in parse_specs(args.dataset)]
    val = [resolve(spec, args.custom_dataset_info) for spec in parse_specs(args.val_dataset)]
    if sum(item.self_cognition for item in train) > 1:
        raise UserError(
            "self-cognition is given more than once.", where="--dataset", fix="give it once, with #N for the number of rows"
        )
    recipes = {id(item): recipe_of(item, args) for item in train + val}
    target = cache_dir / "data" / _key(args, template, packing, train, val)
    if args.data_cache and (target / "report.json").is_file():
        return _open(target, from_cache=True)
    if not args.data_cache:
        target = target.with_name(f"{target.name}-{uuid.uuid4().hex[:8]}")
        atexit.register(shutil.rmtree, target, ignore_errors=True)
    report = DataReport(template.name, args.max_length, args.truncation_strategy, packing)
    pipeline = Pipeline(template, args.max_length, args.truncation_strategy)
    rows = sum(len(item.source) for item in train + val)
    with published(target) as directory, Workers(pipeline, rows, processes) as workers:
        build = _Build(args, recipes, report, workers)
        build.run(directory, train, val, packing)
        report.seconds = round(time.monotonic() - started, 3)
        report.example = stretches(template, TokenRows.open(directory / "train").samples(0)[0])
        (directory / "report.json").write_text(json.dumps(report.to_dict(), ensure_ascii=False), encoding="utf-8")
    return _open(target, from_cache=False)


def recipe_of(dataset: Dataset, args: DataArguments) -> Recipe:
    """How the rows of a dataset are read under these options. Raises UserError for wrong --columns or missing names."""
    columns = dict(dataset.columns)
    if args.columns:
        try:
            own = json.loads(args.columns)
        except ValueError as error:
            raise UserError(
                f"not valid JSON: {error}.", where="--columns", fix='--columns \'{"prompt_text": "query"}\''
            ) from error
        if not isinstance(own, dict) or not all(isinstance(value, str) for value in own.values()):
            raise UserError(
                "expected an object from column to name.", where="--columns", fix='--columns \'{"prompt_text": "query"}\''
            )
        columns |= own
    names = (_pair(args.model_name, "model_name"), _pair(args.model_author, "model_author")) if dataset.self_cognition else None
    return Recipe(columns, dataset.converter, names)


class _Build:
    """One pass over all datasets into a new cache directory."""

    def __init__(self, args: DataArguments, recipes: dict[int, Recipe], report: DataReport, workers: Workers) -> None:
        self.args, self.recipes, self.report, self.workers = args, recipes, report, workers
        self.seed = args.seed if args.dataset_seed is None else args.dataset_seed

    def run(self, directory: Path, train: list[Dataset], val: list[Dataset], packing: bool) -> None:
        writers = {"train": RowWriter(directory / "train"), "val": RowWriter(directory / "val")}
        orders: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        ratio = 0.0 if val else self.args.dataset_test_ratio
        for dataset, own in [(item, True) for item in train] + [(item, False) for item in val]:
            entry = DatasetReport(dataset.spec.text, dataset.place, len(dataset.source), asked=dataset.spec.count)
            self.report.datasets.append(entry)
            usable = self._usable(dataset, entry)
            if own:
                picks = dict(
                    zip(("train", "val"), split_and_sample(len(usable), dataset.spec.count, ratio, self.seed), strict=True)
                )
                entry.train, entry.val = len(picks["train"]), len(picks["val"])
                entry.repeated = entry.train - len(np.unique(picks["train"]))
            else:
                picks = {"val": sample_validation(len(usable), dataset.spec.count, self.seed, dataset.spec.text)}
                entry.val = len(picks["val"])
            for part, chosen in picks.items():
                order = self._encode(dataset, entry, usable, chosen, writers[part])
                orders[part].append(order)
                self._count(entry, writers[part], order)
        self._finish(writers, orders, packing)

    def _usable(self, dataset: Dataset, entry: DatasetReport) -> np.ndarray:
        """Indices of the rows of a recognised, complete shape. Raises DataError when there are none."""
        source, recipe = dataset.source, self.recipes[id(dataset)]
        good = np.ones(len(source), bool)
        checked = self.workers.check(source, recipe, CHUNK)
        for first, (bad, shapes) in self._watch(checked, f"reading {entry.item}", len(source)):
            for number, error in bad.items():
                good[first + number] = False
                self._drop(entry, partial(source.where, first + number), error)
            for shape, count in shapes.items():
                entry.shapes[shape] = entry.shapes.get(shape, 0) + count
        entry.usable = int(good.sum())
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
            writer.add(encoding.ids, encoding.kept, encoding.sizes)
            for number, count in enumerate(encoding.counts):
                done += count
                first_sample[first + number + 1] = done
            entry.unsupervised_turns += encoding.unsupervised
            for number, error in encoding.bad.items():
                self._drop(entry, partial(source.where, int(usable[needed[first + number]])), error)
            for number, size in encoding.long.items():
                place = partial(source.where, int(usable[needed[first + number]]))
                entry.too_long.add(place, f"{size:,} tokens" if size > 0 else "")
        at = np.searchsorted(needed, chosen)
        counts = (first_sample[at + 1] - first_sample[at]).astype(np.int64)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(first_sample[at], counts) + within

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
            bounds = None
            if packing and len(order):
                packs = pack(sizes, self.args.max_length)
                order = order[np.concatenate([np.array(group) for group in packs])]
                bounds = np.concatenate([[0], np.cumsum([len(group) for group in packs])])
            rows = len(order) if bounds is None else len(bounds) - 1
            writer.finish(order, bounds)
            if part == "train":
                report.train_rows, report.train_samples = rows, len(order)
                report.longest = int(sizes.max()) if len(sizes) else 0
                report.fill = float(sizes.sum() / (rows * self.args.max_length)) if packing and rows else None
            else:
                report.val_rows = rows
        if not report.train_rows:
            for entry in report.datasets:
                self._require_some(entry, entry.samples)

    def _drop(self, entry: DatasetReport, place: Callable[[], str], error: BadRow) -> None:
        if self.args.strict:
            raise DataError(f"bad row: {error}.", where=place(), fix="mend it, or leave --strict out to skip such rows")
        entry.drop(error.reason, place, error.detail)

    def _require_some(self, entry: DatasetReport, count: int) -> None:
        if count:
            return
        reasons = [f"{item.count:,} x {reason}, first at {item.places[0]}" for reason, item in entry.dropped.items()]
        if entry.too_long.count:
            reasons.append(f"{entry.too_long.count:,} x longer than --max_length {self.args.max_length}")
        why = "; ".join(reasons) if entry.rows else "it is empty"
        raise DataError(
            f"dataset {entry.item} has no usable row: {why}.",
            where=entry.place,
            fix="mend the rows, name their columns with --columns, or raise --max_length" if entry.rows else "check the path",
        )


def _check(args: DataArguments, packing: bool) -> None:
    if not args.dataset:
        raise UserError(
            "no training data is given.",
            where="--dataset",
            fix="for example --dataset self-cognition#160 or --dataset rows.jsonl",
        )
    if not 0 <= args.dataset_test_ratio < 1:
        raise UserError(
            f"{args.dataset_test_ratio} is no share of the rows.",
            where="--dataset_test_ratio",
            fix="use a number from 0 up to, not including, 1",
        )
    if args.max_length != -1 and args.max_length < 2:
        raise UserError(
            f"{args.max_length} is no length in tokens.",
            where="--max_length",
            fix="use a whole number above 1, or -1 for no limit",
        )
    if packing and args.max_length == -1:
        raise UserError("packing needs a length to fill.", where="--packing", fix="set --max_length")


def _pair(values: list[str], option: str) -> tuple[str, str]:
    if not values:
        raise UserError(
            "self-cognition needs the model's name and author.",
            where=f"--{option}",
            fix="for example --model_name 小黄 'Xiao Huang' --model_author 魔搭 ModelScope",
        )
    if len(values) > 2:
        raise UserError(
            f"{len(values)} values given, expected one, or two: Chinese and English.",
            where=f"--{option}",
            fix="put a name with spaces in quotes",
        )
    return values[0], values[-1]


def _key(args: DataArguments, template: ChatTemplate, packing: bool, train: list[Dataset], val: list[Dataset]) -> str:
    """A digest of everything that the result depends on, this package's own source included."""
    state = template.state | {"tokenizer": hashlib.sha256(template.state["tokenizer"].encode()).hexdigest()}
    options = {
        name: getattr(args, name)
        for name in (
            "dataset_test_ratio",
            "max_length",
            "truncation_strategy",
            "columns",
            "strict",
            "model_name",
            "model_author",
        )
    }
    options["seed"] = args.seed if args.dataset_seed is None else args.dataset_seed
    today = date.today().isoformat() if "strftime_now" in state["source"] else ""
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(__file__).parent.glob("*.py"))]
    data = (
        [[item.spec.text, item.digest, item.columns, item.converter] for item in train],
        [[item.spec.text, item.digest, item.columns, item.converter] for item in val],
    )
    text = json.dumps([state, options, packing, data, today, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _open(target: Path, from_cache: bool) -> PreparedData:
    try:
        report = DataReport.from_dict(json.loads((target / "report.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the tokenized data cannot be read: {error}.", where=str(target), fix="delete this directory; it is made again"
        ) from error
    report.from_cache = from_cache
    val = TokenRows.open(target / "val")
    return PreparedData(TokenRows.open(target / "train"), val if len(val) else None, report)
