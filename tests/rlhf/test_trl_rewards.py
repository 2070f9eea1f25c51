"""Steps of TRL's own reward trainer over the same pairs, margins and order: losses, norms, accuracies and margins are ours."""

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
from tests.ranks import RankPool
from tests.rlhf.pairs import write_pairs
from tests.rlhf.scored import scored_folder, write_margins
from tests.training import long, tiny_start, train

STEPS, BATCH = 12, 4


@long
@pytest.mark.filterwarnings("ignore")
def test_twelve_steps_are_those_of_trl(pool: RankPool, tmp_path: Path) -> None:
    """A constant rate, for the two count a schedule's steps differently."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    start = tiny_start(tmp_path, "qwen2", tie_word_embeddings=True)
    rows = write_margins(tmp_path / "rows.jsonl", write_pairs(tmp_path / "pairs.jsonl", 40))
    run = train(
        pool, tmp_path / "out", 2, RlhfArguments, resume_from_checkpoint=str(start), dataset=[str(rows)], rlhf_type="rm",
        tp=2, sequence_parallel=True, gradient_accumulation_steps=BATCH // 2, max_steps=STEPS, learning_rate=3e-4, center_rewards_coefficient=0.2,
        lr_scheduler_type="constant", warmup_ratio=0.0, dataset_test_ratio=0.0, save_steps=STEPS, adam_epsilon=1e-5,
    )  # fmt: skip
    spec = Run.read(run.directory / RUN_FILE)
    data = TokenRows.open(spec.data.train)
    batches = Batches(data, micro_batch_size=1, global_batch_size=BATCH, dp_rank=0, dp_size=1, seed=spec.seed, pad_id=0)
    made = []
    for row in np.concatenate([batches.sample_ids(step) for step in range(STEPS)]):
        chosen, rejected = (sample.ids.tolist() for sample in data.samples(int(row)))
        made.append({"chosen_ids": chosen, "rejected_ids": rejected, "margin": float(data.values(int(row))[0, 0])})
    torch.set_num_threads(1)
    folder = scored_folder(tmp_path / "hf", spec, tmp_path / "scored")
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.model.embed_tokens.padding_idx = None
    options = RewardConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=1, max_steps=STEPS, center_rewards_coefficient=0.2,
        gradient_accumulation_steps=BATCH, learning_rate=3e-4, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.1,
        adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-5, max_grad_norm=1.0, logging_steps=1, report_to=[], save_strategy="no",
        bf16=False, use_cpu=True, gradient_checkpointing=False, train_sampling_strategy="sequential", max_length=None, disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=model,
        args=options,
        train_dataset=Dataset.from_list(made),
        processing_class=AutoTokenizer.from_pretrained(folder.parent / "hf"),
    )
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    ours = [row for row in run.rows if "loss" in row]
    assert len(theirs) == len(ours) == STEPS
    names = {"loss": "loss", "grad_norm": "grad_norm", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    for theirs_name, name in names.items():
        wanted = [float(row[theirs_name]) for row in theirs]
        print(name, max(abs(row[name] - value) for row, value in zip(ours, wanted, strict=True)))
        assert [row[name] for row in ours] == pytest.approx(wanted, rel=2e-5, abs=2e-5), name
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 0.02, "it is trained"
