"""Weights that rows give to their messages, and rules to parts of them: loss, gradient norm and every gradient as transformers has them, at every layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megaswift.config.options import SftArguments
from megaswift.data.store import TokenRows
from megaswift.weights.torch_dist.reader import Reader
from tests.engine.test_packed import LAYOUTS, SAMPLES, job
from tests.ranks import RankPool
from tests.steps import first_steps, save_gradients
from tests.training import tiny_start

NAMES = ("tp1 pp1 dp1", "dp2", "tp2", "pp2", "tp2, sequence parallel", "cp2")


def write_weighted(path: Path) -> Path:
    """Rows of two answers; the first has a weight under one of the names, 0 and 1 among them; some rows bring none."""
    names, values = ("loss_weight", "loss_scale", "weight", "loss", "train"), (0.25, 0, 1, 2.5, None)
    with path.open("w", encoding="utf-8") as file:
        for k in range(SAMPLES):
            first: dict[str, Any] = {"role": "assistant", "content": f"one {k:02} " + "a" * (k % 3)}
            if values[k % 5] is not None:
                first[names[k % 4]] = values[k % 5]
            turns = [{"role": "user", "content": f"say {k:02}"}, first, {"role": "user", "content": "and"}]
            file.write(json.dumps({"messages": [*turns, {"role": "assistant", "content": f"again {k}"}]}) + "\n")
    return path


def one_step(jobs: list[tuple[str, str]]) -> list[tuple[float, float, int, float]]:
    """On one rank: (loss, gradient norm, supervised tokens, sum of weights) of each job's only step; gradients are saved."""
    result = []
    for trainer, batches, target in first_steps(jobs):
        sums = trainer.gradients(batches)
        save_gradients(trainer, sums, target)
        step = trainer.update(sums)
        result.append((step.loss, step.grad_norm or 0.0, int(step.metrics["supervised"]), step.weight))
    return result


def test_weights_of_messages(pool: RankPool, tmp_path: Path) -> None:
    from megaswift.parity.reference import Reference

    start, rows, rules = tiny_start(tmp_path), write_weighted(tmp_path / "rows.jsonl"), tmp_path / "rules.json"
    rules.write_text(json.dumps({r"\d+": 3, "again": [0.5, 0.25]}), encoding="utf-8")
    found = {}
    for number, name in enumerate(NAMES):
        world, *layout = LAYOUTS[name]
        jobs = []
        for form, options in (("packed", {"packing": True}), ("padded", {"padding_free": False})):
            path = tmp_path / f"{number}-{form}.json"
            with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world)}):
                made = job(start, rows, world, *layout, batch=1 if form == "packed" else 4, loss_scale=str(rules), **options)
            made.write(path)
            jobs.append((str(path), str(tmp_path / f"{name} {form}")))
        for (_, target), figures in zip(jobs, pool.run(world, one_step, jobs)[0], strict=True):
            found[Path(target).name] = figures
    data = TokenRows.open(made.data.train)  # of the last padded one
    reference = Reference(tmp_path / "hf", SftArguments(), "fp32", steps=1, warmup=0)
    wanted = next(reference.run(data, [np.arange(len(data))], keep=False))
    assert {0.25 * 3, 0.25, 2.5 * 3, 3.0, 0.5} <= {
        float(x) for row in range(len(data)) for sample in data.samples(row) for x in sample.weights
    }
    weights = [float(sample.weights[1:].sum()) for row in range(len(data)) for sample in data.samples(row)]
    first = Reader(tmp_path / f"{NAMES[0]} padded" / "iter_0000001")
    for name, (loss, norm, supervised, weight) in found.items():
        assert loss == pytest.approx(wanted.loss, rel=2e-6), name
        assert norm == pytest.approx(wanted.grad_norm, rel=1e-5), name
        assert weight == pytest.approx(sum(weights), rel=1e-6) and abs(weight - supervised) > 10, name
        reader = Reader(tmp_path / name / "iter_0000001")
        for key in first.keys:
            one, other = reader.read(key), first.read(key)
            if other.is_floating_point() and other.numel():
                assert float(torch.linalg.vector_norm(one - other) / other.norm()) < 1e-5, f"{name}: {key}"


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-5), ("bf16", 1e-2)], ids=str)
def test_weights_below_one_token(dtype: str, limit: float, pool: RankPool, tmp_path: Path) -> None:
    """A batch whose weights add up to less than 1 is divided by that sum, not by 1; and no precision rounds a weight."""
    start, rows = tiny_start(tmp_path), tmp_path / "rows.jsonl"
    figures = []
    for weight in (0.001, 1.0):
        answer = {"role": "assistant", "content": "yes", "loss_scale": weight}
        rows.write_text(json.dumps({"messages": [{"role": "user", "content": "say"}, answer]}) + "\n")
        made = job(start, rows, 1, 1, 1, False, 1, batch=1, samples=1, dtype=dtype)
        made.write(tmp_path / "run.json")
        figures += pool.run(1, one_step, [(str(tmp_path / "run.json"), str(tmp_path / str(weight)))])[0]
    assert figures[0][0] == pytest.approx(figures[1][0], rel=1e-5) and figures[0][3] < 0.1
    assert figures[0][1] == pytest.approx(figures[1][1], rel=limit)
