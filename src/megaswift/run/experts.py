"""What a run with experts must fulfil, and what means nothing without them: told before any process group exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megaswift.models import family_of
from megaswift.models.family import sizes_of
from megaswift.models.kinds import Experts
from megaswift.run.problem import Problem, divisors, nearest_sizes
from megaswift.run.spec import Parallel, Routing, Run

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def experts_of(config: PreTrainedConfig) -> Experts | None:
    """The experts of a model's layers; None where it has none."""
    kinds = family_of(config.model_type).layers(config)
    return next((kind.experts for kind in kinds if kind.experts is not None), None)


def mlp_widths(config: PreTrainedConfig) -> list[int]:
    """Rows of the gates that --tp splits: of dense layers, and of experts that every token goes to."""
    kinds = family_of(config.model_type).layers(config)
    shared = {kind.experts.shared_ffn for kind in kinds if kind.experts is not None and kind.experts.shared_ffn}
    return sorted(shared | {sizes_of(config).ffn for kind in kinds if kind.experts is None})


def mlp_parts(config: PreTrainedConfig) -> int:
    """How many times as wide as the MLP its first product is: 2 with a gate."""
    return 1 if any(kind.mlp == "plain" for kind in family_of(config.model_type).layers(config)) else 2


def expert_layout_problems(config: PreTrainedConfig, parallel: Parallel) -> Iterator[Problem]:
    """What is wrong with spreading the experts this way, with the nearest values that would be right."""
    experts, pp, ep, etp = experts_of(config), parallel.pp, parallel.ep, parallel.etp
    if min(ep, etp) < 1:
        yield Problem(f"--ep {ep} and --etp {etp} must be at least 1.", where="--ep, --etp")
        return
    if experts is None:
        for name, value in (("ep", ep), ("etp", etp)):
            if value > 1:
                yield Problem(
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
            yield Problem(
                f"--{name} {value} does not divide the {size} {what}.",
                where=f"--{name}",
                fix=f"nearest legal values: {nearest_sizes(value, divisors(size))}",
            )
    if experts.biases and etp > 1:
        yield Problem(
            f"--etp {etp} cuts each expert, and a {config.model_type} model's experts have biases, which would be added by each part.",
            where="--etp",
            fix="leave --etp out, and spread the experts by --ep",
        )
    needed = pp * ep * etp
    if parallel.world_size % needed:
        yield Problem(
            f"{parallel.world_size} processes cannot hold the experts at pp {pp} x ep {ep} x etp {etp}: {needed} are needed, or a multiple.",
            where="NPROC_PER_NODE x NNODES",
            fix=f"NPROC_PER_NODE={needed}, or another --pp / --ep / --etp whose product divides {parallel.world_size}",
        )


def expert_problems(run: Run, config: PreTrainedConfig) -> Iterator[Problem]:
    """What does not work with experts, and what is asked of experts where there are none."""
    if experts_of(config) is None:
        if run.routing != Routing():
            yield Problem(
                f"--moe_aux_loss_coeff, --moe_z_loss_coeff and --moe_router_dtype are about routers of experts; a {config.model_type} model has none.",
                where="--moe_aux_loss_coeff, --moe_z_loss_coeff, --moe_router_dtype",
                fix="leave them out",
            )
        return
    for wrong, name, where, fix in (
        (bool(run.method.frozen), "--freeze_parameters", "--freeze_parameters", "train all weights"),
        (run.precision.fp8, "--fp8", "--fp8", "leave it out: experts are multiplied in the precision of --dtype"),
        (
            run.memory.offloaded_layers > 0, "--cpu_offloading_num_layers", "--cpu_offloading_num_layers",
            "use --gradient_checkpointing true, or a larger --ep",
        ),
        (run.precision.dtype == "fp16", "fp16", "--dtype", "use --dtype bf16: grouped products have no fp16 form"),
    ):  # fmt: skip
        if wrong:
            yield Problem(f"{name} does not work with experts.", where=where, fix=fix)
