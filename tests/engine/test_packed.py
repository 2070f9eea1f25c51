"""Packed rows give the loss and the gradients of the same samples apart, at every layout, pipeline, sequence and context parallel too."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.config.options import SftArguments
from megaswift.data.encode import prepare
from megaswift.run.setup import resolved, template_of
from megaswift.run.source import resolve_source
from megaswift.run.spec import Run
from megaswift.store.cache import cache_root
from megaswift.weights.torch_dist.reader import Reader
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows

SAMPLES, MAX_LENGTH = 48, 133
# processes, tp, pp, sequence parallel, cp, vpp where it is not 1
LAYOUTS = {
    "tp1 pp1 dp1": (1, 1, 1, False, 1),
    "dp2": (2, 1, 1, False, 1),
    "tp2": (2, 2, 1, False, 1),
    "pp2": (2, 1, 2, False, 1),
    "tp2, sequence parallel": (2, 2, 1, True, 1),
    "tp2 pp2, sequence parallel": (4, 2, 2, True, 1),
    "tp2 pp2 vpp2, sequence parallel": (4, 2, 2, True, 1, 2),
    "cp2": (2, 1, 1, False, 2),
    "tp2 cp2, sequence parallel": (4, 2, 1, True, 2),
}


def job(
    start: Path, rows: Path, world: int, tp: int, pp: int, sp: bool, cp: int, vpp: int = 1, *, batch: int, samples: int = SAMPLES,
    **more: Any,
) -> Run:  # fmt: skip
    """One step over all samples. `batch`: rows of a micro batch."""
    args = SftArguments(
        resume_from_checkpoint=str(start), dataset=[str(rows)], tp=tp, pp=pp, vpp=vpp, cp=cp, sequence_parallel=sp, batch_size=batch,
        max_length=MAX_LENGTH, dataset_test_ratio=0.0, max_steps=1, **more,
    )  # fmt: skip
    found = resolve_source(args)
    args = found.args
    template = template_of(args, found)
    data = prepare(args, template, cache_dir=cache_root(), packing=args.packing)
    assert data.report.train_samples == samples, "no sample may be left out"
    assert len(data.train) % (batch * world) == 0, f"{len(data.train)} rows are no whole micro batches"
    args = args.changed(gradient_accumulation_steps=len(data.train) // (batch * world))
    found = replace(found, args=args)
    return resolved(args, found, data, world, rows.parent, template.pad_id)


def gradients(jobs: list[tuple[str, str]]) -> list[tuple[float, float]]:
    """On one rank: the gradients of each (job file, directory), saved there; (summed loss, supervised tokens) of each."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.train.checkpoint.save import save
    from megaswift.train.gradients import Gradients
    from megaswift.train.setup import open_batches, restore_trainer

    loaded = [Run.read(Path(path)) for path, _ in jobs]
    result = []
    with ranks.joined(loaded[0].parallel, 42) as rank:
        trainer, _ = restore_trainer(loaded[0])
        for item, (_, target) in zip(loaded, jobs, strict=True):
            batches, _ = open_batches(item, rank)
            sums = trainer.gradients(batches.step(0))
            result.append((float(sums[0]), float(sums[1])))
            save(Path(target), 1, Gradients(trainer, trainer.gradient_divisor(sums)), only_model=True, extra={}, manifest={})
        trainer.close()
    return result


def test_packed_is_unpacked(pool: RankPool, tmp_path: Path) -> None:
    """Loss and every gradient to 1e-5 (relative, fp32): packed and padded, at nine layouts, all against one of them."""
    start, rows = tiny_start(tmp_path), write_rows(tmp_path / "rows.jsonl", SAMPLES)
    sums: dict[str, tuple[float, float]] = {}
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        jobs = []
        for form, options in (("packed", {"packing": True}), ("padded", {"padding_free": False})):
            path = tmp_path / f"{number}-{form}.json"
            with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(layout[0])}):
                job(start, rows, *layout, batch=1 if form == "packed" else 4, **options).write(path)
            jobs.append((str(path), str(tmp_path / f"{name} {form}")))
        found = pool.run(layout[0], gradients, jobs)
        assert all(one == found[0] for one in found), "the ranks agree"
        sums |= {Path(target).name: pair for (_, target), pair in zip(jobs, found[0], strict=True)}
    wanted = Reader(tmp_path / "tp1 pp1 dp1 padded" / "iter_0000001")
    loss, supervised = sums["tp1 pp1 dp1 padded"]
    assert len(wanted.keys) == 9 and supervised > 300
    for name, pair in sums.items():
        assert pair[1] == supervised, name
        assert pair[0] / supervised == pytest.approx(loss / supervised, abs=1e-5), name
        reader = Reader(tmp_path / name / "iter_0000001")
        for key in wanted.keys:
            one, other = reader.read(key), wanted.read(key)
            if not other.is_floating_point() or not other.numel():
                continue
            assert float(other.norm()) > 0, key
            assert float(torch.linalg.vector_norm(one - other) / other.norm()) < 1e-5, f"{name}: {key}"
