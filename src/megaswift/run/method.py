"""What a run trains: all weights, or an adapter beside them; worked out of the options, and compared with a run's own."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from megaswift.config.options import SftArguments
from megaswift.config.training import AdapterArguments
from megaswift.errors import UserError
from megaswift.models import family_of, parameters_of
from megaswift.models.adapters import Lora, saved_modules, target_modules
from megaswift.models.family import is_tied
from megaswift.models.stages import stage_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.parameters import Parameter

LORA = "lora"
LORA_LEARNING_RATE = 1e-4  # ms-swift's, ten times that of full training
# Options of adapters alone, and all that say what a run trains.
ADAPTER_OPTIONS = tuple(item.name for item in fields(AdapterArguments) if item.name != "seed")
METHOD_OPTIONS = ("sft_type", *(name for name in ADAPTER_OPTIONS if name != "adapters"))


def with_method_defaults(args: SftArguments) -> SftArguments:
    """Options with the defaults of what is trained. Raises UserError for those that mean nothing to it."""
    if args.sft_type == LORA:
        given = "learning_rate" in args.explicit()
        return args if given else args.changed(learning_rate=LORA_LEARNING_RATE)
    meaningless = sorted(args.explicit() & set(ADAPTER_OPTIONS))
    if meaningless:
        raise UserError(
            f"--{meaningless[0]} belongs to adapters, and this run trains all weights.",
            where=f"--{meaningless[0]}",
            fix="add --sft_type lora, or leave it out",
        )
    return args


def adapter_of(args: SftArguments, config: PreTrainedConfig) -> Lora | None:
    """The adapter that the options ask for; None where all weights are trained. Raises UserError for what cannot be."""
    if args.sft_type != LORA:
        return None
    base, tied = parameters_of(config), is_tied(config)
    if args.new_special_tokens:
        raise UserError(
            "new tokens need rows of the embedding, which an adapter leaves as it is.",
            where="--new_special_tokens",
            fix="leave it out, or train all weights: --sft_type full",
        )
    if not args.target_modules:
        raise UserError("no module is named.", where="--target_modules", fix="leave it out for all-linear")
    lora = Lora(
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=target_modules(base, args.target_modules),
        saved=saved_modules(base, args.modules_to_save, tied),
        rslora=args.use_rslora,
        init=args.init_weights,
        lr_ratio=args.lora_plus_lr_ratio,
    )
    _require_work_everywhere(lora, config, args.pp)
    return lora


def _require_work_everywhere(lora: Lora, config: PreTrainedConfig, pp: int) -> None:
    """Raise UserError where a pipeline stage would have nothing to train."""
    layers = {int(p.name.split(".")[2]) for p in parameters_of_adapter(lora, config) if p.name.startswith("decoder.layers.")}
    first = 0
    for stage, count in enumerate(stage_layers(config, pp)):
        if not layers & set(range(first, first + count)):
            raise UserError(
                f"stage {stage + 1} of --pp {pp}, layers {first} to {first + count - 1}, has nothing to train.",
                where="--pp, --target_modules",
                fix="use --pp 1, or name modules of these layers too",
            )
        first += count


def parameters_of_adapter(lora: Lora, config: PreTrainedConfig) -> list[Parameter]:
    """All that is trained and saved of a model with an adapter."""
    return lora.parameters(family_of(config.model_type), config)


def trainable_count(lora: Lora | None, config: PreTrainedConfig) -> int:
    """How many values are trained."""
    parameters = parameters_of(config) if lora is None else parameters_of_adapter(lora, config)
    return sum(parameter.size for parameter in parameters)


def trainable_of_rank(lora: Lora, config: PreTrainedConfig, pp: int, tp: int) -> int:
    """How many values the fullest rank trains."""
    stage_of = [stage for stage, count in enumerate(stage_layers(config, pp)) for _ in range(count)]
    sizes = [0] * pp
    for parameter in parameters_of_adapter(lora, config):
        own = parameter.size // (1 if parameter.arrangement.split is None else tp)
        layered = parameter.name.startswith("decoder.layers.")
        stage = stage_of[int(parameter.name.split(".")[2])] if layered else 0 if parameter.name.startswith("embedding.") else -1
        sizes[stage] += own
    return max(sizes)


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
