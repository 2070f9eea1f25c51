"""Thirty steps of TRL's own trainer over the same pairs in the same order: losses, margins, accuracies and the trained weights are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaswift.config.options import RlhfArguments
from megaswift.data.batches import Batches
from megaswift.data.store import TokenRows
from megaswift.run.spec import RUN_FILE, Run
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.config import load_config
from megaswift.weights.torch_dist.reader import Reader
from tests.ranks import RankPool
from tests.rlhf.pairs import write_pairs
from tests.training import tiny_start, train

STEPS, BATCH = 30, 4


def trl_rows(data: TokenRows, order: np.ndarray) -> Any:
    """Pairs as TRL holds them once it has tokenized them."""
    from datasets import Dataset

    rows = []
    for row in order:
        chosen, rejected = data.samples(int(row))
        asked = int(np.argmax(chosen.kept))
        assert int(np.argmax(rejected.kept)) == asked and chosen.ids[:asked].tolist() == rejected.ids[:asked].tolist()
        ids = {"prompt_ids": chosen.ids[:asked], "chosen_ids": chosen.ids[asked:], "rejected_ids": rejected.ids[asked:]}
        rows.append({name: part.tolist() for name, part in ids.items()})
    return Dataset.from_list(rows)


@pytest.mark.filterwarnings("ignore")
def test_thirty_steps_are_those_of_trl(pool: RankPool, tmp_path: Path) -> None:
    """A constant rate, for the two count a schedule's steps differently; TRL's reference is a second model, ours its own forward pass."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    start, folder = tiny_start(tmp_path, "qwen2", tie_word_embeddings=True), tmp_path / "hf"
    run = train(
        pool, tmp_path / "out", 2, RlhfArguments, resume_from_checkpoint=str(start), dataset=[str(write_pairs(tmp_path / "rows.jsonl", 40))],
        tp=2, sequence_parallel=True, gradient_accumulation_steps=BATCH // 2, max_steps=STEPS, learning_rate=3e-4, beta=0.2,
        lr_scheduler_type="constant", warmup_ratio=0.0, dataset_test_ratio=0.2, eval_steps=STEPS, save_steps=STEPS, adam_epsilon=1e-5,
    )  # fmt: skip
    spec = Run.read(run.directory / RUN_FILE)
    data, held_out = TokenRows.open(spec.data.train), TokenRows.open(str(spec.data.val))
    batches = Batches(data, micro_batch_size=1, global_batch_size=BATCH, dp_rank=0, dp_size=1, seed=spec.seed, pad_id=0)
    order = np.concatenate([batches.sample_ids(step) for step in range(STEPS)])
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # what TRL takes to pad with ends every turn here
    options = DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=1, per_device_eval_batch_size=4, max_steps=STEPS, beta=0.2,
        gradient_accumulation_steps=BATCH, learning_rate=3e-4, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.1,
        adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-5, max_grad_norm=1.0, logging_steps=1, report_to=[], save_strategy="no",
        bf16=False, use_cpu=True, gradient_checkpointing=False, train_sampling_strategy="sequential", max_length=None, disable_tqdm=True,
    )  # fmt: skip
    trainer = Tokenized(
        model=model, args=options, train_dataset=trl_rows(data, order), eval_dataset=trl_rows(held_out, np.arange(len(held_out))),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    ours = [row for row in run.rows if "loss" in row]
    assert len(theirs) == len(ours) == STEPS
    for name in (
        "loss",
        "grad_norm",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
    ):
        wanted = [float(row[name]) for row in theirs]
        skipped = 1 if name == "rewards/accuracies" else 0  # before the first step both rewards are 0, and rounding decides
        print(name, max(abs(row[name] - value) for row, value in list(zip(ours, wanted, strict=True))[skipped:]))
        assert [row[name] for row in ours][skipped:] == pytest.approx(wanted[skipped:], rel=2e-5, abs=5e-5), name
    assert max(abs(row["loss"] - ours[0]["loss"]) for row in ours) > 0.2, "it is trained"
    [evaluated] = [row for row in run.rows if "eval_loss" in row]
    found = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert evaluated[name] == pytest.approx(found[name], rel=2e-5, abs=5e-5), name
    weights = {
        one.name: one.produce()
        for one in planned_hf_tensors(
            Reader(run.directory / f"iter_{STEPS:07d}"), load_config(folder), Precisions(torch.float32)
        )
    }
    began = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, value in trainer.model.state_dict().items():
        if name in weights:
            moved = (value - began[name]).norm()
            assert moved > 0 and float((weights[name] - value).norm() / moved) < 0.02, name
