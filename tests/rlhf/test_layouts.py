"""A step of preference training is that of transformers and torch's AdamW at every layout: loss, figures, norm, gradients, weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.config.options import SftArguments
from megaswift.data.store import TokenRows
from megaswift.parity.adapters import PeftSide
from megaswift.parity.compare import UPDATES, relative, worst
from megaswift.run.spec import Run
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.config import load_config
from megaswift.weights.torch_dist.reader import Reader
from tests.engine.test_packed import LAYOUTS
from tests.lora.adapters import adapted, by_hf_name, lora_of, parameters_of, peft_model
from tests.ranks import RankPool
from tests.rlhf.pairs import PlainStep, any_reference, job, write_pairs
from tests.steps import EPSILON, LIMITS, RATE, save_gradients
from tests.training import tiny_start

BETA = 0.3
FORMS: dict[str, dict[str, Any]] = {
    "packed": {"packing": True, "batch": 1},
    "end to end": {"batch": 2},
    "padded": {"padding_free": False, "batch": 3},
}


def dpo(policy: Tensor, tokens: Tensor, reference: Tensor, good: Tensor) -> Tensor:
    """As published, with a tenth of the labels wrong, and half of the chosen answers' own loss."""
    chosen, rejected = policy[good], policy[~good]
    h = BETA * ((chosen - reference[good]) - (rejected - reference[~good]))
    return (-0.9 * F.logsigmoid(h) - 0.1 * F.logsigmoid(-h)).mean() + 0.5 * (-chosen / tokens[good]).mean()


OPTIONS: dict[str, Any] = {
    "beta": BETA,
    "label_smoothing": 0.1,
    "rpo_alpha": 0.5,
    "learning_rate": RATE,
    "adam_epsilon": EPSILON,
}


def take(jobs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """On one rank: what each job's only step gives; its gradients, and its weights after it, are saved."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.train.checkpoint.save import save

    result = []
    for trainer, batches, target in steps(jobs, ranks):
        evaluated = trainer.evaluated(iter([batches]))
        sums = trainer.gradients(batches)
        save_gradients(trainer, sums, target / "gradients")
        step = trainer.update(sums)
        save(target / "weights", 1, trainer, only_model=True, extra={}, manifest={})
        result.append({"loss": step.loss, "norm": step.grad_norm, "weight": step.weight, "eval": evaluated, **step.metrics})
    return result


def steps(jobs: list[tuple[str, str]], ranks: Any) -> Iterator[tuple[Any, list[Any], Path]]:
    """On one rank, for each job: its trainer, its first batches with a reference, the directory."""
    from megaswift.train.setup import open_batches, restore_trainer

    loaded = [Run.read(Path(path)) for path, _ in jobs]
    with ranks.joined(loaded[0].parallel, 42) as rank:
        for item, (_, target) in zip(loaded, jobs, strict=True):
            trainer, _ = restore_trainer(item)
            batches, _ = open_batches(item, rank)
            batches.rows.reference = any_reference(batches.rows)
            yield trainer, batches.step(0), Path(target)
            trainer.close()


def differences(target: Path, wanted: Any, read: Any) -> Iterator[tuple[str, float, str]]:
    """("gradient" or "weight", largest relative difference, tensor)."""
    for kind, values, floor in (("gradient", wanted.gradients, 0.0), ("weight", wanted.weights, UPDATES * RATE)):
        found = read(target / f"{kind}s" / "iter_0000001")
        assert found.keys() == values.keys()
        yield kind, *worst(((name, found[name], value) for name, value in values.items()), floor=floor)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_of_dpo(method: str, pool: RankPool, tmp_path: Path) -> None:
    start, rows = tiny_start(tmp_path, tie_word_embeddings=method == "full"), write_pairs(tmp_path / "rows.jsonl")
    folder, config = tmp_path / "hf", load_config(tmp_path / "hf")
    lora = lora_of(folder) if method == "lora" else None
    if lora is not None:
        peft_model(folder, lora).save_pretrained(tmp_path / "adapter")
    reference: Any = None
    wanted: Any = None
    for number, (name, (world, *layout)) in enumerate(LAYOUTS.items()):
        jobs = []
        for form, options in FORMS.items():
            path = tmp_path / f"{number}-{form}.json"
            run = job(start, rows, world, *layout, **OPTIONS, **options)
            run = run if lora is None else adapted(run, lora, tmp_path / "adapter")
            run.write(path)
            jobs.append((str(path), str(tmp_path / f"{name} {form}")))
            if wanted is None:
                data = TokenRows.open(run.data.train)
                data.reference = any_reference(data)
                args = SftArguments(learning_rate=RATE, adam_epsilon=EPSILON)
                side = None if lora is None else PeftSide(lora, run.seed, tmp_path / "adapter")
                reference = PlainStep(dpo, folder, args, "fp32", 1, run.schedule.warmup_iters, side)
                wanted = next(reference.run(data, [np.arange(len(data))]))
                figures = plain_figures(reference.said, data)
        read = (
            (lambda path: by_hf_name(path, parameters_of(folder, lora)))
            if lora is not None
            else (lambda path: full(path, config))
        )
        results = pool.run(world, take, jobs)
        assert all(one == results[0] for one in results), "the ranks agree"
        for (_, target), found in zip(jobs, results[0], strict=True):
            place = Path(target).name
            limits = [
                ("loss", relative(found["loss"], wanted.loss), ""),
                ("norm", relative(found["norm"], wanted.grad_norm), ""),
            ]
            for what, difference, tensor in (*limits, *differences(Path(target), wanted, read)):
                print(f"{place:50} {what:10} {difference:.1e} {tensor}")
                assert difference < LIMITS[what], f"{place}: {what} {difference:.1e} {tensor}"
            assert found["weight"] == 24
            for key, value in figures.items():
                assert found[key] == pytest.approx(value, rel=2e-5, abs=1e-5), f"{place}: {key}"
                assert found["eval"][1][key] == pytest.approx(value / 24, rel=2e-5, abs=1e-6), f"{place}: {key}"
            assert found["eval"][0] == pytest.approx(wanted.loss, rel=2e-6)


def plain_figures(said: Tensor, data: TokenRows) -> dict[str, float]:
    """What is logged, summed over the pairs."""
    assert data.reference is not None
    policy, reference = said.view(-1, 2), torch.from_numpy(data.reference).double().view(-1, 2)
    rewards = BETA * (policy - reference)
    return {
        "rewards/chosen": float(rewards[:, 0].sum()),
        "rewards/rejected": float(rewards[:, 1].sum()),
        "rewards/margins": float((rewards[:, 0] - rewards[:, 1]).sum()),
        "rewards/accuracies": float((rewards[:, 0] > rewards[:, 1]).sum()),
        "logps/chosen": float(policy[:, 0].sum()),
        "logps/rejected": float(policy[:, 1].sum()),
    }


def full(path: Path, config: Any) -> dict[str, Tensor]:
    """Hugging Face name -> value of all that a checkpoint of a whole model holds."""
    return {one.name: one.produce() for one in planned_hf_tensors(Reader(path), config, Precisions(torch.float32))}
