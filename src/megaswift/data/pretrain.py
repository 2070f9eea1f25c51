"""From `--dataset` to full rows of text: documents become tokens once, in bounded memory; what is cut of them is a small plan.

data = prepare_text(args, tokens, cache_dir=cache_root())
data.train.path                       # ranks: open_rows(path)
"""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.config.options import PtArguments
from megaswift.data import hubs
from megaswift.data.blend import parse_weighted, shares
from megaswift.data.conversation import BadRow
from megaswift.data.documents import BLOCK, Documents, DocumentWriter, write_in_place
from megaswift.data.encode import PreparedData, recipe_of
from megaswift.data.encoding import refuse_encoding
from megaswift.data.indexed import Indexed, open_indexed, prefix_of
from megaswift.data.pipeline import Recipe
from megaswift.data.read import files_of
from megaswift.data.report import DataReport, DatasetReport, dataset_report, stretches
from megaswift.data.resolve import Dataset, find
from megaswift.data.spec import DatasetSpec
from megaswift.data.stream import Stream
from megaswift.data.tables import Raw
from megaswift.data.text import TextEncoding, TextPipeline, TextTokens
from megaswift.data.text_rows import Span, TextPlan, TextRows
from megaswift.data.tokens import joined
from megaswift.data.workers import ENOUGH, Workers
from megaswift.errors import DataError, UserError
from megaswift.store.cache import published
from megaswift.terminal import LiveLine
from megaswift.weights.hf.tokenizer import no_rows

CHUNK_BYTES, CHUNK_ROWS = 1 << 20, 512  # of one unit of work
SEVERAL = 8 << 20  # bytes of text above which forked workers pay for their start
SHOW_EVERY = 1.0  # seconds between two lines of progress
SHOWN = 256  # tokens of the example
NO_TEXT = "no usable text"


@dataclass(frozen=True)
class _Item:
    """One item of `--dataset`: rows to tokenize, or a pair of indexed files; and its weight in a blend."""

    spec: DatasetSpec
    weight: Fraction | None
    dataset: Dataset | None
    prefix: Path | None
    digest: str
    bytes: int  # of its files; 0 where nobody knows

    @property
    def place(self) -> str:
        return str(self.prefix) if self.dataset is None else self.dataset.place


def prepare_text(
    args: PtArguments,
    tokens: TextTokens,
    *,
    cache_dir: Path,
    table: int | None = None,
    processes: int | None = None,
) -> PreparedData:
    """Read, check and tokenize the documents of a run, or take them from the cache; and plan its rows.

    Args:
        args: dataset, val_dataset and the options that say how text is read, blended and cut.
        tokens: the tokenizer.
        cache_dir: documents go to text/<digest of file and tokenizer> in it, plans to data/<digest>.
        table: rows of the model's embedding: a token beyond them is an error; None: not known.
        processes: worker processes; default: one a core when there is enough to do.

    Raises:
        UserError: an option, a name or a weight that cannot work.
        DataError: a file that cannot be read, a bad row with --strict true, a token without a row in the embedding, or too little text.
    """
    started = time.monotonic()
    train = [_found(args, spec, weight) for spec, weight in parse_weighted(args.dataset, args.custom_dataset_info)]
    given = parse_weighted(args.val_dataset, args.custom_dataset_info)
    if any(weight is not None for _, weight in given):
        raise UserError(
            "validation reads all of its data, so weights mean nothing there.", where="--val_dataset", fix="leave them out"
        )
    val = [_found(args, spec, None) for spec, _ in given]
    weights = [item.weight for item in train if item.weight is not None]
    counts = shares(weights) if len(train) > 1 and weights else []
    report = DataReport(tokens.name, args.max_length, "", True, args.parse_special_tokens)
    stores, fresh = [], False
    for item in train + val:
        directory, made = _documents(args, tokens, item, cache_dir, table, processes)
        fresh |= made
        stores.append(Documents.open(directory))
        _require_rows_for(stores[-1], item, tokens, table)
        report.datasets.append(dataset_report(stores[-1].index["report"]))
        report.datasets[-1].item, report.datasets[-1].place = (
            item.spec.text,
            item.place,
        )  # whoever tokenized it may have named it otherwise
    spans = [_spans(args, store, entry, bool(val)) for store, entry in zip(stores[: len(train)], report.datasets)]
    held_out = [span for _, span in spans if span is not None]
    for store, entry in zip(stores[len(train) :], report.datasets[len(train) :]):
        held_out.append(_whole(store))
        entry.train, entry.val = 0, len(store)
    seed = args.seed if args.dataset_seed is None else args.dataset_seed
    parts = tuple((span,) for span, _ in spans) if counts else (tuple(span for span, _ in spans),)
    how: dict[str, Any] = {
        "max_length": args.max_length,
        "separate": args.reset_attention_mask,
        "seed": seed,
        "bos_id": tokens.bos_id,
    }
    plans = {
        "train": TextPlan(parts=parts, counts=tuple(counts) or (1,), shuffled=True, **how),
        "val": TextPlan(parts=(tuple(held_out),), counts=(1,), shuffled=False, **how),
    }
    _require_text(args, plans["train"], [item.spec.text for item in train])
    for (span, _), entry in zip(spans, report.datasets):
        if span.last - span.first < args.max_length:
            entry.files.append(f"it has fewer tokens than one row of {args.max_length:,}, so nothing of it is trained on")
    prepared = _planned(args, cache_dir, plans)
    rows = prepared["train"]
    report.train_rows, report.train_samples = len(rows), sum(entry.train for entry in report.datasets)
    report.val_rows, report.longest = len(prepared["val"]), args.max_length
    report.from_cache, report.seconds = not fresh, round(time.monotonic() - started, 3)
    report.example = stretches(tokens, joined(rows.samples(0)).part(slice(SHOWN)))
    if counts:
        report.blend = [(item.spec.text, count / sum(counts), own) for item, count, own in zip(train, counts, rows.passes)]
    return PreparedData(rows, prepared["val"] if report.val_rows else None, report)


def _found(args: PtArguments, spec: DatasetSpec, weight: Fraction | None) -> _Item:
    """Where the documents of an item are. Nothing is read but names, sizes and times of files."""
    prefix = prefix_of(Path(spec.name).expanduser()) if spec.hub is None else None
    if prefix is not None:
        if spec.count is not None:
            raise UserError(
                "indexed files are taken whole.",
                where=f"--dataset {spec.text}",
                fix="leave #N out; --train_tokens says how much is read",
            )
        pair = [Path(f"{prefix}{end}") for end in (".idx", ".bin")]
        return _Item(spec, weight, None, prefix, _marks(pair), pair[1].stat().st_size)
    found = find(spec, args.custom_dataset_info)
    if found.self_cognition:
        raise UserError(
            "self-cognition holds conversations, and no text.", where=f"--dataset {spec.text}", fix="train them with swift sft"
        )
    if found.path is None:
        source, digest = hubs.load(found.places, found.subsets, found.splits, spec.text)
        return _Item(spec, weight, found.dataset(source, digest), None, digest, 0)
    files = files_of(found.path, found.subsets)
    dataset = found.dataset(Stream(found.path.name, files), "")
    return _Item(spec, weight, dataset, None, _marks(files), sum(file.stat().st_size for file in files))


def _marks(files: list[Path]) -> str:
    """Text that changes when files do; their bytes are not read for it, which would take as long as tokenizing a part of them."""
    return "\n".join(f"{path.absolute()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)


def _documents(
    args: PtArguments, tokens: TextTokens, item: _Item, cache_dir: Path, table: int | None, processes: int | None
) -> tuple[Path, bool]:
    """The directory with the documents of an item, and whether it was made now."""
    target = cache_dir / "text" / _key(args, tokens, item)
    if not args.data_cache:
        target = _for_now(target)
    elif (target / "index.json").is_file():
        return target, False
    with published(target) as directory:
        build = _Build(args, tokens, item, table)
        if item.prefix is not None:
            build.indexed(directory, open_indexed(item.prefix))
        else:
            build.rows(directory, processes)
    return target, True


def _for_now(target: Path) -> Path:
    """A name of its own, for a directory that goes with this process."""
    target = target.with_name(f"{target.name}-{uuid.uuid4().hex[:8]}")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    return target


def _key(args: PtArguments, tokens: TextTokens, item: _Item) -> str:
    """A digest of everything that the tokens follow from, this package's own source included; rows and blends are not among it."""
    options = [args.parse_special_tokens, args.columns, args.strict]
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(__file__).parent.glob("*.py"))]
    data = [item.digest, item.spec.count, *([] if item.dataset is None else [item.dataset.columns, item.dataset.converter])]
    return hashlib.sha256(json.dumps([tokens.state, options, data, code], sort_keys=True).encode()).hexdigest()[:32]


def _entry(item: _Item) -> DatasetReport:
    return DatasetReport(item.spec.text, item.place, asked=item.spec.count)


class _Build:
    """One pass over one item, into a new directory of documents."""

    def __init__(self, args: PtArguments, tokens: TextTokens, item: _Item, table: int | None) -> None:
        self.args, self.tokens, self.item, self.table = args, tokens, item, table
        self.entry, self.columns, self.line, self.shown = _entry(item), set[str](), LiveLine(), time.monotonic()

    def rows(self, path: Path, processes: int | None) -> None:
        """Tokenize all rows, a megabyte at a time, in as many processes as there are cores."""
        dataset = self.item.dataset
        assert dataset is not None
        recipe = recipe_of(dataset, self.args)
        writer = DocumentWriter(path, self.tokens.small)
        enough = ENOUGH if self.item.bytes >= SEVERAL or not self.item.bytes else 0
        pipeline = TextPipeline(self.tokens, self.args.parse_special_tokens)
        try:
            with Workers(pipeline, enough, processes) as workers:
                for encoding in workers.chunks(chunks(_raws(dataset)), recipe):
                    self._add(writer, encoding, dataset)
            self.line.close()
            self._require_columns(recipe)
            self._told(dataset)
            writer.finish({"report": self.entry.to_dict()})
        finally:
            writer.abandon()

    def _add(self, writer: DocumentWriter, encoding: TextEncoding, dataset: Dataset) -> None:
        entry, first = self.entry, self.entry.rows
        self._judge(encoding, dataset, first)
        for number, error in encoding.bad.items():
            self._drop(error, partial(dataset.source.where, first + number))
        writer.add(encoding.ids, encoding.sizes)
        entry.rows += encoding.rows
        entry.usable += len(encoding.kept)
        entry.tokens += len(encoding.ids)
        self.columns |= encoding.found
        for counts, more in ((entry.shapes, encoding.shapes), (entry.control_tokens, encoding.control)):
            for name, count in more.items():
                counts[name] = counts.get(name, 0) + count
        if time.monotonic() - self.shown > SHOW_EVERY:
            self.shown = time.monotonic()
            self.line.show(f"tokenizing {entry.item}: {entry.rows:,} rows, {entry.tokens:,} tokens")

    def _judge(self, encoding: TextEncoding, dataset: Dataset, first: int) -> None:
        """Raise DataError at the first row that has a token beyond the embedding."""
        if self.table is None or encoding.ids.max(initial=-1) < self.table:
            return
        document = int(np.searchsorted(np.cumsum(encoding.sizes), np.argmax(encoding.ids >= self.table), side="right"))
        ids = np.unique(encoding.ids[encoding.ids >= self.table])
        beyond = {self.tokens.decode(ids[k : k + 1]): int(ids[k]) for k in range(len(ids))}
        raise no_rows(beyond, self.table, dataset.source.where(first + encoding.kept[document]), "this row has")

    def _drop(self, error: BadRow, place: Any) -> None:
        refuse_encoding(error, place())
        if self.args.strict:
            raise DataError(f"bad row: {error}.", where=place(), fix="mend it, or leave --strict out to skip such rows")
        self.entry.drop(error.reason, place, error.detail)

    def _require_columns(self, recipe: Recipe) -> None:
        if missing := sorted(recipe.asked - self.columns):
            raise UserError(
                f"no row has the column {', '.join(map(repr, missing))}; text was read from: {', '.join(self.entry.shapes) or 'nothing'}.",
                where="--columns",
                fix="write the names as they stand in the data",
            )

    def _told(self, dataset: Dataset) -> None:
        """Raise DataError where there is no text; note what is not as it was asked for."""
        entry = self.entry
        if not entry.usable:
            reasons = [f"{item.count:,} x {reason}, first at {item.places[0]}" for reason, item in entry.dropped.items()]
            raise DataError(
                f"dataset {entry.item} has {NO_TEXT}: {'; '.join(reasons) or 'it is empty'}.",
                where=entry.place,
                fix='name the column of the text: --columns \'{"NAME": "text"}\'' if reasons else "check the path",
            )
        entry.supervised = entry.tokens
        entry.files = list(dict.fromkeys(dataset.source.notes))
        if entry.asked is not None and entry.rows < entry.asked:
            entry.files.append(f"#{entry.asked} asks for more rows than there are: all are read, once")

    def indexed(self, path: Path, source: Indexed) -> None:
        """Documents of indexed files: where each ends with the end token only their borders are written."""
        offsets, entry = source.offsets, self.entry
        ids = np.memmap(source.tokens, source.dtype, "r") if len(offsets) > 1 else np.zeros(0, source.dtype)
        entry.rows = entry.usable = len(offsets) - 1
        entry.shapes = {"Megatron's indexed files": entry.rows}
        if not entry.rows:
            raise DataError(f"dataset {entry.item} has {NO_TEXT}: it is empty.", where=entry.place, fix="check the path")
        endless = int(sum((ids[part - 1] != self.tokens.eos_id).sum() for part in _blocks(offsets[1:])))
        if not endless:
            entry.tokens = entry.supervised = len(ids)
            write_in_place(path, source.tokens, source.dtype, offsets, {"report": entry.to_dict()})
            return
        entry.files.append(f"{endless:,} of {entry.rows:,} documents do not end with the end token: copied, and given it")
        writer = DocumentWriter(path, self.tokens.small)
        try:
            for first, last in _groups(offsets):
                own = offsets[first : last + 1]
                documents = np.split(np.asarray(ids[own[0] : own[-1]]).astype(np.int32), own[1:-1] - own[0])
                ended = [
                    one if one[-1] == self.tokens.eos_id else np.append(one, np.int32(self.tokens.eos_id)) for one in documents
                ]
                writer.add(np.concatenate(ended), list(map(len, ended)))
            entry.tokens = entry.supervised = writer.tokens
            writer.finish({"report": entry.to_dict()})
        finally:
            writer.abandon()


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    return (values[first : first + BLOCK] for first in range(0, len(values), BLOCK))


def _groups(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first document, the one after the last) of groups of about a block of tokens each."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _raws(dataset: Dataset) -> Iterator[Raw]:
    """The raw rows of a dataset, one after the other; of `#N` the first N."""
    source, count = dataset.source, dataset.spec.count
    if isinstance(source, Stream):
        return source.rows(count)
    size = len(source) if count is None else min(count, len(source))
    return (source.raw(index) for index in range(size))


def chunks(raws: Iterator[Raw]) -> Iterator[list[Raw]]:
    """Rows in groups of about a megabyte of text, so that what waits for a worker is bounded in bytes."""
    group: list[Raw] = []
    size = 0
    for raw in raws:
        group.append(raw)
        size += _size(raw)
        if size >= CHUNK_BYTES or len(group) >= CHUNK_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _size(raw: Raw) -> int:
    if isinstance(raw, dict):
        return sum(len(value) for value in raw.values() if isinstance(value, str))
    return len(raw) if isinstance(raw, (bytes, str)) else 0


def _whole(store: Documents) -> Span:
    return Span(str(store.path), 0, int(store.offsets[-1]))


def _spans(args: PtArguments, store: Documents, entry: DatasetReport, apart: bool) -> tuple[Span, Span | None]:
    """(training, validation) parts of a store: the last documents, whole ones, validate; `apart`: validation data is given."""
    whole, size = _whole(store), args.max_length
    entry.train, entry.val = len(store), 0
    if apart or args.dataset_test_ratio == 0:
        return whole, None
    needed = max(int(whole.last * args.dataset_test_ratio), size)
    document = int(np.searchsorted(store.offsets, whole.last - needed, side="right")) - 1
    border = int(store.offsets[max(document, 0)])
    if border < max(size, whole.last // 2):
        entry.files.append(
            "its last documents would take more than half of it, so none of them validate (--val_dataset names others)"
        )
        return whole, None
    entry.train, entry.val = document, len(store) - document
    return Span(whole.directory, 0, border), Span(whole.directory, border, whole.last)


def _require_text(args: PtArguments, plan: TextPlan, names: list[str]) -> None:
    """Raise DataError where there is not enough text for one row of what must give some."""
    for part, name in zip(plan.parts, names if len(plan.parts) > 1 else [" ".join(names)]):
        found = sum(span.last - span.first for span in part)
        if not any(span.last - span.first >= plan.max_length for span in part):
            raise DataError(
                f"{name} has {found:,} tokens for training, fewer than one row of {plan.max_length:,}.",
                where=f"--dataset {name}",
                fix="lower --max_length, or give more text",
            )


def _require_rows_for(store: Documents, item: _Item, tokens: TextTokens, table: int | None) -> None:
    """Raise DataError where documents that were tokenized before have a token beyond the embedding."""
    if table is not None and store.largest_id >= table:
        token = {tokens.decode(np.array([store.largest_id], np.int32)): store.largest_id}
        raise no_rows(token, table, item.place, "this dataset has")


def _planned(args: PtArguments, cache_dir: Path, plans: dict[str, TextPlan]) -> dict[str, TextRows]:
    """The rows of both plans, whose small files are written unless they are there."""
    text = repr(sorted(plans.items())) + "".join(Documents.open(span.directory).fingerprint for span in _all(plans))
    target = cache_dir / "data" / hashlib.sha256(text.encode()).hexdigest()[:32]
    if not args.data_cache:
        target = _for_now(target)
    if not (target / "val" / "index.json").is_file():
        with published(target) as directory:
            for name, plan in plans.items():
                plan.write(directory / name)
    return {name: _opened(target / name) for name in plans}


def _all(plans: dict[str, TextPlan]) -> list[Span]:
    return [span for plan in plans.values() for part in plan.parts for span in part]


def _opened(path: Path) -> TextRows:
    return TextRows(path, json.loads((path / "index.json").read_text(encoding="utf-8")))
