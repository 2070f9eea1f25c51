"""`swift sft`: full fine-tuning with Megatron-Core.

    NPROC_PER_NODE=4 swift sft --resume_from_checkpoint qwen2-7b-instruct-tp2-pp1 --dataset self-cognition#500 ...

This process checks everything and prepares the data once, before any rank starts; then torchrun starts the ranks, or,
for one process, the loop runs right here.
"""

from __future__ import annotations

import datetime
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.args_file import MODEL_OPTIONS, fill_from_file, read_args_file, write_args_file
from megaswift.arguments import SftArguments, parse
from megaswift.cache import cache_root
from megaswift.checkpoint import layout
from megaswift.errors import UserError
from megaswift.plan import Plan, check_layout, check_numbers, make_plan, usable_length
from megaswift.terminal import console, say

if TYPE_CHECKING:
    from megaswift.data.chat import ChatTemplate
    from megaswift.data.encode import PreparedData
    from megaswift.engine.launch import Cluster

_VERSION = re.compile(r"v(\d+)-.*")


def sft_main(args: SftArguments | list[str]) -> Path:
    """Train, and return the directory of the run.

    Args:
        args: options, or the words of the command line.

    Raises MegaswiftError; bad input is found before any process group exists, and leaves nothing behind.
    """
    args = parse(SftArguments, args) if isinstance(args, list) else args
    from megaswift.data.encode import prepare
    from megaswift.engine import launch

    place = launch.cluster()
    start = find_start(args)
    args = start.args
    template = _template(args, start)
    data = prepare(args, template, cache_dir=cache_root(), packing=args.packing)
    run_dir = start.run_dir or new_run_dir(args)
    plan = _plan(args, start, data, place, run_dir)
    if place.leads:
        _print_plan(plan, data, args)
        _fill_run_dir(run_dir, args, plan, start)
    job = _job(args, start, data, plan, template.pad_id)
    path = run_dir / "job.json" if place.leads else cache_root() / f"job-{run_dir.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    job.write(path)
    try:
        if place.world_size == 1:
            from megaswift.engine.loop import run

            run(job)
        else:
            launch.start_ranks(place, path)
    finally:
        if place.leads:
            _draw(run_dir)
    if place.leads:
        say(f"[bold]{_shown(run_dir)}[/bold] is ready. Next: swift export --ckpt_dir {_shown(run_dir)} --to_hf true")
    return run_dir


@dataclass(frozen=True)
class Start:
    """What training starts from."""

    args: SftArguments  # options, those of the directory filled in
    root: Path  # Megatron directory with config.json and tokenizer
    checkpoint: Path  # torch_dist directory in it
    config: Any
    dtype: str
    run_dir: Path | None  # the run to go on with, if it is one
    first_step: int


def find_start(args: SftArguments) -> Start:
    """Find and check the Megatron directory of --resume_from_checkpoint, and what it says about itself."""
    root = Path(args.resume_from_checkpoint or _default_start(args)).absolute()
    if not layout.is_megatron_directory(root):
        name = args.model_type or "NAME"
        raise UserError(
            f"{_shown(root)} is not a directory of Megatron weights.",
            where="--resume_from_checkpoint",
            fix=f"make one with: swift export --model_type {name} --to_megatron true --tp {args.tp} --pp {args.pp}",
        )
    values = read_args_file(root)
    args = fill_from_file(args, values, (*MODEL_OPTIONS, "tp", "pp"))
    if not args.model_type:
        raise UserError("the directory does not say its model_type.", where=str(root), fix="give --model_type NAME")
    checkpoint = layout.find_checkpoint(root)
    from megaswift.checkpoint.manifest import read_manifest
    from megaswift.hf.config import load_config

    config = load_config(root)
    check_numbers(args)
    check_layout(config, args.tp, args.pp, None, args.sequence_parallel)
    manifest = read_manifest(checkpoint)
    goes_on = bool(manifest.get("optimizer")) and layout.iteration_of(checkpoint) > 0
    return Start(
        args=args.changed(max_length=usable_length(config, args.max_length, given="max_length" in args.explicit())),
        root=root,
        checkpoint=checkpoint,
        config=config,
        dtype=_dtype(args, str(manifest.get("dtype"))),
        run_dir=root if goes_on else None,
        first_step=layout.iteration_of(checkpoint) if goes_on else 0,
    )


def _default_start(args: SftArguments) -> str:
    if not args.model_type:
        raise UserError(
            "nothing says which weights to train.",
            where="swift sft",
            fix="give --resume_from_checkpoint DIR or --model_type NAME",
        )
    return f"{args.model_type}-tp{args.tp}-pp{args.pp}"


def _dtype(args: SftArguments, stored: str) -> str:
    """The training precision: the flag, else bf16 on a GPU that has it and fp32 on a CPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    if "dtype" in args.explicit() and args.dtype != "AUTO":
        if not on_gpu and args.dtype != "fp32":
            say(f"[yellow]{args.dtype} on a CPU is many times slower than fp32; leave --dtype out for fp32.[/yellow]")
        return args.dtype
    if not on_gpu:
        return "fp32"
    if stored == "fp32":
        return "fp32" if args.dtype == "fp32" else "bf16"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _template(args: SftArguments, start: Start) -> ChatTemplate:
    """The chat template of the run."""
    if not args.dataset:
        raise UserError(
            "no training data is named.", where="--dataset", fix="for example: --dataset self-cognition#500 my_rows.jsonl"
        )
    from transformers import AutoTokenizer

    from megaswift.data.chat import ChatTemplate

    tokenizer = AutoTokenizer.from_pretrained(start.root, local_files_only=True, trust_remote_code=False)
    return ChatTemplate(tokenizer, args.template_type, args.system, fallback=_registered_template(args))


def _registered_template(args: SftArguments) -> str | None:
    from megaswift.families.model_types import MODEL_TYPES

    entry = MODEL_TYPES.get(args.model_type or "")
    return entry.template if entry else None


def new_run_dir(args: SftArguments) -> Path:
    """Name of a new run: {output_dir}/{model_type}-tp{tp}-pp{pp}/v{N}-{time}, or output_dir itself without the suffix."""
    root = Path(args.output_dir).absolute()
    if not args.add_output_dir_suffix:
        if root.exists() and any(root.iterdir()) and not args.overwrite:
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


def _plan(args: SftArguments, start: Start, data: PreparedData, place: Cluster, run_dir: Path) -> Plan:
    return make_plan(
        args,
        start.config,
        model_type=str(args.model_type),
        dtype=start.dtype,
        world_size=place.world_size,
        train_rows=len(data.train),
        val_rows=len(data.val) if data.val is not None else 0,
        load=str(start.root),
        save=str(run_dir),
    )


def _print_plan(plan: Plan, data: PreparedData, args: SftArguments) -> None:
    """The data report, the filled mapping table and the arithmetic of the steps, once."""
    from megaswift.data.report import print_report

    out = console()
    print_report(data.report, out)
    out.print("\n[bold]What Megatron-Core is told[/bold] (and the option or formula that it comes from)")
    for megatron, expression, value in plan.table:
        shown = _shown(Path(value)) if value.startswith("/") else value
        out.print(f"  {megatron:38} [bold]{shown:12}[/bold]  {expression}")
    out.print()
    out.print(
        f"{plan.world_size} processes = tp {plan.tp} x pp {plan.pp} x dp {plan.dp}, {plan.dtype}\n"
        f"global batch {plan.global_batch} = {args.batch_size} rows x {plan.gradient_accumulation_steps} accumulation x {plan.world_size} processes; "
        f"each data-parallel rank runs {plan.micro_batches} micro batches a step\n"
        f"{plan.train_rows} rows x {args.num_train_epochs:g} epochs / {plan.global_batch} = {plan.train_iters} steps, "
        f"{plan.megatron['lr_warmup_iters']} of them warm-up; {plan.val_rows} validation rows\n"
        f"memory of the fullest rank without activations: {sum(plan.rank_bytes.values()) / 1e9:.2f} GB "
        f"(weights {plan.rank_bytes['weights'] / 1e9:.2f}, gradients {plan.rank_bytes['gradients'] / 1e9:.2f}, optimizer {plan.rank_bytes['optimizer'] / 1e9:.2f}); "
        f"one checkpoint {plan.checkpoint_bytes / 1e9:.2f} GB\n"
    )


def _fill_run_dir(run_dir: Path, args: SftArguments, plan: Plan, start: Start) -> None:
    """Config, tokenizer, options and plan go into the run before the first step, so that a killed run can be exported."""
    from megaswift.checkpoint.save import require_space
    from megaswift.hf.folder import side_files

    if start.run_dir is None and not args.add_output_dir_suffix and args.overwrite and run_dir.exists():
        _empty(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        require_space(run_dir, plan.checkpoint_bytes, "one checkpoint")
        if start.run_dir is None:
            for file in side_files(start.root):
                shutil.copyfile(file, run_dir / file.name)
        write_args_file(run_dir, args, {"dtype": plan.dtype, "sft_type": "full"})
        plan.save(run_dir / "plan.json")
    except OSError as error:
        raise UserError(
            f"the run's directory cannot be written: {error.strerror}.", where=str(run_dir), fix="choose another --output_dir"
        ) from error
    say(f"run directory: {_shown(run_dir)}\n")


def _empty(run_dir: Path) -> None:
    """Remove an earlier run from a directory that is to be used again."""
    if not (run_dir / "plan.json").exists():
        raise UserError(
            "this directory holds no run, so it is not replaced.",
            where=str(run_dir),
            fix="remove it yourself, or choose another --output_dir",
        )
    shutil.rmtree(run_dir)


def _job(args: SftArguments, start: Start, data: PreparedData, plan: Plan, pad_id: int) -> Any:
    from megaswift.engine.loop import Job

    return Job(
        plan=plan,
        options=args.to_dict(),
        checkpoint=str(start.checkpoint),
        model_dir=str(start.root),
        train_data=str(data.train.path),
        val_data=str(data.val.path) if data.val is not None else None,
        pad_id=pad_id,
        first_step=start.first_step,
    )


def _draw(run_dir: Path) -> None:
    from megaswift.report import write_images

    with suppress(OSError):
        write_images(run_dir)


def _shown(path: Path) -> str:
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
