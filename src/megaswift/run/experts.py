"""What a run with experts must fulfil, told before any process group exists, and which option means nothing without experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megaswift.errors import UserError
from megaswift.models import family_of
from megaswift.models.kinds import Experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.config.options import SftArguments

ROUTER_OPTIONS = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_dtype")


def experts_of(config: PreTrainedConfig) -> Experts | None:
    """The experts of a model's layers; None where it has none."""
    kinds = family_of(config.model_type).layers(config)
    return next((kind.experts for kind in kinds if kind.experts is not None), None)


def check_expert_layout(config: PreTrainedConfig, pp: int, ep: int, etp: int, world_size: int | None = None) -> None:
    """Raise UserError unless the experts can be spread this way; `world_size` None leaves the processes out."""
    experts = experts_of(config)
    if min(ep, etp) < 1:
        raise UserError(f"--ep {ep} and --etp {etp} must be at least 1.", where="--ep, --etp")
    if experts is None:
        for name, value in (("ep", ep), ("etp", etp)):
            if value > 1:
                raise UserError(
                    f"--{name} {value} spreads experts, and a {config.model_type} model has none.",
                    where=f"--{name}",
                    fix=f"leave --{name} out; --tp, --pp, --cp and data parallelism split this model",
                )
        return
    for name, value, size, what in (
        ("ep", ep, experts.count, "experts of each layer"),
        ("etp", etp, experts.ffn, "rows of each expert's gate"),
    ):
        if size % value:
            legal = sorted(sorted(divisors(size), key=lambda number: abs(number - value))[:3])
            raise UserError(
                f"--{name} {value} does not divide the {size} {what}.",
                where=f"--{name}",
                fix=f"nearest legal values: {', '.join(map(str, legal))}",
            )
    needed = pp * ep * etp
    if world_size is not None and world_size % needed:
        raise UserError(
            f"{world_size} processes cannot hold the experts at pp {pp} x ep {ep} x etp {etp}: {needed} are needed, or a multiple.",
            where="NPROC_PER_NODE x NNODES",
            fix=f"NPROC_PER_NODE={needed}, or another --pp / --ep / --etp whose product divides {world_size}",
        )


def check_expert_options(args: SftArguments, config: PreTrainedConfig, dtype: str) -> None:
    """Raise UserError for what does not work with experts, and for options of experts where there are none."""
    given: Mapping[str, Any] = {name: getattr(args, name) for name in ROUTER_OPTIONS}
    if experts_of(config) is None:
        for name in ROUTER_OPTIONS:
            if name in args.explicit():
                raise UserError(
                    f"--{name} {given[name]} is about routers of experts, and a {config.model_type} model has none.",
                    where=f"--{name}",
                    fix=f"leave --{name} out",
                )
        return
    for wrong, name, fix in (
        (args.fp8, "--fp8", "leave it out: experts are multiplied in the precision of --dtype"),
        (args.cuda_graphs == "true", "--cuda_graphs true", "leave it out: how many rows an expert gets is another number in each step"),
        (args.cpu_offloading_num_layers > 0, "--cpu_offloading_num_layers", "use --gradient_checkpointing true, or a larger --ep"),
        (dtype == "fp16", "fp16", "use --dtype bf16: grouped products have no fp16 form"),
    ):  # fmt: skip
        if wrong:
            raise UserError(
                f"{name} does not work with experts.", where=name.split()[0] if name[0] == "-" else "--dtype", fix=fix
            )


def divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    small = [value for value in range(1, math.isqrt(number) + 1) if number % value == 0]
    return sorted({*small, *(number // value for value in small)})
