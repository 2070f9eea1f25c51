"""`swift plan`: memory, time and money of a training run from its config alone, and the layouts that are best for it.

    swift plan --model_id_or_path DIR --gpus 8 --card H100 --max_length 4096 --price 2.5

It takes the options of `swift sft`, and with --rlhf_type those of `swift rlhf`. Nothing is loaded, fetched or written.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

from megaswift.config.options import PlanArguments, RlhfArguments, SftArguments, parse
from megaswift.launch import agent
from megaswift.models.family import sizes_of
from megaswift.run.cards import CPU, GIB, Card, card_of
from megaswift.run.fit import in_words, lack
from megaswift.run.here import card_here, host_memory, place_here
from megaswift.run.memory import disk_bytes, parameter_count, trained_count
from megaswift.run.planned import planned_source
from megaswift.run.planner import Change, Place, Trial, fewest_gpus, ranked, smallest_change, tried, with_changes
from megaswift.run.problems import refuse
from megaswift.terminal import console

BEST = 3


def plan_main(args: PlanArguments | list[str]) -> dict[str, Any]:
    """Print the plan, and return its figures. Raises UserError for what cannot be planned, memory apart."""
    args = parse(PlanArguments, args) if isinstance(args, list) else args
    card, named = _card(args)
    wishes = _wishes(args)
    source = planned_source(wishes, on_gpu=card.name != CPU)
    place = _place(args, card, named)
    trial = tried(source.args, source, place)
    best = ranked(trial) if not trial.place.kept_batch else []
    refuse(trial.wrong)
    change = smallest_change(trial)
    found = figures(trial, args, best, change)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        _show(trial, args, best, change, found)
    return found


def _wishes(args: PlanArguments) -> SftArguments:
    """The options of the command that is planned: `swift rlhf` where a method of it is named, else `swift sft`."""
    kind = RlhfArguments if "rlhf_type" in args.explicit() else SftArguments
    known = {item.name for item in fields(kind)}
    given = {name: getattr(args, name) for name in args.explicit() if name in known}
    rest = {item.name: getattr(args, item.name) for item in fields(kind) if item.name not in given}
    return kind(**given).changed(**rest)


def _card(args: PlanArguments) -> tuple[Card, bool]:
    """The card that is meant, and whether it was named."""
    return (card_of(args.card), True) if args.card else (card_here(), False)


def _place(args: PlanArguments, card: Card, named: bool) -> Place:
    cluster = agent.cluster()
    gpus = args.gpus or cluster.world_size
    local = min(gpus, 8) if args.gpus else cluster.processes
    if card.name == CPU:
        return replace(place_here(gpus, local), card=card)
    return Place(gpus, card, 0 if named else host_memory(), local)


def figures(trial: Trial, args: PlanArguments, best: list[Trial], change: tuple[Change, ...] | None) -> dict[str, Any]:
    """Everything that is told, in bytes, seconds and FLOPs."""
    found = _of(trial)
    config, source, run = trial.source.config, trial.source, trial.run
    steps = _steps(trial, args)
    found |= {
        "model_type": source.args.model_type,
        "parameters": parameter_count(config),
        "trainable": trained_count(source.adapter, source.frozen, config),
        "dtype": run.precision.dtype,
        "gpus": trial.place.gpus,
        "card": {"name": trial.place.card.name, "bytes": trial.place.card.memory, "measured": trial.place.card.measured, "source": trial.place.card.source},
        "fits": trial.fits,
        "rows_a_step": run.batch.global_batch_size,
        "checkpoint_bytes": run.saving.checkpoint_bytes,
        "disk_bytes": _disk(trial, steps),
        "change": None if change is None else [dict(one.options) for one in change],
        "best": [_of(one) | {"options": _layout(one)} for one in best[:BEST]],
    }  # fmt: skip
    hours = 1e9 / trial.speed.tokens_per_second / 3600
    found["billion_tokens"] = {"hours": hours, "gpu_hours": hours * trial.place.gpus}
    if steps:
        hours = steps * trial.speed.step / 3600
        found["run"] = {"steps": steps, "hours": hours, "gpu_hours": hours * trial.place.gpus}
    if args.price is not None:
        for part in ("billion_tokens", "run"):
            if part in found:
                found[part]["money"] = found[part]["gpu_hours"] * args.price
    return found


def _of(trial: Trial) -> dict[str, Any]:
    memory, speed = trial.memory, trial.speed
    return {
        "rank_bytes": memory.device,
        "working_bytes": memory.working,
        "outside_bytes": memory.outside,
        "parts_bytes": memory.parts,
        "host_bytes": memory.host,
        "saving_bytes": memory.saving,
        "peak_bytes": memory.peak,
        "needed_bytes": memory.needed,
        "fullest_stage": memory.stage,
        "recompute": memory.recompute,
        "flops": speed.flops,
        "flops_done": speed.done,
        "seconds": speed.seconds,
        "step_seconds": speed.step,
        "tokens": speed.tokens,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_gpu": speed.per_gpu,
        "launching": speed.launching,
    }


def _layout(trial: Trial) -> dict[str, Any]:
    """The options in which a layout differs from the plain one."""
    args = trial.args
    found = {name: getattr(args, name) for name in ("tp", "pp", "cp", "ep") if getattr(args, name) > 1}
    found |= {"sequence_parallel": True} if args.sequence_parallel else {}
    found |= {"batch_size": args.batch_size} if args.batch_size > 1 else {}
    found |= {"gradient_accumulation_steps": args.gradient_accumulation_steps} if args.gradient_accumulation_steps else {}
    found |= {"gradient_checkpointing": True} if args.gradient_checkpointing else {}
    return found | ({"recompute_modules": args.recompute_modules} if args.recompute_modules != "auto" else {})


def _steps(trial: Trial, args: PlanArguments) -> int:
    """Steps of the run; 0 where the options do not tell."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.train_rows * args.num_train_epochs / trial.run.batch.global_batch_size) if args.train_rows else 0


def _disk(trial: Trial, steps: int) -> int:
    run = trial.run
    return disk_bytes(replace(run, schedule=replace(run.schedule, train_iters=max(steps, 1))))


def _show(
    trial: Trial, args: PlanArguments, best: list[Trial], change: tuple[Change, ...] | None, found: dict[str, Any]
) -> None:
    out, memory, speed, place = console(), trial.memory, trial.speed, trial.place
    own = "all" if found["trainable"] == found["parameters"] else f"{found['trainable'] / 1e6:,.1f} million"
    out.print(
        f"[bold]{found['model_type']}[/bold]: {found['parameters'] / 1e9:.2f} billion parameters, {own} trained, {found['dtype']}; "
        f"{place.gpus} x {_card_in_words(trial)}"
    )
    out.print(f"[bold]{_name(trial)}[/bold], {_batch(trial)}\n")
    stage = f" (pipeline stage {memory.stage + 1} of {trial.run.parallel.pp})" if trial.run.parallel.pp > 1 else ""
    out.print(f"[bold]Memory of the fullest rank[/bold]{stage}, GiB")
    for name, value in _rows(trial):
        out.print(f"  {name:44}{value / GIB:9.2f}")
    if place.on_gpu:
        state = "fits" if memory.needed <= place.card.memory else "[yellow]does not fit[/yellow]"
        out.print(f"  {'together':44}{memory.needed / GIB:9.2f}  of {place.card.memory / GIB:.1f}: {state}")
    for name, value in (memory.host | {f"while saving: {name}": value for name, value in memory.saving.items()}).items():
        out.print(f"  host memory: {name:31}{value / GIB:9.2f}")
    out.print(
        f"\n[bold]A step[/bold]: {speed.tokens:,} tokens, {speed.flops:.3g} FLOPs"
        + (f" ({speed.done:.3g} with what is computed again)" if speed.done > speed.flops else "")
        + f", about {_duration(speed.step)}; {speed.tokens_per_second:,.0f} tokens/s, {speed.per_gpu:,.0f} a GPU"
    )
    parts = sorted(speed.seconds.items(), key=lambda item: -item[1])
    out.print(
        "  " + ", ".join(f"{name} {100 * value / speed.step:.0f} %" for name, value in parts if value > 0.005 * speed.step)
    )
    if speed.launching:
        out.print(
            "  launching kernels takes longer than they do: larger micro batches, or --cuda_graphs true on one process, help"
        )
    for title, part in (("The run", "run"), ("A billion tokens", "billion_tokens")):
        if part in found:
            one = found[part]
            steps = f"{one['steps']:,} steps, " if part == "run" else ""
            money = f", {one['money']:,.2f} at {args.price:g} a GPU hour" if "money" in one else ""
            out.print(
                f"[bold]{title}[/bold]: {steps}{_duration(3600 * one['hours'])}, {one['gpu_hours']:,.2f} GPU hours{money}"
            )
    out.print(
        f"[bold]Disk[/bold]: a checkpoint {found['checkpoint_bytes'] / 1e9:.2f} GB, all that are kept {found['disk_bytes'] / 1e9:.2f} GB"
    )
    if not place.card.measured:
        out.print(f"[yellow]the time of {place.card.name} was not measured: {place.card.source}[/yellow]")
    _show_best(trial, best)
    if not trial.fits:
        _show_change(trial, change)


def _rows(trial: Trial) -> list[tuple[str, int]]:
    """The memory by cause, as it is shown; what is nothing is left out."""
    memory, run = trial.memory, trial.run
    parts = memory.parts
    inside = [f"{name} {value / GIB:.2f}" for name, value in parts.items() if name == "experts"]
    again = {
        "none": "",
        "swiglu": ", SwiGLU computed again",
        "mlp": ", MLPs computed again",
        "layers": ", layers computed again",
    }
    high = (
        "output layer: logits and gradient" if memory.working["head"] >= memory.working["layer"] else "backward pass of a layer"
    )
    rows = [
        (f"weights{f' (of them {inside[0]})' if inside else ''}", memory.device["weights"]),
        ("gradients, fp32", memory.device["gradients"]),
        (f"optimizer: fp32 weights, {run.optimizer.state_dtype} moments", memory.device["optimizer"]),
        (f"activations{again.get(memory.recompute, '')}", memory.working["activations"]),
        (high, max(memory.working["head"], memory.working["layer"])),
    ]
    rows += list(memory.outside.items())
    if "adapters" in parts:
        rows.insert(3, ("  of the three: adapters", parts["adapters"]))
    return [(name, value) for name, value in rows if value]


def _show_best(trial: Trial, best: list[Trial]) -> None:
    out = console()
    if not best:
        if trial.place.gpus > 1:
            out.print("\n[yellow]no layout of these GPUs fits, whatever is computed again[/yellow]")
        return
    if trial.place.gpus == 1 and trial.fits:
        return
    out.print("\n[bold]Layouts that fit, the fastest first[/bold]")
    for number, one in enumerate(best[:BEST]):
        typed = " ".join(f"--{name} {str(value).lower()}" for name, value in _layout(one).items()) or "(no option)"
        out.print(
            f"  {number + 1}. [bold]{_name(one)}[/bold]: {one.speed.per_gpu:,.0f} tokens/s a GPU, {one.memory.needed / GIB:.1f} GiB: {_why(one, best)}\n     {typed}"
        )


def _why(one: Trial, best: list[Trial]) -> str:
    """What makes a layout as good as it is, and what it pays."""
    parallel, speed, memory = one.run.parallel, one.speed, one.memory
    reasons = []
    if parallel.model_size == 1 and parallel.ep == 1:
        reasons.append("every GPU has the whole model and only gradients are sent")
    if parallel.ep > 1:
        reasons.append("experts are spread, so that their gradients are not sent")
    if parallel.tp > 1:
        reasons.append(
            f"each matrix is cut in {parallel.tp}, which makes room and costs {_share(speed.seconds, 'tensor parallel')}"
        )
    if parallel.pp > 1:
        reasons.append(f"layers stand in {parallel.pp} stages, which wait {_share(speed.seconds, 'bubble')} of a step")
    if parallel.cp > 1:
        reasons.append(f"{parallel.cp} GPUs share each row")
    if memory.recompute != "none":
        reasons.append(
            {"layers": "layers are computed again", "swiglu": "SwiGLU is computed again", "mlp": "MLPs are computed again"}[
                memory.recompute
            ]
        )
    fastest = best[0].speed.step
    if speed.step > fastest * 1.005:
        reasons.append(f"{100 * (speed.step / fastest - 1):.0f} % more time than the first")
    return "; ".join(reasons)


def _share(seconds: dict[str, float], name: str) -> str:
    return f"{100 * seconds.get(name, 0.0) / sum(seconds.values()):.0f} %"


def _show_change(trial: Trial, change: tuple[Change, ...] | None) -> None:
    out = console()
    out.print(f"\n[yellow]{lack(trial)}[/yellow]")
    if change is None:
        gpus = fewest_gpus(trial) if trial.place.on_gpu else None
        out.print("no change of options is enough" + (f"; {gpus} such GPUs would be" if gpus else ""))
        return
    better = with_changes(trial, change)
    out.print(
        f"the smallest change that fits: [bold]{in_words(change)}[/bold]: {better.memory.needed / GIB:.1f} GiB, "
        f"{better.speed.per_gpu:,.0f} tokens/s a GPU"
    )


def _name(trial: Trial) -> str:
    parallel = trial.run.parallel
    sizes = [
        ("tp", parallel.tp),
        ("pp", parallel.pp),
        ("vpp", parallel.vpp),
        ("cp", parallel.cp),
        ("ep", parallel.ep),
        ("etp", parallel.etp),
    ]
    parts = [f"{name} {size}" for name, size in sizes if size > 1]
    return " ".join([*parts, f"dp {parallel.dp}", *(["sequence parallel"] if parallel.sequence_parallel else [])])


def _batch(trial: Trial) -> str:
    batch = trial.run.batch
    return (
        f"{batch.global_batch_size} rows of {batch.max_length:,} tokens a step, micro batches of {batch.micro_batch_size}, "
        f"{sizes_of(trial.source.config).layers} layers"
    )


def _card_in_words(trial: Trial) -> str:
    card = trial.place.card
    return f"process of {trial.place.cores} CPU cores" if card.name == CPU else f"{card.name} ({card.memory / GIB:.1f} GiB)"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
