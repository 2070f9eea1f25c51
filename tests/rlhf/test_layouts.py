"""A step of preference training is that of transformers and torch's AdamW at every layout: loss, figures, norm, gradients, weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megaswift.config.options import SftArguments
from megaswift.data.store import TokenRows
from megaswift.parity.adapters import PeftSide
from megaswift.parity.compare import UPDATES, relative, worst
from megaswift.run.spec import Run
from megaswift.train.objectives import shown
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.config import load_config
from megaswift.weights.torch_dist.reader import Reader
from tests.engine.test_packed import LAYOUTS
from tests.lora.adapters import adapted, by_hf_name, lora_of, parameters_of, peft_model
from tests.ranks import RankPool
from tests.rlhf.pairs import MAX_LENGTH, PlainStep, any_reference, job, write_labelled, write_pairs
from tests.steps import EPSILON, LIMITS, RATE, save_gradients
from tests.training import long, tiny_start

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


def orpo(policy: Tensor, tokens: Tensor, reference: Tensor, good: Tensor) -> Tensor:
    mean = policy / tokens
    odds = mean - torch.log(1 - mean.exp())
    return (-BETA * F.logsigmoid(odds[good] - odds[~good]) - mean[good]).mean()


def simpo(policy: Tensor, tokens: Tensor, reference: Tensor, good: Tensor) -> Tensor:
    mean = policy / tokens
    return (-F.logsigmoid(BETA * (mean[good] - mean[~good]) - 0.7)).mean()


def kto(policy: Tensor, tokens: Tensor, reference: Tensor, good: Tensor) -> Tensor:
    """Good answers weigh 1.5, and the distance is that of every second sample, which nothing learns from."""
    ratio = policy - reference
    distance = ratio[1::2].detach().mean().clamp(min=0)
    assert distance > 0.1
    away, labels = BETA * (ratio[::2] - distance), good[::2]
    return torch.where(labels, 1.5 * (1 - away.sigmoid()), 0.8 * (1 - (-away).sigmoid())).mean()


RATES: dict[str, Any] = {"learning_rate": RATE, "adam_epsilon": EPSILON}
SOME = ("tp1 pp1 dp1", "dp2", "tp2, sequence parallel", "cp2", "tp2 pp2 vpp2, sequence parallel")
LATER = SOME if "MEGASWIFT_LONG" in os.environ else SOME[:1] + SOME[2:4]  # of what shares its way with another method
EVERY = tuple(LAYOUTS) if "MEGASWIFT_LONG" in os.environ else SOME  # by `make test-long`
# method: loss, options, whether beside an adapter, layouts
METHODS: dict[str, tuple[Any, dict[str, Any], bool, tuple[str, ...]]] = {
    "dpo": (dpo, {"beta": BETA, "label_smoothing": 0.1, "rpo_alpha": 0.5}, False, EVERY),
    "dpo, lora": (dpo, {"beta": BETA, "label_smoothing": 0.1, "rpo_alpha": 0.5}, True, EVERY),
    "kto": (kto, {"rlhf_type": "kto", "beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.8}, False, EVERY),
    "kto, lora": (kto, {"rlhf_type": "kto", "beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.8}, True, LATER),
    "orpo": (orpo, {"rlhf_type": "orpo", "beta": BETA}, False, LATER),
    "simpo": (simpo, {"rlhf_type": "simpo", "beta": BETA, "simpo_gamma": 0.7, "cpo_alpha": 0.0}, False, LATER),
}  # fmt: skip


BALANCE = 0.4  # of routers; their loss counts as the pairs of a micro batch do


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
        result.append(
            {"loss": step.loss, "norm": step.grad_norm, "weight": step.weight, "eval": evaluated, "metrics": step.metrics}
        )
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


def test_a_step_of_a_model_with_experts(pool: RankPool, tmp_path: Path) -> None:
    """Spread over two processes or not, with the loss that balances their load."""
    start, rows = tiny_start(tmp_path, "granitemoe"), write_pairs(tmp_path / "rows.jsonl")
    config, wanted = load_config(tmp_path / "hf"), None
    options: dict[str, Any] = {**METHODS["dpo"][1], **RATES, "moe_aux_loss_coeff": BALANCE, "batch": 1}
    for name, more in (("tp1 pp1 dp1", {}), ("dp2", {"ep": 2}), ("tp2, sequence parallel", {"ep": 2})):
        world, *layout = LAYOUTS[name]
        run = job(start, rows, world, *layout, **options, **more)
        run.write(tmp_path / f"{name}.json")
        if wanted is None:
            data = TokenRows.open(run.data.train)
            data.reference = any_reference(data)
            reference = PlainStep(dpo, tmp_path / "hf", SftArguments(**RATES), "fp32", 1, run.schedule.warmup_iters)
            reference.balance = BALANCE
            wanted = next(reference.run(data, [np.arange(len(data))]))
            reference.save(tmp_path / "updated")  # in memory transformers names experts otherwise
            after = load_file(tmp_path / "updated" / "model.safetensors")
        found = pool.run(world, take, [(str(tmp_path / f"{name}.json"), str(tmp_path / name))])[0][0]
        limits = [("loss", relative(found["loss"], wanted.loss), ""), ("norm", relative(found["norm"], wanted.grad_norm), "")]
        weights = full(tmp_path / name / "weights" / "iter_0000001", config)
        limits.append(("weight", *worst(((key, weights[key], value) for key, value in after.items()), floor=UPDATES * RATE)))
        for what, difference, tensor in limits:
            print(f"{name:40} {what:10} {difference:.1e} {tensor}")
            assert difference < LIMITS[what], f"{name}: {what} {difference:.1e} {tensor}"


@pytest.mark.parametrize("method", [pytest.param(name, marks=long if name == "kto, lora" else ()) for name in METHODS])
def test_a_step(method: str, pool: RankPool, tmp_path: Path) -> None:
    worth, options, with_adapter, names = METHODS[method]
    start = tiny_start(tmp_path, tie_word_embeddings=not with_adapter)
    labelled = options.get("rlhf_type") == "kto"
    rows = (write_labelled if labelled else write_pairs)(tmp_path / "rows.jsonl")
    folder, config = tmp_path / "hf", load_config(tmp_path / "hf")
    lora = lora_of(folder) if with_adapter else None
    if lora is not None:
        peft_model(folder, lora).save_pretrained(tmp_path / "adapter")
    wanted: Any = None
    for number, name in enumerate(names):
        (world, *layout), jobs = LAYOUTS[name], []
        for form, words in FORMS.items():
            path = tmp_path / f"{number}-{form}.json"
            length = 116 if labelled else MAX_LENGTH  # eight packed rows
            run = job(start, rows, world, *layout, **RATES, **options, **words, max_length=length)
            run = run if lora is None else adapted(run, lora, tmp_path / "adapter")
            run.write(path)
            jobs.append((str(path), str(tmp_path / f"{name} {form}")))
            if wanted is None:
                data = TokenRows.open(run.data.train)
                data.reference = any_reference(data)
                args = SftArguments(**RATES)
                side = None if lora is None else PeftSide(lora, run.seed, tmp_path / "adapter")
                reference = PlainStep(worth, folder, args, "fp32", 1, run.schedule.warmup_iters, side)
                wanted = next(reference.run(data, [np.arange(len(data))]))
                assert reference.said is not None
                figures = (figures_of_labelled if labelled else figures_of_pairs)(reference.said, data, method)
        read = (
            (lambda path: by_hf_name(path, parameters_of(folder, lora)))
            if lora is not None
            else (lambda path: full(path, config))
        )
        require_alike(method, jobs, pool.run(world, take, jobs), wanted, read, figures)


def require_alike(
    method: str, jobs: list[tuple[str, str]], results: Any, wanted: Any, read: Any, figures: dict[str, float]
) -> None:
    """Every rank's steps are `wanted`: loss, norm, gradients and weights, and the figures that are logged, in evaluations too.

    Args:
        jobs: of each the run and where its gradients and weights lie; results: of each rank what `take` gives.
        read: a checkpoint -> its tensors by name.
    """
    assert all(one == results[0] for one in results), "the ranks agree"
    for (_, target), found in zip(jobs, results[0], strict=True):
        place = f"{method}: {Path(target).name}"
        limits = [("loss", relative(found["loss"], wanted.loss), ""), ("norm", relative(found["norm"], wanted.grad_norm), "")]
        for what, difference, tensor in (*limits, *differences(Path(target), wanted, read)):
            print(f"{place:50} {what:10} {difference:.1e} {tensor}")
            assert difference < LIMITS[what], f"{place}: {what} {difference:.1e} {tensor}"
        assert found["weight"] == 24
        means, (loss, weight, sums) = shown(found["metrics"], found["weight"]), found["eval"]
        for key, value in figures.items():
            assert means[key] == pytest.approx(value, rel=2e-5, abs=1e-6), f"{place}: {key}"
            assert shown(sums, weight)[key] == pytest.approx(value, rel=2e-5, abs=1e-6), f"{place}: {key}"
        assert loss == pytest.approx(wanted.loss, rel=2e-6)


def figures_of_pairs(said: Tensor, data: TokenRows, method: str) -> dict[str, float]:
    """What is logged of pairs, as means."""
    assert data.reference is not None
    policy, reference = said.view(-1, 2), torch.from_numpy(data.reference).double().view(-1, 2)
    if not method.startswith("dpo"):
        counts = [float(sample.kept[1:].sum()) for row in range(len(data)) for sample in data.samples(row)]
        policy, reference = policy / torch.tensor(counts).view(-1, 2), torch.zeros(())
    rewards = BETA * (policy - reference)
    return {
        "rewards/chosen": float(rewards[:, 0].mean()),
        "rewards/rejected": float(rewards[:, 1].mean()),
        "rewards/margins": float((rewards[:, 0] - rewards[:, 1]).mean()),
        "rewards/accuracies": float((rewards[:, 0] > rewards[:, 1]).double().mean()),
        "logps/chosen": float(policy[:, 0].mean()),
        "logps/rejected": float(policy[:, 1].mean()),
    }


def figures_of_labelled(said: Tensor, data: TokenRows, method: str) -> dict[str, float]:
    """What is logged of answers with labels: means of each kind."""
    assert data.reference is not None
    policy, ratio = said[::2], (said - torch.from_numpy(data.reference).double())
    good = torch.from_numpy(np.concatenate([data.desirable(row) for row in range(len(data))]))[::2]
    rewards = BETA * ratio[::2]
    return {
        "rewards/chosen": float(rewards[good].mean()),
        "rewards/rejected": float(rewards[~good].mean()),
        "rewards/margins": float(rewards[good].mean() - rewards[~good].mean()),
        "logps/chosen": float(policy[good].mean()),
        "logps/rejected": float(policy[~good].mean()),
        "kl": float(ratio[1::2].mean()),
    }


def full(path: Path, config: Any) -> dict[str, Tensor]:
    """Hugging Face name -> value of all that a checkpoint of a whole model holds."""
    return {one.name: one.produce() for one in planned_hf_tensors(Reader(path), config, Precisions(torch.float32))}
