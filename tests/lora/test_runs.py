"""Whole runs with an adapter: 20 steps with dropout beside PEFT at every layout, saved, resumed elsewhere, refused where they must be."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaswift.commands.sft import sft_main
from megaswift.config.files import read_args_file
from megaswift.config.options import SftArguments
from megaswift.data.batches import Batches
from megaswift.data.store import TokenRows
from megaswift.errors import DataError, UserError
from megaswift.parity.adapters import PeftSide
from megaswift.parity.reference import Reference
from megaswift.run.spec import RUN_FILE, Run
from megaswift.weights.torch_dist.reader import Reader
from tests.lora.adapters import by_hf_name, lora_of, parameters_of, peft_model
from tests.ranks import RankPool
from tests.training import Trained, long, tiny_start, train, write_rows

STEPS = 20
# Every B starts at zero and its gradients may be as small as Adam's usual epsilon, where an update has the sign of rounding.
EPSILON = 1e-4
LORA: dict[str, Any] = {
    "sft_type": "lora", "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.3, "lora_plus_lr_ratio": 4.0, "learning_rate": 5e-3,
    "max_steps": STEPS, "save_steps": STEPS, "gradient_accumulation_steps": 4, "dataset_test_ratio": 0.0, "adam_epsilon": EPSILON,
}  # fmt: skip
# name -> processes and options; the global batch is 8 rows at all of them
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp1": (1, {"batch_size": 2, "padding_free": False}),
    "dp2": (2, {"gradient_accumulation_steps": 4}),
    "tp2": (2, {"tp": 2}),
    "tp2, sequence parallel": (2, {"tp": 2, "sequence_parallel": True, "gradient_checkpointing": True}),
    "pp2, padded": (2, {"pp": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "padding_free": False}),
    "pp2 vpp2, recomputed": (2, {"pp": 2, "vpp": 2, "gradient_checkpointing": True}),
    "cp2": (2, {"cp": 2}),
}


# The default suite has a part of them, `make test-lora` and `make test-long` all.
SOME = tuple(LAYOUTS) if "MEGASWIFT_LONG" in os.environ else ("dp1", "tp2, sequence parallel", "pp2 vpp2, recomputed")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_start(tmp_path_factory.mktemp("start"), "qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def reference(run: Trained, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and the adapter of the same run in PEFT, mask for mask."""
    spec, options = Run.read(run.directory / RUN_FILE), read_args_file(run.directory)
    names = {item.name for item in fields(SftArguments)}
    args, data = SftArguments(**{name: options[name] for name in names}), TokenRows.open(spec.data.train)
    batches = Batches(
        data, micro_batch_size=1, global_batch_size=spec.batch.global_batch_size, dp_rank=0, dp_size=1, seed=spec.seed,
        pad_id=spec.data.pad_id,
    )  # fmt: skip
    steps, warmup = spec.schedule.train_iters, spec.schedule.warmup_iters
    side = Reference(folder, args, "fp32", steps, warmup, PeftSide.of(spec))
    ids: list[np.ndarray] = [batches.sample_ids(step) for step in range(steps)]
    results = list(side.run(data, ids))
    return [item.loss for item in results], results[-1].weights


# What is trained; all but the first in `make test-long`.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA+": ({}, {}),
    "rsLoRA": ({"use_rslora": True}, {"rslora": True}),
    "DoRA": ({"use_dora": True, "lora_dropout": 0.0}, {"dora": True}),
    "QLoRA": ({"quantization_bit": 4}, {"bits": 4}),
}


@pytest.mark.parametrize("kind", [pytest.param(name, marks=() if name == "LoRA+" else long) for name in KINDS])
def test_twenty_steps_are_those_of_peft_at_every_layout(kind: str, rows: Path, pool: RankPool, tmp_path: Path) -> None:
    words, changes = KINDS[kind]
    start = tiny_start(tmp_path / "start", "qwen2", tie_word_embeddings=True, hidden_size=128, intermediate_size=128)
    folder = start.parent / "hf"
    lora = lora_of(folder, alpha=8.0, rank=4, **changes)
    parameters, wanted = parameters_of(folder, lora), None
    for name, (world, options) in ((name, LAYOUTS[name]) for name in SOME):
        run = train(
            pool,
            tmp_path / name.replace(", ", "-"),
            world,
            resume_from_checkpoint=str(start),
            dataset=[str(rows)],
            **{**LORA, **words, **options},
        )
        if wanted is None:
            wanted = reference(run, folder)
        losses, adapter = wanted
        found = by_hf_name(run.directory / f"iter_{STEPS:07d}", parameters)
        worst = max((float((found[key] - value).norm() / value.norm()), key) for key, value in adapter.items())
        off = max(abs(a - b) for a, b in zip(run.losses, losses, strict=True))
        print(f"{kind:8} {name:26} loss {off:.1e}  adapter {worst[0]:.1e} {worst[1]}")
        assert off < 5e-6, f"{name}: {run.losses} {losses}"
        assert worst[0] < 2e-4, f"{name}: {worst}"
    assert losses[0] - losses[-1] > 0.05, "it learns"


def test_a_run_goes_on_at_any_other_layout(start: Path, rows: Path, pool: RankPool, tmp_path: Path) -> None:
    """Three steps at one layout and three at another are six; what is saved is the adapter alone."""
    common: dict[str, Any] = {
        "resume_from_checkpoint": str(start),
        "dataset": [str(rows)],
        **LORA,
        "max_steps": 6,
        "save_steps": 3,
    }
    whole = train(pool, tmp_path / "whole", 2, **{**common, "tp": 2, "sequence_parallel": True})
    keys = Reader(whole.directory / "iter_0000003").keys
    assert len([key for key in keys if not key.startswith("optimizer.")]) == 8 and all(".lora_" in key for key in keys)
    plan = json.loads((whole.directory / "plan.json").read_text())
    assert plan["trainable"] == sum(p.size for p in parameters_of(start.parent / "hf", lora_of(start.parent / "hf", rank=4)))
    assert plan["checkpoint_bytes"] == 16 * plan["trainable"] < plan["parameters"] * 16
    for name, (world, options) in {
        "dp1": (1, {"tp": 1}),
        "pp2": (2, {"tp": 1, "pp": 2}),
        "pp2 vpp2": (2, {"tp": 1, "pp": 2, "vpp": 2}),
        "tp2": (2, {"tp": 2, "pp": 1}),
    }.items():
        other = tmp_path / name
        shutil.copytree(whole.directory, other / "tiny-chat-tp2-pp1" / whole.directory.name)
        shutil.rmtree(other / "tiny-chat-tp2-pp1" / whole.directory.name / "iter_0000006")
        again = train(
            pool, other, world, **{**common, **options}, resume=True, model_type="tiny-chat", sequence_parallel=False,
            batch_size=2 if world == 1 else 1,
        )  # fmt: skip
        assert again.losses[-3:] == pytest.approx(whole.losses[-3:], abs=2e-5), name


def test_what_is_refused(start: Path, rows: Path, pool: RankPool, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "dataset": [str(rows)],
        **LORA,
        "max_steps": 1,
        "save_steps": 1,
        "output_dir": str(tmp_path / "out"),
    }

    def refused(error: type[Exception], text: str, **options: Any) -> None:
        given = {"resume_from_checkpoint": str(start), **common, **options}
        with pytest.raises(error, match=text):
            sft_main(SftArguments(**given))

    refused(UserError, "nearest: q_proj", target_modules=["q_prj"])
    for word in ("all-embedding", "embed_tokens", "model.embed_tokens"):
        refused(UserError, "modules_to_save embed_tokens", target_modules=["all-linear", word])
    refused(UserError, "no regular expression", target_modules=["q_(proj"])
    refused(UserError, "one matrix", modules_to_save=["embed_tokens"])
    refused(UserError, "has nothing to train", target_modules=[r".*layers\.0\..*"], pp=2)
    refused(UserError, r"stage 2 of --pp 2 x --vpp 2, layers 1 to 1, has", target_modules=[r".*layers\.[023]\..*"], pp=2, vpp=2)
    refused(UserError, "new tokens", new_special_tokens=["<a>"])
    with pytest.raises(UserError, match="belongs to adapters"):
        sft_main(SftArguments(resume_from_checkpoint=str(start), dataset=[str(rows)], lora_rank=4))
    run = train(pool, tmp_path / "run", 1, resume_from_checkpoint=str(start), **common | {"output_dir": str(tmp_path / "run")})
    again = {"resume_from_checkpoint": str(run.directory), "max_steps": 2}
    refused(UserError, "rank 4, not 8", **again, lora_rank=8)
    refused(UserError, "an adapter, and --sft_type full", **again, sft_type="full")
    other = tiny_start(tmp_path / "other", "qwen2", seed=1, tie_word_embeddings=True)
    refused(
        DataError, "not the weights that the adapter was trained beside", **again, model_id_or_path=str(other.parent / "hf")
    )


def test_training_goes_on_from_an_adapter_of_peft(start: Path, rows: Path, pool: RankPool, tmp_path: Path) -> None:
    """Rank, alpha, scale and modules are the adapter's; what it does not fit is refused."""
    folder, adapter = start.parent / "hf", tmp_path / "adapter"
    lora = lora_of(folder, ["q_proj", "up_proj"], rank=6, alpha=12.0, rslora=True)
    peft_model(folder, lora).save_pretrained(adapter)
    common: dict[str, Any] = {
        "dataset": [str(rows)], "sft_type": "lora", "adapters": str(adapter), "lora_dropout": 0.0, "max_steps": 2,
        "gradient_accumulation_steps": 4, "dataset_test_ratio": 0.0, "learning_rate": 1e-3,
    }  # fmt: skip
    run = train(pool, tmp_path / "out", 2, resume_from_checkpoint=str(start), tp=2, **common)
    assert run.losses == pytest.approx(reference(run, folder)[0], abs=5e-6)
    found = by_hf_name(run.directory / "iter_0000002", parameters_of(folder, lora))
    assert found["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape[1] == 6

    def refused(error: type[Exception], text: str, origin: Path = start, **options: Any) -> None:
        with pytest.raises(error, match=text):
            sft_main(SftArguments(resume_from_checkpoint=str(origin), output_dir=str(tmp_path / "no"), **{**common, **options}))

    refused(UserError, "lora_rank 6, not 8", lora_rank=8)
    refused(UserError, "goes with --sft_type lora", sft_type="full")
    other = tiny_start(tmp_path / "other", "qwen2", tie_word_embeddings=True, hidden_size=128)
    refused(DataError, "does not fit the model", other)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, text in (({"rank_pattern": {"q_proj": 2}}, "layers differ in rank"), ({"init_lora_weights": "pissa"}, "PiSSA")):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        refused(UserError, text)
