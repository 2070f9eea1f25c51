"""`swift sft`: full fine-tuning with Megatron-Core.

    NPROC_PER_NODE=4 swift sft --resume_from_checkpoint qwen2-7b-instruct-tp2-pp1 --dataset self-cognition#500 ...

This process checks everything and prepares the data once, before any rank starts; then torchrun starts the ranks, or,
for one process, the loop runs right here.
"""

from __future__ import annotations

import datetime
import re
import shutil
from contextlib import nullcontext, suppress
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megaswift.config.files import kept_places, write_args_file
from megaswift.config.options import SftArguments, parse
from megaswift.data.kept import kept_data
from megaswift.errors import DataError, Stopped, UserError
from megaswift.launch import agent, versions
from megaswift.launch.checks import slow_paths
from megaswift.launch.signals import Interrupted, StopSignals
from megaswift.models import parameters_of
from megaswift.models.prediction import notes_on_carried
from megaswift.models.stages import stage_layers
from megaswift.report.curves import write_images
from megaswift.run.cards import Card
from megaswift.run.fit import fitted
from megaswift.run.here import place_here
from megaswift.run.memory import MemoryEstimate, disk_bytes, estimate, first_rank, parameter_count, trained_count
from megaswift.run.objective import in_words
from megaswift.run.plan import PLAN_FILE, write_plan
from megaswift.run.planner import Place, tried
from megaswift.run.resolve import warmup_note
from megaswift.run.resume import check_unchanged, kept_batch
from megaswift.run.setup import prepared, resolved, streamed_rows, template_of
from megaswift.run.source import TrainingSource, resolve_source
from megaswift.run.spec import RUN_FILE, Parallel, Run
from megaswift.run.table import filled_rows
from megaswift.store.cache import cache_root
from megaswift.store.lock import LOCK, filling, locked
from megaswift.store.manifest import MANIFEST
from megaswift.store.paths import INITIAL_ADAPTER, REFERENCE_FILE, hf_copy_of, iteration_directory
from megaswift.store.publish import put
from megaswift.store.retention import clean
from megaswift.terminal import console, say, shown, typed
from megaswift.train.hf_copies import copy_now
from megaswift.weights.hf.folder import RUN_FILES, side_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.data.encode import PreparedData
    from megaswift.launch.agent import Cluster
    from megaswift.launch.signals import StopSignals

_VERSION = re.compile(r"v(\d+)-.*")
_OF_A_DRY_RUN = (LOCK, RUN_FILE, PLAN_FILE)


def sft_main(args: SftArguments | list[str]) -> Path:
    """Train, and return the directory of the run.

    Args:
        args: options, or the words of the command line.

    Raises MegaswiftError; bad input is found before any process group exists, and leaves nothing behind.
    """
    args = parse(SftArguments, args) if isinstance(args, list) else args
    with StopSignals() as stop:
        stop.interrupt = partial(_interrupt, "before training began")
        try:
            return _train(args, stop)
        except Interrupted as order:
            raise Stopped(
                f"stopped by {order}.",
                where=f"swift {args.VERB}",
                fix="the same command with --resume true makes what is missing",
            ) from None


def _interrupt(moment: str, name: str) -> None:
    raise Interrupted(f"{name} {moment}")


def _train(args: SftArguments, stop: StopSignals) -> Path:
    from megaswift.data.batches import require_rows

    versions.check_versions()
    place = agent.cluster()
    versions.check_devices(place.processes)
    if args.fp8:
        versions.check_fp8(place.processes)
    start = resolve_source(args, place.leads)
    args, batch = start.args, None
    if start.run_dir is not None:
        batch, note = kept_batch(args, start.manifest, place.world_size, shown(start.root))
        if note and place.leads:
            say(f"[yellow]{note}.[/yellow]")
    template = template_of(args, start)
    rows = streamed_rows(args, place.world_size, batch)
    data = prepared(args, template, start, rows)
    here, longest = place_here(place.world_size, place.processes, batch), _longest(data, args.max_length)
    start = fitted(start, here, place.leads, longest)
    args = start.args
    run_dir = start.run_dir or new_run_dir(args, place.leads)
    run = resolved(args, start, data, place.world_size, run_dir, template.pad_id, batch, template.end_ids)
    steps = run.schedule.train_iters
    if start.run_dir is not None:
        _check_unchanged(args, start, data, run)
    require_rows(data.train, run.batch.global_batch_size)
    memory = estimate(replace(run, batch=replace(run.batch, max_length=longest)), start.config, here.card.memory or None)
    if args.dry_run:
        if place.leads:
            _dry(run_dir, run, start, data, memory, here)
        return run_dir
    with locked(run_dir) if place.leads else nullcontext():
        if place.leads:
            _print_plan(run, start.config, memory, data, args, here.card)
            _fill_run_dir(run_dir, args.changed(template_date=template.state["date"] or None), run, memory, start)
        if start.first_step >= steps:
            say(f"[bold]{shown(run_dir)}[/bold] has made all of its {steps} steps: there is nothing left to do.")
        else:
            if place.leads:
                for line in slow_paths():
                    say(f"[yellow]{line}[/yellow]")
                _make_first_values(run, start.config)
            _start(run_dir, run, place, stop)
            stop.interrupt = partial(_interrupt, "after the last step, whose checkpoint is saved")
    if place.leads:
        _say_ready(run_dir, run)
    return run_dir


def _longest(data: PreparedData, max_length: int) -> int:
    """Tokens of the longest row, or of each answer of an example: what a step is planned for."""
    return min(max_length, -(-data.train.longest // data.train.answers)) or max_length


def _make_first_values(run: Run, config: PreTrainedConfig) -> None:
    """Of an adapter that begins as a part of the base, before any rank starts: decompositions take longer than ranks wait."""
    lora, base = run.method.adapter, run.method.base
    if lora is None or base is None or not lora.is_part_of_base or run.schedule.first_step:
        return
    from megaswift.weights.convert.lora_start import make_start

    say(f"first values of the adapter ({lora.init}) from {len(lora.sites(parameters_of(config)))} matrices")
    make_start(lora, config, Path(base["path"]), run.seed, Path(str(run.method.adapter_start)))


def _say_ready(run_dir: Path, run: Run) -> None:
    """The next command; with --save_safetensors the model of the last step is there already, or is made now."""
    if not run.saving.hf_copies:
        say(f"[bold]{shown(run_dir)}[/bold] is ready. Next: swift export --ckpt_dir {typed(run_dir)} --to_hf true")
        return
    copy = hf_copy_of(iteration_directory(run_dir, run.schedule.train_iters))
    if not copy.exists():
        copy_now(run_dir, run.schedule.train_iters)
    say(f"[bold]{shown(run_dir)}[/bold] is ready. Next: swift infer --ckpt_dir {typed(copy)}")


def _start(run_dir: Path, run: Run, place: Cluster, stop: StopSignals) -> None:
    """Run the ranks of this machine, and draw what they logged, however they ended."""
    path = run_dir / RUN_FILE if place.leads else cache_root() / f"run-{run_dir.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filling(run_dir, new=run.schedule.first_step == 0) if place.leads else nullcontext():
        put(path, run.text())
    if stop.name and stop.interrupt is not None:  # whatever took the exception at the time: the order stands
        stop.interrupt(stop.name)
    try:
        if place.world_size == 1:
            _run_here(run)
        else:
            agent.start_ranks(place, path, stop)
    finally:
        if place.leads:
            _draw(run_dir)


def _run_here(run: Run) -> None:
    """The only rank, in this process. Raises what it raises; memory that is too small is the user's to mend."""
    from megaswift.train.loop import train

    try:
        train(run)
    except (RuntimeError, MemoryError) as error:
        known = agent.out_of_memory(error)
        if known is None:
            raise
        raise known from error


def _check_unchanged(args: SftArguments, start: TrainingSource, data: PreparedData, run: Run) -> None:
    """A run goes on only with its own data and seed; a changed number of steps is said."""
    from megaswift.data.batches import Batches

    batches = Batches(
        data.train,
        micro_batch_size=1,
        global_batch_size=1,
        dp_rank=0,
        dp_size=1,
        seed=run.seed,
        pad_id=0,
        group_by_length=run.batch.group_by_length,
    )
    for note in check_unchanged(args, start.manifest, batches.fingerprint, shown(start.root)):
        say(f"[yellow]{note}; the run goes on as --allow_data_change true asks.[/yellow]")
    before = start.manifest.get("resume", {}).get("train_iters")
    steps = run.schedule.train_iters
    if before != steps:
        say(
            f"[yellow]the run now has {steps} steps, it had {before}: the learning rate follows the new number from here on.[/yellow]"
        )


def new_run_dir(args: SftArguments, leads: bool = True) -> Path:
    """Name of a new run: {output_dir}/{model_type}-tp{tp}-pp{pp}/v{N}-{time}, or output_dir itself without the suffix.

    Args:
        leads: on several machines, whether this is the one that makes the directory; when the others come, it may be there.
    """
    root = Path(args.output_dir).absolute()
    with filling(root):  # a name may be too long, or a directory closed to us
        if not args.add_output_dir_suffix:
            taken_before = root.exists() and any(path.name not in _OF_A_DRY_RUN for path in root.iterdir())
            if leads and taken_before and not args.overwrite and not (args.resume and (root / PLAN_FILE).exists()):
                raise UserError(
                    "the output directory is not empty.", where=str(root), fix="use --overwrite true, or another --output_dir"
                )
            return root
        parent = root / f"{args.model_type}-tp{args.tp}-pp{args.pp}"
        taken = [
            int(match.group(1))
            for path in (parent.iterdir() if parent.is_dir() else ())
            if (match := _VERSION.fullmatch(path.name))
        ]
    return parent / f"v{max(taken, default=-1) + 1}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _print_plan(
    run: Run, config: PreTrainedConfig, memory: MemoryEstimate, data: PreparedData, args: SftArguments, card: Card
) -> None:
    """The data report, the filled mapping table and the arithmetic of the steps, once."""
    from megaswift.data.report import print_report

    out, parallel = console(), run.parallel
    print_report(data.report, out)
    out.print("\n[bold]What Megatron-Core is told[/bold] (and the option or formula that it comes from)")
    for megatron, expression, value in filled_rows(run):
        text = shown(Path(value)) if value.startswith("/") else value
        out.print(f"  {megatron:38} [bold]{text:12}[/bold]  {expression}")
    out.print()
    cp = f"cp {parallel.cp} x " if parallel.cp > 1 else ""
    fp8 = " with FP8 products in the blocks" if run.precision.fp8 else ""
    device = memory.device
    out.print(
        f"{parallel.world_size} processes = tp {parallel.tp} x pp {parallel.pp}{_stages(config, parallel)} x {cp}dp {parallel.dp}{_experts(parallel)}, {run.precision.dtype}{fp8}\n"
        f"global batch {run.batch.global_batch_size} = {run.batch.micro_batch_size} rows x {_shares(run)}\n"
        f"{_steps(run)}; {run.data.val_rows} validation rows\n{_passes(run, data)}"
        f"{_trained(run, config)}\n{_learnt(run)}"
        f"memory of the fullest rank without activations: {sum(device.values()) / 1e9:.2f} GB "
        f"(weights {device['weights'] / 1e9:.2f}, gradients {device['gradients'] / 1e9:.2f}, optimizer {device['optimizer'] / 1e9:.2f}); "
        f"one checkpoint {run.saving.checkpoint_bytes / 1e9:.2f} GB\n{_at_its_height(memory, card)}{_host_memory(run, memory)}"
    )
    for note in notes_on_carried(run.model.carried["tensors"], config) if run.model.carried else ():
        out.print(f"[yellow]{note}[/yellow]")
    if note := warmup_note(args, run.schedule.train_iters):
        out.print(f"[yellow]{note}[/yellow]")


def _trained(run: Run, config: PreTrainedConfig) -> str:
    """What is trained of how much."""
    whole, adapter = parameter_count(config), run.method.adapter
    own = trained_count(adapter, run.method.frozen, config)
    if adapter is None:
        return f"trained: {own:,} of {whole:,} parameters" + (
            f", {100 * own / whole:.3g} %; the others stay" if own < whole else ""
        )
    without = adapter.left_out(parameters_of(config))
    left = f"; {' and '.join(without.values())} stay as they are (--target_modules {' '.join(without)})" if without else ""
    return (
        f"trained: {own:,} parameters of a LoRA adapter (rank {adapter.rank}, alpha {adapter.alpha:g}) "
        f"beside {whole:,} frozen ones, {100 * own / (whole + own):.2g} % of all{left}"
    )


def _learnt(run: Run) -> str:
    """A line on the objective; nothing is said where it is the answers' tokens."""
    if run.objective.of_tokens:
        return ""
    reference = "the weights that training starts from" if run.method.adapter is None else "the model without its adapter"
    beside = f"; reference: {reference}" if run.objective.needs_reference else "; no reference"
    return f"learnt: {in_words(run.objective)}{beside}\n"


def _shares(run: Run) -> str:
    """How a step's rows are shared out, beyond those of a micro batch."""
    batch = run.batch
    if batch.gradient_accumulation_steps is None:  # the rows are those of a run begun at another layout
        return f"{batch.micro_batches} micro batches x {run.parallel.dp} data-parallel ranks"
    return (
        f"{batch.gradient_accumulation_steps} accumulation x {run.parallel.world_size} processes; "
        f"each data-parallel rank runs {batch.micro_batches} micro batches a step"
    )


def _experts(parallel: Parallel) -> str:
    """How the experts are spread over the same processes, in words; nothing where they are not."""
    parts = [f"{name} {size}" for name, size in (("ep", parallel.ep), ("etp", parallel.etp)) if size > 1]
    return f" (experts: {' x '.join(parts)})" if parts else ""


def _stages(config: PreTrainedConfig, parallel: Parallel) -> str:
    """How many layers each pipeline stage has, where they differ, and in which chunks."""
    stages = stage_layers(config, parallel.pp, parallel.vpp)
    if parallel.vpp > 1:
        parts = [" + ".join(map(str, stages[rank :: parallel.pp])) for rank in range(parallel.pp)]
        return f" ({', '.join(dict.fromkeys(parts))} layers in {parallel.vpp} chunks)"
    return f" ({', '.join(map(str, stages))} layers)" if len(set(stages)) > 1 else ""


def _steps(run: Run) -> str:
    """How many steps, and why."""
    schedule, rows, batch = run.schedule, run.data.train_rows, run.batch.global_batch_size
    warm_up = f"{schedule.warmup_iters} of them warm-up"
    if schedule.tokens is not None:
        step = batch * run.batch.max_length
        return (
            f"{schedule.tokens:,} tokens (--train_tokens) / {step:,} a step = {schedule.train_iters} steps, {warm_up}: "
            f"{schedule.train_iters * step:,} tokens"
        )
    if schedule.epochs is None:
        epochs = schedule.train_iters * batch / rows
        return f"{schedule.train_iters} steps (--max_steps), {warm_up}: {epochs:.3g} epochs of {rows} rows"
    return f"{rows} rows x {schedule.epochs:g} epochs / {batch} = {schedule.train_iters} steps, {warm_up}"


def _passes(run: Run, data: PreparedData) -> str:
    """Of text, how often it is read, and from what its rows come where it is a blend; nothing is said of other rows."""
    if run.objective.kind != "text":
        return ""
    rows, blend = run.schedule.train_iters * run.batch.global_batch_size, data.report.blend
    if not blend:
        return (
            f"  {rows / run.data.train_rows:.3g} passes over {run.data.train_rows:,} rows of {run.batch.max_length:,} tokens\n"
        )
    return "".join(
        f"  {share:.4g} of the rows from {item}: {share * rows / own:.3g} passes over {own:,} rows\n"
        for item, share, own in blend
    )


def _at_its_height(memory: MemoryEstimate, card: Card) -> str:
    """A line on what a step takes at its height, on a GPU."""
    if not card.memory:
        return ""
    return (
        f"with the longest rows a step takes about {memory.needed / 1e9:.2f} GB of the {card.memory / 1e9:.2f} GB of {card.name} "
        f"(activations {memory.working['activations'] / 1e9:.2f})\n"
    )


def _host_memory(run: Run, memory: MemoryEstimate) -> str:
    """A line on what is offloaded; nothing is said where nothing is."""
    if not memory.host:
        return ""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.host.items())
    total, number = sum(memory.host.values()) / 1e9, run.memory.offloaded_layers
    layers = f"; activations of {number} layers" if number else ""
    return f"page-locked host memory of the fullest rank: at most {total:.2f} GB ({parts}){layers}\n"


def _dry(run_dir: Path, run: Run, start: TrainingSource, data: PreparedData, memory: MemoryEstimate, here: Place) -> None:
    """What `--dry_run true` does in place of training: the plan, the model without memory, the disk; run.json and plan.json."""
    from megaswift.train.checkpoint.save import require_space
    from megaswift.train.shape import rank_shape

    _print_plan(run, start.config, memory, data, start.args, here.card)
    shape = rank_shape(run, start.config)
    planned = first_rank(run, start.config)
    if shape != planned:
        raise DataError(
            f"the model of rank 0 has {shape[0]:,} parameters, {shape[1]:,} of them trained; the plan says {planned[0]:,} and {planned[1]:,}.",
            where="--dry_run",
            fix="this is a defect of megaswift: please report it with the config.json of the model",
        )
    say(f"rank 0, built without memory: {shape[0]:,} parameters, {shape[1]:,} of them trained, as planned")
    place = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    require_space(place, disk_bytes(run), "what this run saves")
    free = not run_dir.exists() or all(path.name in _OF_A_DRY_RUN for path in run_dir.iterdir())
    with filling(run_dir):
        if free:
            run_dir.mkdir(parents=True, exist_ok=True)
            put(run_dir / RUN_FILE, run.text())
            write_plan(run_dir / PLAN_FILE, run, start.config, memory)
    trial = tried(start.args.changed(max_length=_longest(data, run.batch.max_length)), start, here)
    say(
        f"a step of the longest rows takes about {trial.speed.step:.2g} s on {here.card.name}, the run {trial.speed.step * run.schedule.train_iters / 3600:.2g} h\n"
        f"[bold]dry run[/bold]: all is well, and nothing was trained"
        + (
            f"; {shown(run_dir)} has {RUN_FILE} and {PLAN_FILE}."
            if free
            else f"; {shown(run_dir)}, which holds a run, is as it was."
        )
    )


def _fill_run_dir(run_dir: Path, args: SftArguments, run: Run, memory: MemoryEstimate, start: TrainingSource) -> None:
    """Config, tokenizer, options and plan go into the run before the first step, so that a killed run can be exported."""
    from megaswift.train.checkpoint.save import require_space

    if start.run_dir is None and not args.add_output_dir_suffix:
        _empty(run_dir, start)
    for name in clean(run_dir):
        say(f"[yellow]removed {name}, which an interrupted run left behind.[/yellow]")
    with filling(run_dir, new=start.run_dir is None):
        require_space(run_dir, run.saving.checkpoint_bytes, "one checkpoint")
        if start.run_dir is None:
            for file in side_files(start.root):
                shutil.copyfile(file, run_dir / file.name)
        found = {"dtype": run.precision.dtype, "sft_type": run.method.sft_type}
        write_args_file(run_dir, args, {**kept_places(args), **kept_data(args), **found})
        write_plan(run_dir / PLAN_FILE, run, start.config, memory)
    say(f"run directory: {shown(run_dir)}\n")


# What commands leave in a run's directory, beside the model's own files and what is exported there, which has a manifest.
_OF_A_RUN = (
    *RUN_FILES, INITIAL_ADAPTER, REFERENCE_FILE, "iter_*", "trash-*", ".iter_*", "runs", "images", "infer_result", "config.json", "generation_config.json", "tokenizer*", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "*processor_config.json",
)  # fmt: skip


def _empty(run_dir: Path, start: TrainingSource) -> None:
    """Remove an earlier run from a directory that is to be used again; the lock, which this process holds, stays.

    Raises UserError, and removes nothing, where the directory holds something else, or what the new run begins from.
    """

    inside = [path for path in run_dir.iterdir() if path.name != LOCK]
    if any(place.resolve().is_relative_to(run_dir.resolve()) for place in (start.root, start.checkpoint)):
        raise UserError(
            "this directory holds the weights that the run is to begin from, so it is not replaced.",
            where=str(run_dir),
            fix="choose another --output_dir; to go on with the run there: --resume true",
        )
    known = (*_OF_A_RUN, *(file.name for file in side_files(start.root)))
    others = [
        path.name for path in inside if not any(fnmatch(path.name, name) for name in known) and not (path / MANIFEST).is_file()
    ]
    if others or (inside and not (run_dir / PLAN_FILE).exists()):
        found = f"what swift sft did not make ({', '.join(sorted(others)[:5])})" if others else "no run"
        raise UserError(
            f"this directory holds {found}, so it is not replaced.",
            where=str(run_dir),
            fix="move it away or remove it yourself, or choose another --output_dir",
        )
    for path in inside:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _draw(run_dir: Path) -> None:
    with suppress(OSError):
        write_images(run_dir)
