"""`swift parity`: does this run compute what it should? Same flags as `swift sft`.

    NPROC_PER_NODE=2 swift parity --resume_from_checkpoint DIR --dataset FILE --pp 2 --steps 3
    swift parity --resume_from_checkpoint DIR --dataset FILE --layouts "tp1 tp2,sp pp2 tp2,pp2,dp2"
    NPROC_PER_NODE=2 swift parity --resume_from_checkpoint DIR --dataset FILE --pp 2 --learning true

The first form runs the same rows through transformers and through the engine, and compares loss, gradient norm, every
gradient and every weight after each step. The second compares the engine with itself at several layouts. The third trains
a whole run both ways and compares the curves and the final validation losses.
"""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megaswift.commands.export import export_main
from megaswift.commands.sft import sft_main
from megaswift.config.files import with_home
from megaswift.config.options import ExportArguments, ParityArguments, SftArguments, parse
from megaswift.data.batches import Batches
from megaswift.errors import DataError, UserError
from megaswift.launch import agent
from megaswift.launch.agent import Cluster, cluster
from megaswift.models import parameters_of
from megaswift.models.adapters import RANDOM
from megaswift.models.parameters import as_stored
from megaswift.parity import layers, learning, noise
from megaswift.parity.adapters import PeftSide
from megaswift.parity.compare import UPDATES, StepDifference, beyond, overall, relative, verdict, worst
from megaswift.parity.layouts import Layout, parse_layouts
from megaswift.parity.rank import GRADIENTS, LAYERS, LOG, NOISE, STATE, STOP_AFTER, WEIGHTS
from megaswift.parity.reference import Reference, write_samples
from megaswift.parity.show import draw, print_layouts, print_reference
from megaswift.run.method import parameters_of_adapter
from megaswift.run.resolve import global_batch_size
from megaswift.run.setup import prepared, resolved, template_of
from megaswift.run.source import resolve_source
from megaswift.run.spec import RUN_FILE
from megaswift.store.paths import iteration_directory
from megaswift.terminal import say
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.convert.lora_start import make_start
from megaswift.weights.load_hf import is_hf_folder
from megaswift.weights.torch_dist.reader import Reader

SAMPLES = "step1.jsonl"  # the first step's samples, so that its loss and norm can be had from transformers alone
RELATIVE = 1e-6  # largest relative difference of losses between layouts in fp32, at any step


def parity_main(args: ParityArguments | list[str]) -> Path:
    """Compare, print the table, write parity.json and parity.png; returns their directory.

    Raises DataError (exit 3) naming the first step and tensor that differ by more than the limit.
    """
    args = with_home(parse(ParityArguments, args) if isinstance(args, list) else args)
    names = {item.name for item in fields(SftArguments)}
    plain = SftArguments(**{name: getattr(args, name) for name in args.explicit() & names})
    if not args.learning:
        plain = plain.changed(max_steps=args.steps)
    if args.learning and args.layouts:
        raise UserError("--learning and --layouts are two comparisons.", where="--layouts", fix="run one after the other")
    if args.streaming:
        raise UserError(
            "parity reads all rows.", where="--streaming", fix="leave it out; dataset#N takes N rows of a large file"
        )
    if args.fp8:
        raise UserError(
            "--fp8 rounds more than parity allows: transformers has no such products to compare with.",
            where="--fp8",
            fix="leave it out; docs/performance.md has losses with and without it",
        )
    if args.task_type != "causal_lm":
        raise UserError(
            "parity compares language models; a model that gives scores is proven when it is exported.",
            where="--task_type",
            fix="leave it out; swift export --ckpt_dir RUN --to_hf true compares every score with transformers",
        )
    if args.new_special_tokens:
        raise UserError(
            "transformers starts from the weights as they are, without rows for new tokens.",
            where="--new_special_tokens",
            fix="convert first: swift export --to_megatron true --new_special_tokens ...; then leave it out here",
        )
    start = resolve_source(plain)
    if start.frozen:
        raise UserError(
            "the reference trains all weights.",
            where="--freeze_parameters",
            fix="leave it out: what is trained has the same gradients",
        )
    template = template_of(start.args, start)
    data = prepared(start.args, template, start)
    if args.learning and data.val is None:
        raise UserError(
            "there are no validation rows to judge the two models by.",
            where="--learning",
            fix="give --val_dataset, or --dataset_test_ratio above 0",
        )
    out = Path(args.output_dir).absolute() / f"parity-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out.mkdir(parents=True)
    run = _Runs(args, start, data, template.pad_id, out)
    if args.learning:
        problem = run.learning(plain)
    else:
        problem = run.layouts(parse_layouts(args.layouts)) if args.layouts else run.reference(cluster())
    if not args.keep_dumps:
        for part in (GRADIENTS, WEIGHTS, STATE, "model", "iter_*"):
            for path in out.rglob(part):
                shutil.rmtree(path, ignore_errors=True)
    say(f"details: {out / 'parity.json'}")
    if problem:
        raise DataError(
            f"parity does not hold: {problem}.",
            where=str(out / "parity.json"),
            fix="do not trust this layout's losses; report it with that file",
        )
    say("[bold]parity holds[/bold]")
    return out


class _Runs:
    """Engine runs from one start on one set of rows."""

    def __init__(self, args: ParityArguments, start: Any, data: Any, pad_id: int, out: Path) -> None:
        self.args, self.start, self.data, self.pad_id, self.out = args, start, data, pad_id, out
        self.noisy: list[list[float]] = []  # losses from weights moved by one rounding, for each seed

    def engine(
        self, name: str, args: SftArguments, place: Cluster, dump: bool = False, resume: bool = False, noise: int | None = None,
        batch: int | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Run the engine's steps, of `batch` rows where that is given, in a directory of their own; the rows of its log."""
        directory = self.out / name
        directory.mkdir()
        for part in (GRADIENTS, WEIGHTS) if dump else ():
            (directory / part).mkdir()
        run = resolved(args, self.start, self.data, place.world_size, directory, self.pad_id, batch)
        adapter = run.method.adapter
        if adapter is not None and adapter.is_part_of_base and run.method.base is not None:
            base = Path(run.method.base["path"])
            make_start(adapter, self.start.config, base, run.seed, Path(str(run.method.adapter_start)))
        elif adapter is not None:
            begun = replace(adapter, init=RANDOM)
            run = replace(run, method=replace(run.method, adapter=begun))
        if noise is not None:
            (directory / NOISE).write_text(str(noise), encoding="utf-8")
        half = run.schedule.train_iters // 2 if resume else 0
        if half:
            (directory / STOP_AFTER).write_text(str(half), encoding="utf-8")
        run.write(directory / RUN_FILE)
        agent.start_ranks(place, directory / RUN_FILE, module="megaswift.parity.rank")
        if half:
            run.going_on(half, iteration_directory(directory / STATE, half)).write(directory / RUN_FILE)
            agent.start_ranks(place, directory / RUN_FILE, module="megaswift.parity.rank")
        rows = [json.loads(line) for line in (directory / LOG).read_text(encoding="utf-8").splitlines()]
        self.spec = run
        return rows

    def reference(self, place: Cluster) -> str | None:
        """Engine against transformers."""
        folder = self._folder()
        say(f"engine: {place.world_size} processes, tp {self.start.args.tp}, pp {self.start.args.pp}, {self.start.dtype}")
        rows = self.engine("engine", self.start.args, place, dump=True)
        say("reference: transformers and torch.optim.AdamW, sample by sample")
        differences = list(self._differences(rows, folder))
        problem = verdict(differences, self.start.dtype)
        self._write({"reference": [item.to_dict() for item in differences], "dtype": self.start.dtype, "problem": problem})
        print_reference(differences, self.start.dtype)
        draw(
            self.out / "parity.png",
            [("transformers", [item.loss[0] for item in differences]), ("engine", [item.loss[1] for item in differences])],
        )
        return problem

    def _folder(self) -> Path:
        """The Hugging Face folder that transformers starts from: the start itself, or made from its Megatron weights."""
        if is_hf_folder(self.start.root):
            return Path(self.start.root)
        folder = self.out / "model"
        say("the start as a Hugging Face model, for the reference; comparing is what follows:")
        words = ExportArguments(
            ckpt_dir=str(self.start.root), to_hf=True, hf_output_dir=str(folder), model_type=self.start.args.model_type, verify=False
        )  # fmt: skip
        export_main(words)
        return folder

    def learning(self, args: SftArguments) -> str | None:
        """A whole run both ways."""
        import torch

        folder, threads = self._folder(), torch.get_num_threads()
        run_dir = sft_main(learning.options_of_run(args, self.out / "engine"))
        torch.set_num_threads(threads)  # the launcher tells its ranks, and so this process, to take one share of the cores
        say("reference: transformers and torch.optim.AdamW, sample by sample")
        curves = learning.follow(run_dir, self.start.args, folder, self.out / "reference" if self.args.keep_dumps else None)
        problem = learning.verdict(curves)
        self._write({"learning": curves.to_dict(), "dtype": self.start.dtype, "problem": problem})
        learning.print_curves(curves)
        draw(
            self.out / "parity.png",
            [("transformers", [pair[1] for pair in curves.loss]), ("engine", [pair[0] for pair in curves.loss])],
        )
        return problem

    def _differences(self, rows: list[dict[str, Any]], folder: Path) -> Any:
        args, steps = self.start.args, len(rows)
        batches = Batches(
            self.data.train, micro_batch_size=1, global_batch_size=self.spec.batch.global_batch_size, dp_rank=0, dp_size=1, seed=args.seed, pad_id=self.pad_id,
            group_by_length=self.spec.batch.group_by_length,
        )  # fmt: skip
        side = PeftSide.of(self.spec)
        reference = Reference(folder, args, self.start.dtype, steps, self.spec.schedule.warmup_iters, side)
        first = batches.sample_ids(0)
        write_samples(self.out / SAMPLES, (sample for row in first for sample in self.data.train.samples(int(row))))
        hidden = self._hidden(reference.layers(self.data.train, first))
        for row, wanted in zip(rows, reference.run(self.data.train, [batches.sample_ids(step) for step in range(steps)])):
            groups: dict[str, float] = {}
            gradient = worst(self._pairs(GRADIENTS, row["step"], wanted.gradients), groups)
            weights = self._pairs(WEIGHTS, row["step"], wanted.weights)
            if self.start.dtype == "fp32":
                weight = worst(weights, floor=UPDATES * args.learning_rate)
            else:
                weight = overall(weights)
            norm = row["grad_norm"] if row["grad_norm"] is not None else float("inf")
            yield StepDifference(
                row["step"], (wanted.loss, row["loss"]), (wanted.grad_norm, norm),
                relative(row["loss"], wanted.loss), relative(norm, wanted.grad_norm), groups, gradient, weight,
                hidden if row["step"] == 1 else [],
            )  # fmt: skip

    def _hidden(self, wanted: list[float]) -> list[tuple[str, float]]:
        """Every layer with the relative difference of its hidden states before the first step."""
        found = json.loads((self.out / "engine" / LAYERS).read_text(encoding="utf-8"))
        return [(name, relative(a, b)) for name, a, b in zip(layers.names(len(wanted) - 1), found, wanted)]

    def _pairs(self, part: str, step: int, wanted: dict[str, Any]) -> Any:
        """(name, engine's tensor, reference's tensor) of every Hugging Face tensor after a step."""
        import torch

        parameters = parameters_of(self.start.config)
        wanted = as_stored(parameters, wanted)
        buffers = {part.name for parameter in parameters if not parameter.trained for part in parameter.hf}
        reader = Reader(iteration_directory(self.out / "engine" / part, step))
        adapter = self.start.adapter
        listed = None if adapter is None else parameters_of_adapter(adapter, self.start.config)
        for planned in planned_hf_tensors(reader, self.start.config, Precisions(torch.float32), parameters=listed):
            if planned.name not in buffers:
                yield planned.name, planned.produce(), wanted[planned.name].cpu()

    def layouts(self, layouts: list[Layout]) -> str | None:
        """The engine at each layout against the first."""
        first = layouts[0]
        global_batch = self._global_batch(first)
        curves: list[tuple[str, list[float]]] = []
        times: list[float] = []
        for number, layout in enumerate(layouts):
            args = layout.apply(self.start.args, global_batch)
            say(f"{layout.name}: {layout.world_size} processes")
            rows = self.engine(f"{number}-{layout.name}", args, _here(layout), resume=layout.resume, batch=global_batch)
            curves.append((layout.name, [row["loss"] for row in rows]))
            times.append(_milliseconds(rows))
        limits = self._limits(first, global_batch, curves[0][1])
        table = [(name, [relative(value, wanted) for value, wanted in zip(losses, curves[0][1])]) for name, losses in curves]
        problem = beyond(table, limits)
        content = {"layouts": dict(curves), "limits": limits, "milliseconds": dict(zip(dict(curves), times))}
        self._write(content | {"dtype": self.start.dtype, "noise": self.noisy, "problem": problem})
        print_layouts(curves, table, limits, times)
        draw(self.out / "parity.png", curves)
        return problem

    def _limits(self, layout: Layout, global_batch: int, plain: list[float]) -> list[float]:
        """The largest relative difference that is allowed at each step: one number in fp32, else measured noise."""
        if self.start.dtype == "fp32":
            return [RELATIVE] * len(plain)
        args = layout.apply(self.start.args, global_batch)
        for seed in noise.SEEDS:
            say(f"{layout.name} from weights that differ by one rounding, seed {seed}: how far apart right answers are")
            rows = self.engine(f"noise-{seed}", args, _here(layout), noise=seed, batch=global_batch)
            self.noisy.append([row["loss"] for row in rows])
        return noise.band(plain, self.noisy)

    def _global_batch(self, layout: Layout) -> int:
        args = self.start.args.changed(tp=layout.tp, pp=layout.pp)
        return global_batch_size(args, layout.world_size)

    def _write(self, content: dict[str, Any]) -> None:
        (self.out / "parity.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _here(layout: Layout) -> Cluster:
    return Cluster(layout.world_size, 1, 0, "127.0.0.1", 0)


def _milliseconds(rows: list[dict[str, Any]]) -> float:
    """Median time of a step; the first, in which kernels are compiled, is left out where there are more."""
    values = sorted(row["ms"] for row in rows[1:] or rows)
    return float(values[len(values) // 2])
