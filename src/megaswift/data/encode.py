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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.config.options import DataArguments, SftArguments
from megaswift.data.build import Build, Table
from megaswift.data.chat import ChatTemplate
from megaswift.data.classes import ClassPipeline
from megaswift.data.labels import Classes
from megaswift.data.pairs import PreferencePipeline
from megaswift.data.pipeline import Pipeline, Recipe
from megaswift.data.places import OPTIONS, Names
from megaswift.data.preference import MARGINS, MISMATCHED, PAIRS
from megaswift.data.report import DataReport, stretches
from megaswift.data.resolve import Dataset, resolve
from megaswift.data.spec import parse_specs
from megaswift.data.store import TokenRows
from megaswift.data.stream import resolve_stream
from megaswift.data.workers import Workers
from megaswift.errors import DataError, UserError
from megaswift.store.cache import published


@dataclass
class PreparedData:
    """Training rows, validation rows (None when there are none) and what became of every row."""

    train: TokenRows
    val: TokenRows | None
    report: DataReport


def prepare(
    args: SftArguments,
    template: ChatTemplate,
    *,
    cache_dir: Path,
    packing: bool = False,
    stream_rows: int | None = None,
    table: int | None = None,
    processes: int | None = None,
    preferences: str | Classes = "",
) -> PreparedData:
    """Read, check, sample, tokenize, cut and pack the data of a run, or take it from the cache.

    Args:
        args: dataset, val_dataset and the options that say how rows are read, drawn and cut.
        template: the chat template, with its tokenizer.
        cache_dir: directory of the cache; rows go to data/<digest of everything that matters> in it.
        packing: join samples into rows of up to max_length tokens.
        stream_rows: read training data only until it gives this many rows (--streaming); None reads all of it.
        table: rows of the model's embedding: a token beyond them is an error, at the first row that uses it; None: not known.
        processes: worker processes; default: one a core when there is enough to do.
        preferences: what rows are taken for, as `data.pairs` names it, or what their labels are; "": what they say themselves.

    Raises:
        UserError: an option, a name or a count that cannot work.
        DataError: a file that cannot be read, a bad row with --strict true, a token without a row in the embedding, or no usable row at all.
    """
    _check(args, packing)
    started = time.monotonic()
    find = resolve if stream_rows is None else resolve_stream
    train = [find(spec, args.custom_dataset_info) for spec in parse_specs(args.dataset)]
    val = [resolve(spec, args.custom_dataset_info) for spec in parse_specs(args.val_dataset)]
    if sum(item.self_cognition for item in train) > 1:
        raise UserError(
            "self-cognition is given more than once.", where="--dataset", fix="give it once, with #N for the number of rows"
        )
    recipes = {id(item): recipe_of(item, args) for item in train + val}
    target = cache_dir / "data" / _key(args, template, [packing, stream_rows, table, str(preferences)], train, val)
    if args.data_cache and (target / "report.json").is_file():
        return _open(target, from_cache=True)
    if not args.data_cache:
        target = target.with_name(f"{target.name}-{uuid.uuid4().hex[:8]}")
        atexit.register(shutil.rmtree, target, ignore_errors=True)
    report = DataReport(template.name, args.max_length, args.truncation_strategy, packing, args.parse_special_tokens)
    how = (template, args.max_length, args.truncation_strategy, args.parse_special_tokens)
    pipeline = Pipeline(*how)
    if isinstance(preferences, Classes):
        pipeline = ClassPipeline(preferences, *how)
    elif preferences:
        pipeline = PreferencePipeline(preferences, *how)
    rows = sum(len(item.source) for item in train + val) if stream_rows is None else stream_rows
    with published(target) as directory, Workers(pipeline, rows, processes) as workers:
        answers = 2 if preferences in (PAIRS, MARGINS, MISMATCHED) else 1
        build = Build(args, recipes, report, workers, Table(template, table), answers, preferences == MISMATCHED)
        build.run(directory, train, val, packing, stream_rows)
        report.seconds = round(time.monotonic() - started, 3)
        report.example = stretches(template, TokenRows.open(directory / "train").samples(0)[0])
        (directory / "report.json").write_text(json.dumps(report.to_dict(), ensure_ascii=False), encoding="utf-8")
    return _open(target, from_cache=False)


def recipe_of(dataset: Dataset, args: DataArguments) -> Recipe:
    """How the rows of a dataset are read under these options. Raises UserError for wrong --columns or missing names."""
    columns, asked = dict(dataset.columns), frozenset[str]()
    if args.columns:
        try:
            own = json.loads(args.columns)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"not valid JSON: {error}.", where="--columns", fix='--columns \'{"prompt_text": "query"}\''
            ) from error
        if not isinstance(own, dict) or not all(isinstance(value, str) for value in own.values()):
            raise UserError(
                "expected an object from column to name.", where="--columns", fix='--columns \'{"prompt_text": "query"}\''
            )
        columns |= own
        asked = frozenset(own)
    given = {place: getattr(args, option) for place, option in OPTIONS.items()}
    names = {place: _pair(given[place], OPTIONS[place]) for place in given if given[place] or dataset.self_cognition}
    return Recipe(columns, asked, dataset.converter, Names(names, told=not dataset.self_cognition))


def _check(args: DataArguments, packing: bool) -> None:
    if not args.dataset:
        raise UserError(
            "no training data is given.",
            where="--dataset",
            fix="for example --dataset self-cognition#160 or --dataset rows.jsonl",
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


def _key(args: SftArguments, template: ChatTemplate, layout: list[Any], train: list[Dataset], val: list[Dataset]) -> str:
    """A digest of everything that the result depends on, this package's own source included."""
    state = template.state | {"tokenizer": hashlib.sha256(template.state["tokenizer"].encode()).hexdigest()}
    options = {
        name: getattr(args, name)
        for name in (
            "dataset_test_ratio",
            "max_length",
            "truncation_strategy",
            "parse_special_tokens",
            "columns",
            "strict",
            "model_name",
            "model_author",
        )
    }
    options["seed"] = args.seed if args.dataset_seed is None else args.dataset_seed
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(__file__).parent.glob("*.py"))]
    data = (
        [[item.spec.text, item.digest, item.columns, item.converter] for item in train],
        [[item.spec.text, item.digest, item.columns, item.converter] for item in val],
    )
    text = json.dumps([state, options, layout, data, code], sort_keys=True)
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
