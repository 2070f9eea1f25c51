"""A step of a model that gives scores is that of transformers' own class at every layout: loss, figures, norm, gradients, weights."""

from __future__ import annotations

import json
import os
from functools import partial
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
from megaswift.run.spec import Run
from megaswift.train.objectives import shown
from megaswift.weights.hf.config import load_config
from tests.engine.test_packed import LAYOUTS
from tests.lora.adapters import adapted, by_hf_name, lora_of, parameters_of, peft_model
from tests.ranks import RankPool
from tests.rlhf.pairs import MAX_LENGTH, job, write_pairs
from tests.rlhf.scored import PlainScores, scored_folder, write_classes, write_margins
from tests.rlhf.test_layouts import FORMS, RATES, full, require_alike
from tests.steps import save_gradients
from tests.training import tiny_start

CENTER = 0.3


def rewards(scores: Tensor, margins: Tensor) -> Tensor:
    """As TRL has it."""
    chosen, rejected = scores[::2, 0], scores[1::2, 0]
    loss = -F.logsigmoid(chosen - rejected - margins[::2, 0]).mean()
    return loss + CENTER * torch.mean((chosen + rejected) ** 2)


def one_class(scores: Tensor, values: Tensor) -> Tensor:
    return F.cross_entropy(scores, values[:, 0].long())


LONG = "MEGASWIFT_LONG" in os.environ  # by `make test-long` every method at every layout
SOME = tuple(LAYOUTS) if LONG else ("tp1 pp1 dp1", "tp2", "tp2, sequence parallel", "pp2", "cp2")
TWO = tuple(LAYOUTS) if LONG else ("dp2", "tp2, sequence parallel")
CLASSES = {"arguments": SftArguments, "task_type": "seq_cls"}
# method: loss, options, whether beside an adapter, layouts
METHODS: dict[str, tuple[Any, dict[str, Any], bool, tuple[str, ...]]] = {
    "rm": (rewards, {"rlhf_type": "rm", "center_rewards_coefficient": CENTER}, False, SOME),
    "rm, lora": (rewards, {"rlhf_type": "rm", "center_rewards_coefficient": CENTER}, True, TWO),
    "one class": (one_class, {**CLASSES, "num_labels": 5}, False, TWO),
    "several classes": (
        F.binary_cross_entropy_with_logits, {**CLASSES, "num_labels": 3, "problem_type": "multi_label_classification"}, False, SOME[:1],
    ),
    "numbers": (F.mse_loss, {**CLASSES, "num_labels": 2, "problem_type": "regression"}, False, SOME[4:]),
}  # fmt: skip
LABELS = {
    "one class": lambda k: k % 5,
    "several classes": lambda k: [one for one in range(3) if (k + one) % 2],
    "numbers": lambda k: [0.1 * k, -1 + k % 3],
}


def take(jobs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """On one rank: what each job's only step gives; its gradients, and its weights after it, are saved."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.train.checkpoint.save import save
    from megaswift.train.setup import open_batches, restore_trainer

    result = []
    loaded = [Run.read(Path(path)) for path, _ in jobs]
    with ranks.joined(loaded[0].parallel, 42) as rank:
        for item, (_, target) in zip(loaded, jobs, strict=True):
            trainer, _ = restore_trainer(item)
            batches = open_batches(item, rank)[0].step(0)
            evaluated = trainer.evaluated(iter([batches]))
            sums = trainer.gradients(batches)
            save_gradients(trainer, sums, Path(target) / "gradients")
            step = trainer.update(sums)
            save(Path(target) / "weights", 1, trainer, only_model=True, extra={}, manifest={})
            result.append(
                {"loss": step.loss, "norm": step.grad_norm, "weight": step.weight, "eval": evaluated, "metrics": step.metrics}
            )
            trainer.close()
    return result


@pytest.mark.parametrize("method", METHODS)
def test_a_step(method: str, pool: RankPool, tmp_path: Path) -> None:
    worth, options, with_adapter, names = METHODS[method]
    start = tiny_start(tmp_path, "qwen2" if method == "rm" else "llama", tie_word_embeddings=not with_adapter)
    pairs = method.startswith("rm")
    if pairs:
        rows = write_margins(tmp_path / "rows.jsonl", write_pairs(tmp_path / "pairs.jsonl"))
    else:
        rows = write_classes(tmp_path / "rows.jsonl", LABELS[method])
    if method == "one class":  # as SmolLM2 has it: every conversation ends with the pad token
        settings = json.loads((start / "tokenizer_config.json").read_text())
        (start / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|im_end|>"}))
    wanted: Any = None
    lora: Any = None
    for number, name in enumerate(names):
        (world, *layout), jobs = LAYOUTS[name], []
        for form, words in FORMS.items():
            path = tmp_path / f"{number}-{form}.json"
            length = MAX_LENGTH if pairs else 64  # eight packed rows
            run = job(start, rows, world, *layout, **RATES, **options, **words, max_length=length)
            if wanted is None:
                folder = scored_folder(tmp_path / "hf", run, tmp_path / "scored")
                config = load_config(folder)
                if with_adapter:
                    lora = lora_of(folder, saved=["score"])
                    peft_model(folder, lora).save_pretrained(tmp_path / "adapter")
            run = run if lora is None else adapted(run, lora, tmp_path / "adapter")
            run.write(path)
            jobs.append((str(path), str(tmp_path / f"{name} {form}")))
            if wanted is None:
                data = TokenRows.open(run.data.train)
                assert config.pad_token_id == (1 if method == "one class" else 2)
                side = None if lora is None else PeftSide(lora, run.seed, tmp_path / "adapter")
                plain = PlainScores(worth, folder, SftArguments(**RATES), "fp32", 1, run.schedule.warmup_iters, side)
                wanted = next(plain.run(data, [np.arange(len(data))]))
                assert plain.said is not None
                figures = figures_of(method, plain.said, data)
        read = partial(by_hf_name, parameters=parameters_of(folder, lora)) if lora is not None else partial(full, config=config)
        results = pool.run(world, take, jobs)
        require_alike(method, jobs, results, wanted, read, figures)
        assert all(shown(found["metrics"], found["weight"]).keys() == figures.keys() for found in results[0])


def figures_of(method: str, said: Tensor, data: TokenRows) -> dict[str, float]:
    """What is logged, as means."""
    if method.startswith("rm"):
        chosen, rejected = said[::2, 0], said[1::2, 0]
        return {
            "rewards/chosen": float(chosen.mean()),
            "rewards/rejected": float(rejected.mean()),
            "rewards/margins": float((chosen - rejected).mean()),
            "rewards/accuracies": float((chosen > rejected).float().mean()),
        }
    values = torch.from_numpy(np.concatenate([data.values(row) for row in range(len(data))]))
    if method == "one class":
        return {"accuracy": float((said.argmax(-1) == values[:, 0]).float().mean())}
    return {"accuracy": float(((said > 0) == (values > 0)).float().mean())} if method == "several classes" else {}
