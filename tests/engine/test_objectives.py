"""An objective of whole sequences is what plain PyTorch makes of transformers' logits: loss, metrics, every gradient, at every layout."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.data.store import TokenRows
from megaswift.data.tokens import weights_of
from megaswift.run.spec import Run
from megaswift.train.log import RunLog
from megaswift.train.objectives import Loss, SequenceObjective
from megaswift.train.trainer import StepResult
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.config import load_config
from megaswift.weights.torch_dist.reader import Reader
from tests.engine.test_loss_weights import NAMES, write_weighted
from tests.engine.test_packed import LAYOUTS, job
from tests.ranks import RankPool
from tests.runs import changed, resolved_run
from tests.training import tiny_start


def good_sequences(log_probabilities: Tensor, tokens: Tensor, batch: Any = None) -> Loss:
    """The sum of log-sigmoids of mean log-probabilities: nonlinear, so that every sequence's tokens get a factor of their own."""
    real = tokens > 0  # what pads a packed row is no sequence
    margins = log_probabilities[real] / tokens[real] + 6.0
    return Loss(-F.logsigmoid(margins).sum(), real.sum().float(), {"better": (margins > 0).sum().float()})


def one_step(jobs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """On one rank: what each job's only step gives, and its loss as an evaluation; gradients are saved."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.train.checkpoint.save import save
    from megaswift.train.gradients import Gradients
    from megaswift.train.setup import open_batches, restore_trainer

    loaded = [Run.read(Path(path)) for path, _ in jobs]
    result = []
    with ranks.joined(loaded[0].parallel, 42) as rank:
        for item, (_, target) in zip(loaded, jobs, strict=True):
            trainer, _ = restore_trainer(item)
            trainer.objective = SequenceObjective(good_sequences, metrics=("better",))
            batches, _ = open_batches(item, rank)
            evaluated = trainer.evaluate(iter([batches.step(0)]))
            sums = trainer.gradients(batches.step(0))
            save(Path(target), 1, Gradients(trainer, trainer.gradient_divisor(sums)), only_model=True, extra={}, manifest={})
            step = trainer.update(sums)
            result.append({"loss": step.loss, "eval": evaluated, "norm": step.grad_norm, "weight": step.weight, **step.metrics})
            trainer.close()
    return result


def plain(folder: Path, data: TokenRows) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The same of transformers' logits, sample by sample; and the gradients by name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    sums, tokens = [], []
    for sample in (sample for row in range(len(data)) for sample in data.samples(row)):
        ids, weights = torch.tensor(sample.ids[None]).long(), torch.from_numpy(weights_of(sample))[1:]
        found = F.log_softmax(model(ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None]).squeeze(1)
        sums.append((found * weights).sum())
        tokens.append(weights.sum())
    loss = good_sequences(torch.stack(sums), torch.stack(tokens))
    (loss.total / loss.weight).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    norm = float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())
    mean = float(loss.total.detach() / loss.weight)
    return {
        "loss": mean,
        "eval": mean,
        "norm": norm,
        "weight": float(loss.weight),
        "better": float(loss.metrics["better"]),
    }, gradients


def test_log_probabilities_of_sequences(pool: RankPool, tmp_path: Path) -> None:
    """Packed rows of a tied model and padded rows of an untied one, with weights of tokens, at every layout."""
    rows = write_weighted(tmp_path / "rows.jsonl")
    forms: dict[str, dict[str, Any]] = {"packed": {"packing": True}, "padded": {"padding_free": False}}
    starts = {form: tiny_start(tmp_path / form, tie_word_embeddings=form == "packed") for form in forms}
    found, data = {}, {}
    for number, name in enumerate(NAMES):
        world, *layout = LAYOUTS[name]
        jobs = []
        for form, options in forms.items():
            path = tmp_path / f"{number}-{form}.json"
            with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world)}):
                made = job(starts[form], rows, world, *layout, batch=1 if form == "packed" else 4, **options)
            made.write(path)
            data[form] = TokenRows.open(made.data.train)
            jobs.append((str(path), str(tmp_path / f"{name} {form}")))
        for (_, target), figures in zip(jobs, pool.run(world, one_step, jobs)[0], strict=True):
            found[Path(target).name] = figures
    for form in forms:
        figures, gradients = plain(tmp_path / form / "hf", data[form])
        config = load_config(tmp_path / form / "hf")
        assert 0 < figures["better"] < figures["weight"]
        for name in NAMES:
            assert found[f"{name} {form}"] == pytest.approx(figures, rel=1e-5), f"{name} {form}"
            reader, seen = Reader(tmp_path / f"{name} {form}" / "iter_0000001"), set()
            for tensor in planned_hf_tensors(reader, config, Precisions(torch.float32)):
                wanted = gradients[tensor.name]
                difference = torch.linalg.vector_norm(tensor.produce() - wanted) / wanted.norm()
                assert float(difference) < 2e-5, f"{name} {form}: {tensor.name} {float(difference)}"
                seen.add(tensor.name)
            assert seen == set(gradients)


def test_metrics_are_logged_as_means(tmp_path: Path) -> None:
    """Divided by the weights of the steps since the last line, as the loss is; a step without an update is no part of it."""
    steps = [
        StepResult(0.5, 1.0, 1e-3, 4.0, {"supervised": 40.0, "better": 3.0}, tokens=50),
        StepResult(math.nan, math.nan, 1e-3, 4.0, {"supervised": 40.0, "better": math.nan}, tokens=50, nonfinite=True),
        StepResult(0.1, 1.0, 1e-3, 12.0, {"supervised": 20.0, "better": 12.0}, tokens=50),
    ]
    run = changed(resolved_run(max_steps=4, logging_steps=4), first_step=1, logging_dir=str(tmp_path))
    with contextlib.closing(RunLog(tmp_path, run, active=True, on_gpu=False)) as log:
        for number, result in enumerate(steps, start=2):
            log.step(number, result, seconds=2.0)
    [row] = [json.loads(line) for line in (tmp_path / "logging.jsonl").read_text().splitlines()]
    assert row["loss"] == pytest.approx((0.5 * 4 + 0.1 * 12) / 16) and row["better"] == pytest.approx(15 / 16)
    assert row["supervised_tokens_per_second"] == pytest.approx(100 / 6, abs=0.1) and "supervised" not in row
