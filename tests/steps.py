"""One training step of a tiny model at several layouts, beside the same step of transformers and torch's AdamW, run once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from megaswift.data.store import TokenRows
from megaswift.models import parameters_of
from megaswift.models.parameters import as_stored
from megaswift.parity.compare import UPDATES, relative, worst
from megaswift.parity.reference import Reference, ReferenceStep
from megaswift.run.spec import Run
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader
from tests.engine.test_packed import job
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows

RATE = 1e-3
# So large that an update is nearly linear in the gradient: where that is rounding alone, Adam would make a step of it.
EPSILON = 1e-2
# What of a layout a run may differ by from the reference, relative: ten times what is seen.
LIMITS = {"loss": 2e-6, "norm": 2e-5, "gradient": 1e-4, "weight": 2e-6}
FORMS: dict[str, dict[str, Any]] = {"packed": {"packing": True}, "padded": {"padding_free": False}}


def first_steps(jobs: list[tuple[str, str]]) -> Iterator[tuple[Any, list[Any], Path]]:
    """On one rank, for each job (file of a Run, directory): its trainer, its first batches, the directory. Exhaust it."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.train.setup import open_batches, restore_trainer

    loaded = [Run.read(Path(path)) for path, _ in jobs]
    with ranks.joined(loaded[0].parallel, 42) as rank:
        for item, (_, target) in zip(loaded, jobs, strict=True):
            trainer, _ = restore_trainer(item)
            batches, _ = open_batches(item, rank)
            yield trainer, batches.step(0), Path(target)
            trainer.close()


def save_gradients(trainer: Any, sums: Tensor, target: Path) -> None:
    """The gradients at hand as a checkpoint of their own."""
    from megaswift.train.checkpoint.save import save
    from megaswift.train.gradients import Gradients

    gradients: Any = Gradients(trainer, trainer.gradient_divisor(sums))
    save(target, 1, gradients, only_model=True, extra={}, manifest={})


def take(jobs: list[tuple[str, str]]) -> list[dict[str, float]]:
    """On one rank: what each job's only step gives; its gradients, and its weights after it, are saved."""
    from megaswift.train.checkpoint.save import save

    result = []
    for trainer, batches, target in first_steps(jobs):
        sums = trainer.gradients(batches)
        save_gradients(trainer, sums, target / "gradients")
        step = trainer.update(sums)
        save(target / "weights", 1, trainer, only_model=True, extra={}, manifest={})
        result.append({"loss": step.loss, "norm": step.grad_norm})
    return result


class Steps:
    """A tiny model of a family with rows, and the reference's step.

    Args:
        changes: of the family's tiny config.
    """

    def __init__(self, root: Path, name: str, samples: int = 48, **changes: Any) -> None:
        self.root, self.samples = root, samples
        self.start, self.rows = tiny_start(root, name, **changes), write_rows(root / "rows.jsonl", samples)
        self.config, self.source = load_config(root / "hf"), HFCheckpoint.open(root / "hf")
        self.wanted: ReferenceStep | None = None

    def jobs(self, name: str, layout: tuple[Any, ...], forms: list[str], **options: Any) -> list[tuple[str, str]]:
        """Files of one run for each form, and where it puts its tensors."""
        world, made = layout[0], []
        for form in forms:
            path, target = (self.root / f"{name} {form}{end}" for end in (".json", ""))
            words = dict(learning_rate=RATE, adam_epsilon=EPSILON, samples=self.samples, **options, **FORMS[form])
            with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world)}):
                run = job(self.start, self.rows, *layout, batch=1 if form == "packed" else 2, **words)
            run.write(path)
            made.append((str(path), str(target)))
            if self.wanted is None:
                self.wanted = self._reference(run)
        return made

    def _reference(self, run: Run) -> ReferenceStep:
        from megaswift.config.options import SftArguments

        rows = TokenRows.open(run.data.train)  # type: ignore[arg-type]
        args = SftArguments(learning_rate=RATE, adam_epsilon=EPSILON)
        reference = Reference(self.root / "hf", args, "fp32", 1, run.schedule.warmup_iters)
        return next(reference.run(rows, [np.arange(len(rows))]))

    def differences(self, pool: RankPool, jobs: list[tuple[str, str]], world: int) -> Iterator[tuple[str, str, float, str]]:
        """(where, "loss" and so on, relative difference, tensor) of every run."""
        wanted = self.wanted
        assert wanted is not None
        results = pool.run(world, take, jobs)
        assert all(one == results[0] for one in results), "the ranks agree"
        for (_, target), found in zip(jobs, results[0], strict=True):
            place = Path(target).name
            yield place, "loss", relative(found["loss"], wanted.loss), ""
            yield place, "norm", relative(found["norm"], wanted.grad_norm), ""
            yield place, "gradient", *worst(self._pairs(Path(target) / "gradients", wanted.gradients))
            yield place, "weight", *worst(self._pairs(Path(target) / "weights", wanted.weights), floor=UPDATES * RATE)

    def _pairs(self, saved: Path, wanted: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        planned = planned_hf_tensors(Reader(saved / "iter_0000001"), self.config, Precisions(torch.float32))
        found = {one.name: one.produce() for one in planned}
        for part in (part for one in parameters_of(self.config) if not one.trained for part in one.hf):  # stays to the bit
            value = found.pop(part.name)
            assert saved.name == "gradients" or torch.equal(value, self.source.tensor(part.name)), part.name
        wanted = as_stored(parameters_of(self.config), wanted)
        assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:5]
        for name, value in wanted.items():
            if ".experts." in name and not value.any():  # no token went there
                assert not found[name].any(), name
                continue
            assert float(value.abs().max()) > 0, name
            yield name, found[name], value

    def check(self, pool: RankPool, name: str, layout: tuple[Any, ...], forms: list[str], **options: Any) -> None:
        """Raise AssertionError for a run at a layout that differs from the reference by more than the limits."""
        for place, what, found, tensor in self.differences(pool, self.jobs(name, layout, forms, **options), layout[0]):
            print(f"{place:40} {what:10} {found:.1e} {tensor}")
            assert found < LIMITS[what], f"{place}: {what} {found:.1e} {tensor}"
