"""What a run trains: all weights, or an adapter beside them; worked out of the options, and compared with a run's own."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from megaswift.config.options import SftArguments, default_of
from megaswift.config.training import AdapterArguments, FreezeArguments
from megaswift.errors import UserError, nearest
from megaswift.models import family_of, parameters_of
from megaswift.models.adapters import Lora, is_expert, is_router, packable, saved_modules, target_modules
from megaswift.models.family import is_tied
from megaswift.models.head import SCORE, labels_of
from megaswift.models.stages import stage_layers
from megaswift.models.tally import AFTER, BEFORE, Tally, trained_tally

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.parameters import Parameter

A = TypeVar("A", bound=SftArguments)

LORA = "lora"
BLOCK = 64  # values of a row that share a scale in 4 bits
LORA_LEARNING_RATE = 1e-4  # ms-swift's, ten times that of full training
# Options of adapters alone, and all that say what a run trains.
ADAPTER_OPTIONS = tuple(item.name for item in fields(AdapterArguments) if item.name != "seed")
FREEZE_OPTIONS = tuple(item.name for item in fields(FreezeArguments) if item.name != "seed")
METHOD_OPTIONS = ("sft_type", *FREEZE_OPTIONS, *(name for name in ADAPTER_OPTIONS if name != "adapters"))


def with_method_defaults(args: A) -> A:
    """Options with the defaults of what is trained. Raises UserError for those that mean nothing to it."""
    if args.sft_type == LORA:
        freezing = _asked(args, FREEZE_OPTIONS)
        if freezing:
            raise UserError(
                f"--{freezing[0]} is for full training: beside an adapter all weights stay as they are.",
                where=f"--{freezing[0]}",
                fix="leave it out; --modules_to_save names modules that are trained, too",
            )
        given = "learning_rate" in args.explicit()
        return args if given else args.changed(learning_rate=LORA_LEARNING_RATE)
    meaningless = _asked(args, ADAPTER_OPTIONS)
    if meaningless:
        raise UserError(
            f"--{meaningless[0]} belongs to adapters, and this run trains all weights.",
            where=f"--{meaningless[0]}",
            fix="add --sft_type lora, or leave it out",
        )
    return args


def _asked(args: SftArguments, names: tuple[str, ...]) -> list[str]:
    """Which of some options were given another value than their default: a file of options has all of them."""
    defaults = {item.name: default_of(item) for item in fields(args)}
    return sorted(name for name in args.explicit() & set(names) if getattr(args, name) != defaults[name])


def adapter_of(args: SftArguments, config: PreTrainedConfig) -> Lora | None:
    """The adapter that the options ask for; None where all weights are trained. Raises UserError for what cannot be."""
    if args.sft_type != LORA:
        return None
    base, tied = parameters_of(config), is_tied(config)
    head = [] if labels_of(config) is None else [SCORE.removesuffix(".weight")]  # trained whole, as PEFT does for SEQ_CLS
    if args.new_special_tokens:
        raise UserError(
            "new tokens need rows of the embedding, which an adapter leaves as it is.",
            where="--new_special_tokens",
            fix="leave it out, or train all weights: --sft_type full",
        )
    if args.recompute_modules == "mlp":
        raise UserError(
            "beside an adapter the first product of an MLP is not computed again: its low-rank part would have to be, too.",
            where="--recompute_modules",
            fix="leave it out (swiglu); --gradient_checkpointing true recomputes whole layers",
        )
    if args.fp8:
        raise UserError(
            "FP8 products of frozen weights are not proven yet.",
            where="--fp8, --sft_type",
            fix="leave --fp8 out, or --sft_type lora",
        )
    if not args.target_modules:
        raise UserError("no module is named.", where="--target_modules", fix="leave it out for all-linear")
    lora = Lora(
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=target_modules(base, args.target_modules),
        saved=saved_modules(base, [*args.modules_to_save, *head], tied),
        rslora=args.use_rslora,
        init=args.init_weights,
        lr_ratio=args.lora_plus_lr_ratio,
        bits=args.quantization_bit,
        dora=args.use_dora,
        double=args.bnb_4bit_use_double_quant,
    )
    if lora.double and lora.bits != 4:
        raise UserError(
            "scales are held in 8 bits where weights are in 4.",
            where="--bnb_4bit_use_double_quant",
            fix="add --quantization_bit 4, or leave it out",
        )
    if lora.dora and lora.dropout > 0.0:
        raise UserError(
            "with dropout DoRA takes the base's product of dropped inputs, too: twice the work of every layer.",
            where="--use_dora, --lora_dropout",
            fix="add --lora_dropout 0",
        )
    _require_known_with_experts(lora, base)
    if lora.is_part_of_base:
        _require_plain_for_start(lora, base)
    if lora.bits == 4:
        _require_blocks(args, base)
    _require_work(trained_tally(config, lora, ()), config, args.pp, args.vpp)
    return lora


def _require_known_with_experts(lora: Lora, base: list[Parameter]) -> None:
    """Raise UserError for what PEFT cannot do to experts and routers, which it adapts as parameters, not as modules."""
    if not any(is_router(parameter) for parameter in base):
        return
    sites = lora.sites(base)
    routed = [site.base.hf[0].name for site in sites if site.is_expert or site.is_router]
    mlps = [site.base.hf[0].name for site in sites if ".mlp." in site.base.name]
    if routed and lora.dropout > 0.0:
        raise UserError(
            f"PEFT has no dropout for adapters of experts and routers, and {routed[0]} is to have one.",
            where="--lora_dropout, --target_modules",
            fix="add --lora_dropout 0, or --target_modules all-linear, which leaves routed experts and routers as they are",
        )
    if mlps and lora.dora:
        raise UserError(
            f"PEFT has DoRA for attention alone in models with experts, and {mlps[0]} is to have an adapter.",
            where="--use_dora, --target_modules",
            fix="leave --use_dora out, or name the linear layers of attention: --target_modules q_proj k_proj v_proj o_proj",
        )


def _require_plain_for_start(lora: Lora, base: list[Parameter]) -> None:
    """Raise UserError for what an adapter that begins as a part of the base was not proven with."""
    routed = any(site.is_expert or site.is_router for site in lora.sites(base))
    for given, option, why in (
        (
            lora.bits is not None,
            "--quantization_bit",
            f"what is left of a weight would be rounded to {lora.bits} bits, and its first values with it",
        ),
        (lora.dora, "--use_dora", "the lengths of rows are those of the whole weights"),
        (routed, "--target_modules", "PEFT begins adapters of experts and routers in no such way"),
    ):
        if given:
            raise UserError(
                f"--init_weights {lora.init} does not go with {option}: {why}.",
                where=f"--init_weights, {option}",
                fix="leave one of them out",
            )


def _require_blocks(args: SftArguments, base: list[Parameter]) -> None:
    """Raise UserError unless each rank's part of every row is whole blocks of 64, which share a scale."""
    for parameter in packable(base):
        option, parts = ("etp", args.etp) if is_expert(parameter) else ("tp", args.tp)
        columns = parameter.shape[1] // (parts if parameter.arrangement.split == 1 else 1)
        if columns % BLOCK or parameter.shape[1] % BLOCK:
            legal = [size for size in range(1, parts) if parameter.shape[1] % (BLOCK * size) == 0]
            other = "--quantization_bit 8, which has no blocks"
            raise UserError(
                f"4-bit weights are packed in blocks of {BLOCK} along a row; {parameter.name} has rows of {columns} on each rank of --{option} {parts}.",
                where=f"--quantization_bit, --{option}",
                fix=f"use --{option} {' or '.join(map(str, legal))}, or {other}" if legal else f"use {other}, or leave it out",
            )


def frozen_parameters(args: SftArguments, config: PreTrainedConfig) -> list[str]:
    """Names of the model's parameters that stay as they are in full training, in the engine's spelling.

    Raises UserError for options that name nothing, or only some of the weights that are one matrix in the engine, or all.
    """
    asked = (args.freeze_parameters, args.freeze_parameters_regex, args.freeze_parameters_ratio)
    if args.sft_type == LORA or not any(asked):
        if args.trainable_parameters or args.trainable_parameters_regex:
            raise UserError(
                "all weights are trained already.",
                where="--trainable_parameters",
                fix="freeze some first: --freeze_parameters_ratio 1",
            )
        return []
    base = parameters_of(config)
    labels = [label for parameter in base for label in parameter.labels]
    frozen = _matching(labels, args.freeze_parameters, args.freeze_parameters_regex, "freeze_parameters")
    total, seen = sum(parameter.size for parameter in base), 0
    for parameter in base:
        seen += parameter.size
        if seen <= args.freeze_parameters_ratio * total:
            frozen |= set(parameter.labels)
    frozen -= _matching(labels, args.trainable_parameters, args.trainable_parameters_regex, "trainable_parameters")
    found = []
    for parameter in base:
        own = [label for label in parameter.labels if label in frozen]
        if own and len(own) < len(parameter.labels):
            raise UserError(
                f"{own[0]} cannot stay alone: in the engine it is one matrix with {', '.join(set(parameter.labels) - set(own))}.",
                where="--freeze_parameters, --trainable_parameters",
                fix="name all of them, or none",
            )
        if own:
            found.append(parameter.name)
    if len(found) == len(base):
        raise UserError(
            "nothing is left to train.", where="--freeze_parameters", fix="name fewer weights, or --trainable_parameters"
        )
    _require_work(trained_tally(config, None, tuple(found)), config, args.pp, args.vpp)
    return found


def _matching(labels: list[str], prefixes: list[str], expression: str | None, option: str) -> set[str]:
    """Names that begin with one of the prefixes, or in which the expression is found."""
    chosen: set[str] = set()
    for prefix in prefixes:
        matches = {label for label in labels if label.startswith(prefix)}
        if not matches:
            raise UserError(
                f"no weight's name begins with {prefix!r}.", where=f"--{option}", fix=f"nearest: {nearest(prefix, labels)}"
            )
        chosen |= matches
    if expression:
        try:
            matches = {label for label in labels if re.search(expression, label)}
        except re.error as error:
            raise UserError(f"{expression!r} is no regular expression: {error}.", where=f"--{option}_regex") from error
        if not matches:
            raise UserError(
                f"{expression!r} is found in no weight's name.", where=f"--{option}_regex", fix=f"names are like {labels[1]}"
            )
        chosen |= matches
    return chosen


def _require_work(trained: Tally, config: PreTrainedConfig, pp: int, vpp: int) -> None:
    """Raise UserError where a pipeline stage, or a chunk of one, would have nothing to train."""
    layers = {group.layer for group in trained if group.layer >= 0}
    ends = {0 for group in trained if group.layer == BEFORE}
    ends |= {pp * vpp - 1 for group in trained if group.layer == AFTER or group.table}
    first = 0
    for stage, count in enumerate(stage_layers(config, pp, vpp)):
        if stage not in ends and not layers & set(range(first, first + count)):
            raise UserError(
                f"stage {stage + 1} of --pp {pp}{f' x --vpp {vpp}' if vpp > 1 else ''}, layers {first} to {first + count - 1}, "
                "has nothing to train.",
                where="--pp, --target_modules, --freeze_parameters",
                fix="use --pp 1, or let something in these layers be trained",
            )
        first += count


def parameters_of_adapter(lora: Lora, config: PreTrainedConfig) -> list[Parameter]:
    """All that is trained and saved of a model with an adapter."""
    return lora.parameters(family_of(config.model_type), config)


def check_same_method(args: SftArguments, manifest: dict[str, Any], where: str) -> None:
    """Raise UserError where a run trained something else than the options ask for: all weights, or an adapter."""
    kept = manifest.get("adapter") is not None
    if kept == (args.sft_type == LORA):
        return
    before, now = ("an adapter", "all weights") if kept else ("all weights", "an adapter")
    fix = "export it (swift export --ckpt_dir RUN --to_hf true) and begin a new run from that folder"
    raise UserError(
        f"this run trains {before}, and --sft_type {args.sft_type} would train {now}.",
        where=where,
        fix=f"leave --sft_type out to go on; or {fix + (', merged: --merge_lora true' if kept else '')}",
    )


def check_same_frozen(frozen: list[str], manifest: dict[str, Any], where: str) -> None:
    """Raise UserError where a run goes on whose options let other weights stay as they are."""
    kept = manifest.get("frozen") or []
    if set(kept) != set(frozen):
        name = sorted(set(kept) ^ set(frozen))[0]
        was = "stayed as it was" if name in kept else "was trained"
        raise UserError(
            f"in this run {name} {was}, and the options now say otherwise.",
            where=where,
            fix="leave --freeze_parameters and --trainable_parameters out to go on, or begin a new run",
        )


def check_same_adapter(lora: Lora, record: dict[str, Any], where: str) -> None:
    """Raise UserError where options ask for another adapter than the one that the run trains."""
    kept, now = Lora.from_record(record), lora
    changed = [name for name in kept.record() if kept.record()[name] != now.record()[name] and name != "lr_ratio"]
    if changed:
        name = changed[0]
        raise UserError(
            f"this run's adapter has {name} {kept.record()[name]}, not {now.record()[name]}.",
            where=where,
            fix="leave the options of the adapter out to go on, or begin a new run",
        )
