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
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megaswift.config.files import kept_places, write_args_file
from megaswift.config.options import SftArguments, parse
from megaswift.data.kept import kept_data
from megaswift.errors import Stopped, UserError
from megaswift.launch import agent, versions
from megaswift.launch.signals import Interrupted, StopSignals
from megaswift.report.curves import write_images
from megaswift.run import table
from megaswift.run.plan import Plan
from megaswift.run.resume import check_unchanged, kept_batch
from megaswift.run.setup import job_of, plan_of, prepared, streamed_rows, template_of
from megaswift.run.source import TrainingSource, resolve_source
from megaswift.store.cache import cache_root
from megaswift.store.lock import LOCK, filling, locked
from megaswift.store.manifest import MANIFEST
from megaswift.store.paths import hf_copy_of, iteration_directory
from megaswift.store.retention import clean
from megaswift.terminal import console, say, shown, typed
from megaswift.train.hf_copies import copy_now
from megaswift.weights.hf.folder import RUN_FILES, side_files

if TYPE_CHECKING:
    from megaswift.data.encode import PreparedData
    from megaswift.launch.agent import Cluster
    from megaswift.launch.signals import StopSignals
    from megaswift.run.job import Job

_VERSION = re.compile(r"v(\d+)-.*")


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
                f"stopped by {order}.", where="swift sft", fix="the same command with --resume true makes what is missing"
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
    run_dir = start.run_dir or new_run_dir(args, place.leads)
    plan = plan_of(args, start, data, place, run_dir, batch)
    if start.run_dir is not None:
        _check_run(args, start, data, plan)
    require_rows(len(data.train), plan.global_batch)
    with locked(run_dir) if place.leads else nullcontext():
        if place.leads:
            _print_plan(plan, data, args)
            _fill_run_dir(run_dir, args.changed(template_date=template.state["date"] or None), plan, start)
        if start.first_step >= plan.train_iters:
            say(f"[bold]{shown(run_dir)}[/bold] has made all of its {plan.train_iters} steps: there is nothing left to do.")
        else:
            _start(run_dir, job_of(args, start, data, plan, template.pad_id), place, stop)
            stop.interrupt = partial(_interrupt, "after the last step, whose checkpoint is saved")
    if place.leads:
        _say_ready(args, run_dir, plan)
    return run_dir


def _say_ready(args: SftArguments, run_dir: Path, plan: Plan) -> None:
    """The next command; with --save_safetensors the model of the last step is there already, or is made now."""
    if not args.save_safetensors:
        say(f"[bold]{shown(run_dir)}[/bold] is ready. Next: swift export --ckpt_dir {typed(run_dir)} --to_hf true")
        return
    copy = hf_copy_of(iteration_directory(run_dir, plan.train_iters))
    if not copy.exists():
        copy_now(run_dir, plan.train_iters)
    say(f"[bold]{shown(run_dir)}[/bold] is ready. Next: swift infer --ckpt_dir {typed(copy)}")


def _start(run_dir: Path, job: Job, place: Cluster, stop: StopSignals) -> None:
    """Run the ranks of this machine, and draw what they logged, however they ended."""
    path = run_dir / "job.json" if place.leads else cache_root() / f"job-{run_dir.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filling(run_dir, new=job.first_step == 0) if place.leads else nullcontext():
        job.write(path)
    if stop.name and stop.interrupt is not None:  # whatever took the exception at the time: the order stands
        stop.interrupt(stop.name)
    try:
        if place.world_size == 1:
            _run_here(job)
        else:
            agent.start_ranks(place, path, stop)
    finally:
        if place.leads:
            _draw(run_dir)


def _run_here(job: Job) -> None:
    """The only rank, in this process. Raises what it raises; memory that is too small is the user's to mend."""
    from megaswift.train.loop import run

    try:
        run(job)
    except (RuntimeError, MemoryError) as error:
        known = agent.out_of_memory(error)
        if known is None:
            raise
        raise known from error


def _check_run(args: SftArguments, start: TrainingSource, data: PreparedData, plan: Plan) -> None:
    """A run goes on only with its own data and seed; a changed number of steps is said."""
    from megaswift.data.batches import Batches

    batches = Batches(
        data.train,
        micro_batch_size=1,
        global_batch_size=1,
        dp_rank=0,
        dp_size=1,
        seed=args.seed,
        pad_id=0,
        group_by_length=args.group_by_length,
    )
    for note in check_unchanged(args, start.manifest, batches.fingerprint, shown(start.root)):
        say(f"[yellow]{note}; the run goes on as --allow_data_change true asks.[/yellow]")
    before = start.manifest.get("resume", {}).get("train_iters")
    if before != plan.train_iters:
        say(
            f"[yellow]the run now has {plan.train_iters} steps, it had {before}: the learning rate follows the new number from here on.[/yellow]"
        )


def new_run_dir(args: SftArguments, leads: bool = True) -> Path:
    """Name of a new run: {output_dir}/{model_type}-tp{tp}-pp{pp}/v{N}-{time}, or output_dir itself without the suffix.

    Args:
        leads: on several machines, whether this is the one that makes the directory; when the others come, it may be there.
    """
    root = Path(args.output_dir).absolute()
    with filling(root):  # a name may be too long, or a directory closed to us
        if not args.add_output_dir_suffix:
            taken_before = root.exists() and any(path.name != LOCK for path in root.iterdir())
            if leads and taken_before and not args.overwrite and not (args.resume and (root / "plan.json").exists()):
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


def _print_plan(plan: Plan, data: PreparedData, args: SftArguments) -> None:
    """The data report, the filled mapping table and the arithmetic of the steps, once."""
    from megaswift.data.report import print_report

    out = console()
    print_report(data.report, out)
    out.print("\n[bold]What Megatron-Core is told[/bold] (and the option or formula that it comes from)")
    for megatron, expression, value in plan.table:
        text = shown(Path(value)) if value.startswith("/") else value
        out.print(f"  {megatron:38} [bold]{text:12}[/bold]  {expression}")
    out.print()
    out.print(
        f"{plan.world_size} processes = tp {plan.tp} x pp {plan.pp}{_stages(plan)} x {f'cp {plan.cp} x ' if plan.cp > 1 else ''}dp {plan.dp}, {plan.dtype}{' with FP8 products in the blocks' if args.fp8 else ''}\n"
        f"global batch {plan.global_batch} = {args.batch_size} rows x {_shares(plan)}\n"
        f"{_steps(plan, args)}; {plan.val_rows} validation rows\n"
        f"{_trained(plan, args)}\n"
        f"memory of the fullest rank without activations: {sum(plan.rank_bytes.values()) / 1e9:.2f} GB "
        f"(weights {plan.rank_bytes['weights'] / 1e9:.2f}, gradients {plan.rank_bytes['gradients'] / 1e9:.2f}, optimizer {plan.rank_bytes['optimizer'] / 1e9:.2f}); "
        f"one checkpoint {plan.checkpoint_bytes / 1e9:.2f} GB\n{_host_memory(plan)}"
    )
    if note := table.warmup_note(args, plan.train_iters):
        out.print(f"[yellow]{note}[/yellow]")


def _trained(plan: Plan, args: SftArguments) -> str:
    """What is trained of how much."""
    if args.sft_type == "full":
        rest = f", {100 * plan.trainable / plan.parameters:.3g} %; the others stay" if plan.trainable < plan.parameters else ""
        return f"trained: {plan.trainable:,} of {plan.parameters:,} parameters{rest}"
    share = 100 * plan.trainable / max(plan.parameters + plan.trainable, 1)
    return (
        f"trained: {plan.trainable:,} parameters of a LoRA adapter (rank {args.lora_rank}, alpha {args.lora_alpha:g}) "
        f"beside {plan.parameters:,} frozen ones, {share:.2g} % of all"
    )


def _shares(plan: Plan) -> str:
    """How a step's rows are shared out, beyond those of a micro batch."""
    if plan.gradient_accumulation_steps is None:  # the rows are those of a run begun at another layout
        return f"{plan.micro_batches} micro batches x {plan.dp} data-parallel ranks"
    return (
        f"{plan.gradient_accumulation_steps} accumulation x {plan.world_size} processes; "
        f"each data-parallel rank runs {plan.micro_batches} micro batches a step"
    )


def _stages(plan: Plan) -> str:
    """How many layers each pipeline stage has, where they differ."""
    return f" ({', '.join(map(str, plan.stages))} layers)" if len(set(plan.stages)) > 1 else ""


def _steps(plan: Plan, args: SftArguments) -> str:
    """How many steps, and why."""
    warm_up = f"{plan.megatron['lr_warmup_iters']} of them warm-up"
    if args.max_steps > 0:
        epochs = plan.train_iters * plan.global_batch / plan.train_rows
        return f"{plan.train_iters} steps (--max_steps), {warm_up}: {epochs:.3g} epochs of {plan.train_rows} rows"
    return (
        f"{plan.train_rows} rows x {args.num_train_epochs:g} epochs / {plan.global_batch} = {plan.train_iters} steps, {warm_up}"
    )


def _host_memory(plan: Plan) -> str:
    """A line on what is offloaded; nothing is said where nothing is."""
    if not plan.host_bytes:
        return ""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.host_bytes.items())
    total = sum(plan.host_bytes.values()) / 1e9
    layers = f"; activations of {plan.cpu_offloading_num_layers} layers" if plan.cpu_offloading_num_layers else ""
    return f"page-locked host memory of the fullest rank: at most {total:.2f} GB ({parts}){layers}\n"


def _fill_run_dir(run_dir: Path, args: SftArguments, plan: Plan, start: TrainingSource) -> None:
    """Config, tokenizer, options and plan go into the run before the first step, so that a killed run can be exported."""
    from megaswift.train.checkpoint.save import require_space

    if start.run_dir is None and not args.add_output_dir_suffix:
        _empty(run_dir, start)
    for name in clean(run_dir):
        say(f"[yellow]removed {name}, which an interrupted run left behind.[/yellow]")
    with filling(run_dir, new=start.run_dir is None):
        require_space(run_dir, plan.checkpoint_bytes, "one checkpoint")
        if start.run_dir is None:
            for file in side_files(start.root):
                shutil.copyfile(file, run_dir / file.name)
        found = {"dtype": plan.dtype, "sft_type": args.sft_type}
        write_args_file(run_dir, args, {**kept_places(args), **kept_data(args), **found})
        plan.save(run_dir / "plan.json")
    say(f"run directory: {shown(run_dir)}\n")


# What commands leave in a run's directory, beside the model's own files and what is exported there, which has a manifest.
_OF_A_RUN = (
    *RUN_FILES, "iter_*", "trash-*", ".iter_*", "runs", "images", "infer_result", "config.json", "generation_config.json", "tokenizer*", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "chat_template*",
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
    if others or (inside and not (run_dir / "plan.json").exists()):
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
