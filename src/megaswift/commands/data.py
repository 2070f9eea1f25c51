"""`swift data`: what training would read, shown without a model in memory.

swift data --model_type smollm2-135m-instruct --dataset rows.jsonl#500 --output page/
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megaswift.config.options import InspectArguments, SftArguments, parse
from megaswift.data.chat import ChatTemplate
from megaswift.data.encode import prepare
from megaswift.data.loss_rules import LossRules
from megaswift.data.packing import pack
from megaswift.data.page import write_page
from megaswift.data.report import print_example, print_report, stretches
from megaswift.errors import UserError
from megaswift.hub.locate import locate
from megaswift.launch.agent import cluster
from megaswift.models.registry import MODEL_TYPES
from megaswift.models.whole import require_language_model_only
from megaswift.run.head import head_contradictions, with_head
from megaswift.run.memory import parameter_count, trained_parameters
from megaswift.run.method import adapter_of, frozen_parameters, with_method_defaults
from megaswift.run.problems import refuse, usable_length
from megaswift.run.setup import picture_marks, preferences_of, streamed_rows
from megaswift.store.cache import cache_root
from megaswift.store.paths import gguf_fix, is_megatron_directory
from megaswift.terminal import console, say
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.new_tokens import listed_tokens, with_new_tokens
from megaswift.weights.hf.tokenizer import read_tokenizer, require_embedding_rows, table_rows

if TYPE_CHECKING:
    from rich.console import Console

    from megaswift.data.chat import ChatTemplate
    from megaswift.data.encode import PreparedData
    from megaswift.data.store import TokenRows

BINS = 16


@dataclass(frozen=True)
class Inspection:
    """What is known about the training data beyond its report.

    Attributes:
        sizes: tokens of each sample, repeats included.
        duplicates: samples whose tokens equal those of an earlier one; repeats by #N do not count.
        fill: share of max_length that packs would use; None without a limit.
        padding: share of padded tokens in random micro batches of batch_size rows, 0 when they are laid end to end.
        shown: samples as (text, weight in the loss) stretches; titles: what each is called.
        beside: lengths of chosen and of rejected answers with their questions, pair by pair; None where rows are no pairs.
    """

    data: PreparedData
    sizes: np.ndarray
    duplicates: int
    fill: float | None
    padding: float
    shown: list[list[tuple[str, float]]]
    titles: list[str]
    beside: np.ndarray | None = None


def data_main(args: InspectArguments | list[str]) -> Inspection:
    """Read, check and tokenize the data as `swift sft` does, and show what comes out."""
    if isinstance(args, list):
        args = parse(InspectArguments, args)
    directory, tokens = model_directory(args), listed_tokens(args.new_special_tokens)
    if (grown := with_new_tokens(directory, tokens)) is not None:
        say(grown.note())
        directory = grown.directory
    refuse(head_contradictions(args))
    directory, config, _ = with_head(args, directory, load_config(directory))
    args = with_method_defaults(args).changed(
        max_length=usable_length(config, args.max_length, "max_length" in args.explicit())
    )
    template, table = template_of_folder(args, directory), table_rows(directory)
    rows = streamed_rows(args, cluster().world_size) if args.streaming else None
    data = prepare(
        args,
        template,
        cache_dir=cache_root(),
        packing=args.packing,
        stream_rows=rows,
        table=table,
        preferences=preferences_of(args),
    )
    require_embedding_rows(template.vocabulary, table, directory)
    inspection = inspect(data, template, args)
    lines = [*facts(inspection, args.max_length, args.batch_size), trained(args, config)]
    _print(inspection, lines, console())
    if args.output:
        say(f"page: {write_page(Path(args.output).expanduser(), data.report, inspection, lines)}")
    return inspection


def inspect(data: PreparedData, template: ChatTemplate, args: InspectArguments) -> Inspection:
    """Lengths, duplicates, fill rate and examples of prepared data."""
    rows = data.train
    sizes = rows.sizes
    fill = data.report.fill
    if fill is None and args.max_length > 0:
        examples, capacity = sizes.reshape(-1, rows.answers).sum(axis=1), args.max_length * rows.answers
        fill = float(sizes.sum() / (len(pack(examples, capacity)) * capacity))
    random = np.random.default_rng(args.seed)
    examples = rows.count_stored // rows.answers
    drawn = sorted(random.choice(examples, min(args.examples, examples), replace=False).tolist())
    chosen = [number * rows.answers + part for number in drawn for part in range(rows.answers)]
    shown = [stretches(template, rows.stored(number)) for number in chosen]
    beside = sizes.reshape(-1, 2) if rows.answers == 2 else None
    return Inspection(
        data,
        sizes,
        _duplicates(rows),
        fill,
        _padding(sizes, args.batch_size * rows.answers, random),
        shown,
        _titles(rows, chosen),
        beside,
    )


def _titles(rows: TokenRows, chosen: list[int]) -> list[str]:
    """What samples, by their numbers on disk, are called."""
    if rows.answers == 2:
        return [f"Pair {place // 2 + 1}, {'rejected' if number % 2 else 'chosen'}" for place, number in enumerate(chosen)]
    good = ("undesirable", "desirable")
    return [
        f"Sample {place}" + (f", {good[rows.is_desirable(number)]}" if rows.has_preferences else "")
        for place, number in enumerate(chosen, 1)
    ]


def histogram(sizes: np.ndarray) -> list[tuple[int, int, int]]:
    """(first length, last length, samples) of about BINS equal ranges."""
    longest = int(sizes.max())
    width = max(-(-longest // BINS), 1)
    counts = np.bincount((sizes - 1) // width, minlength=-(-longest // width))
    return [(k * width + 1, (k + 1) * width, int(count)) for k, count in enumerate(counts)]


def template_of_folder(args: SftArguments, directory: Path) -> ChatTemplate:
    """The chat template by which rows are read for the model of a folder."""
    entry = MODEL_TYPES.get(args.model_type or "")
    tokenizer, config = read_tokenizer(directory), load_config(directory)
    require_language_model_only(config, args.language_model_only, str(directory / "config.json"))
    return ChatTemplate(
        tokenizer,
        args.template_type,
        args.system,
        fallback=entry.template if entry else None,
        date=args.template_date or date.today().isoformat(),
        loss=LossRules.parse(args.loss_scale),
        pictures=picture_marks(tokenizer, config),
    )


def model_directory(args: SftArguments) -> Path:
    """Where the tokenizer is: the Megatron directory that training would start from, else the model's own."""
    start = Path(args.resume_from_checkpoint or f"{args.model_type}-tp{args.tp}-pp{args.pp}").expanduser()
    if is_megatron_directory(start):
        return start
    if args.resume_from_checkpoint:
        raise UserError(
            f"{start} is not a directory of Megatron weights.",
            where="--resume_from_checkpoint",
            fix=gguf_fix(start) or "give --model_type or --model_id_or_path instead",
        )
    return locate(args.model_type, args.model_id_or_path, args.model_revision).path


def _duplicates(rows: TokenRows) -> int:
    seen = {hashlib.blake2b(rows.stored(number).ids.tobytes(), digest_size=12).digest() for number in range(rows.count_stored)}
    return rows.count_stored - len(seen)


def _padding(sizes: np.ndarray, batch_size: int, random: np.random.Generator) -> float:
    """Share of padding if rows were padded to the longest of their micro batch, in random order."""
    count = len(sizes) // batch_size * batch_size
    if not count:
        return 0.0
    batches = random.permutation(sizes)[:count].reshape(-1, batch_size)
    return 1 - float(batches.sum() / (batches.max(axis=1).sum() * batch_size))


def _print(inspection: Inspection, lines: list[str], console: Console) -> None:
    report = inspection.data.report
    print_report(report, console, example=False)
    bars = histogram(inspection.sizes)
    most = max(count for _, _, count in bars)
    console.print("\nlength in tokens, samples", markup=False)
    for first, last, count in bars:
        console.print(f"{first:>7,} to {last:>6,} {'#' * -(-40 * count // most):40} {count:,}", markup=False, highlight=False)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    for title, example in zip(inspection.titles, inspection.shown, strict=True):
        console.print()
        print_example(example, console, title)


def trained(args: InspectArguments, config: Any) -> str:
    """What a run with these options would train, of how much. Raises UserError for what it would refuse."""
    lora, frozen = adapter_of(args, config), frozen_parameters(args, config)
    whole, own = parameter_count(config), sum(parameter.size for parameter in trained_parameters(lora, frozen, config))
    if lora is not None:
        return f"trained: {own:,} parameters of a LoRA adapter beside {whole:,} frozen ones"
    return f"trained: {own:,} of {whole:,} parameters"


def facts(inspection: Inspection, max_length: int, batch_size: int) -> list[str]:
    """The figures below the histogram, one a line."""
    report, sizes = inspection.data.report, inspection.sizes
    middle, high = np.percentile(sizes, [50, 95])
    lines = [
        f"length: median {middle:,.0f}, 95 % up to {high:,.0f}, longest {int(sizes.max()):,} tokens",
        f"supervised: {report.supervised / max(report.tokens, 1):.1%} of {report.tokens:,} tokens",
        f"duplicates: {inspection.duplicates:,} samples equal an earlier one",
    ]
    if inspection.beside is not None:
        lines.append(_beside(inspection.beside, inspection.data))
    if inspection.fill is not None:
        lines.append(f"packing to {max_length:,} tokens fills {inspection.fill:.1%}")
    if batch_size > 1:
        lines.append(f"padding micro batches of {batch_size} to their longest row would waste {inspection.padding:.1%}")
    seen = sum(item.seen.rows for item in report.datasets)
    if seen and not any(item.seen.other or item.seen.endless for item in report.datasets):
        lines.append(f"inference: {seen:,} rows looked at begin as the prompt of their last answer, and learn to end it")
    return lines


def _beside(sizes: np.ndarray, data: PreparedData) -> str:
    """How long the two answers of pairs are beside each other: what is always the longer one may be learnt in place of what is better."""
    longer, equal = (sizes[:, 0] > sizes[:, 1]).mean(), (sizes[:, 0] == sizes[:, 1]).mean()
    asked = sum(entry.count for item in data.report.datasets for entry in item.dropped.values())
    return (
        f"pairs: {len(sizes):,}; the chosen answer is the longer one in {longer:.1%}, both are as long in {equal:.1%}; "
        f"mean {sizes[:, 0].mean():,.1f} and {sizes[:, 1].mean():,.1f} tokens with the question; {asked:,} rows were dropped"
    )
