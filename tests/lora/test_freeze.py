"""Weights that stay as they are in full training: the others' gradients are those of full training, at every layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.commands.export import export_main
from megaswift.commands.sft import sft_main
from megaswift.config.options import ExportArguments, SftArguments
from megaswift.errors import UserError
from megaswift.models import parameters_of
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader
from tests.engine.test_packed import LAYOUTS, gradients, job
from tests.ranks import RankPool
from tests.training import tiny_start, train, write_rows

NAMES = ("tp1 pp1 dp1", "tp2, sequence parallel", "tp2 pp2, sequence parallel", "tp2 pp2 vpp2, sequence parallel")
FORMS: dict[str, dict[str, Any]] = {
    # Without the fused attention the layer itself adds its bias.
    "biases and norms": {"freeze_parameters_ratio": 1.0, "trainable_parameters_regex": r"bias|norm", "use_flash_attn": False},
    "last layers, recomputed": {"freeze_parameters_ratio": 0.4, "gradient_checkpointing": True},
    "no mlp": {"freeze_parameters_regex": r"\.mlp\.", "freeze_parameters": ["lm_head"]},
}

NOTHING_TO_TRAIN = (NAMES[-1], "last layers, recomputed")  # in the first chunk, which is refused


def test_gradients_of_the_others(pool: RankPool, tmp_path: Path) -> None:
    start, rows = tiny_start(tmp_path, "qwen2", tie_word_embeddings=False), write_rows(tmp_path / "rows.jsonl", 48)
    config, trained = load_config(start), {}
    for number, name in enumerate(NAMES):
        world, *layout = LAYOUTS[name]
        for form, options in {"all": {}, **FORMS}.items() if number == 0 else FORMS.items():
            if (name, form) == NOTHING_TO_TRAIN:
                continue
            path = tmp_path / f"{number}-{form}.json"
            with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world)}):
                made = job(start, rows, world, *layout, batch=2, padding_free=False, **options)
            made.write(path)
            trained[form] = [p for p in parameters_of(config) if p.name not in set(made.method.frozen)]
            pool.run(world, gradients, [(str(path), str(tmp_path / f"{name} {form}"))])
    whole = Reader(tmp_path / f"{NAMES[0]} all" / "iter_0000001")
    for form in FORMS:
        assert 0 < len(trained[form]) < len(trained["all"])
        for name in NAMES if form != NOTHING_TO_TRAIN[1] else NAMES[:-1]:
            reader = Reader(tmp_path / f"{name} {form}" / "iter_0000001")
            assert {p.key for p in trained[form]} == set(reader.keys), f"{name} {form}"
            for parameter in trained[form]:
                one, other = (r.read(parameter.key, parameter.place) for r in (reader, whole))
                assert float((one - other).norm() / other.norm()) < 1e-5, f"{name} {form}: {parameter.name}"


def test_a_run_keeps_them_and_goes_on(pool: RankPool, tmp_path: Path) -> None:
    """What is frozen is there bit for bit after training and export, also in bf16; options that say otherwise are refused."""
    start, rows = tiny_start(tmp_path, "llama", tie_word_embeddings=True), write_rows(tmp_path / "rows.jsonl")
    common: dict[str, Any] = {
        "resume_from_checkpoint": str(start), "dataset": [str(rows)], "dataset_test_ratio": 0.0, "gradient_accumulation_steps": 2,
        "freeze_parameters": ["model.embed_tokens", "model.layers.0.", "model.layers.1."], "save_steps": 2,
    }  # fmt: skip
    run = train(pool, tmp_path / "out", 2, **common, max_steps=4, tp=2, dtype="bf16")
    again = {**common, "resume_from_checkpoint": str(run.directory)}
    more = train(pool, tmp_path / "out", 1, **{**again, "gradient_accumulation_steps": 4}, max_steps=6, tp=1)
    assert len(more.losses) == 6
    folder = export_main(ExportArguments(ckpt_dir=str(run.directory), to_hf=True, hf_output_dir=str(tmp_path / "hf-out")))
    before, after = HFCheckpoint.open(tmp_path / "hf"), HFCheckpoint.open(folder)
    for name in before.names:
        frozen = name.startswith(tuple(common["freeze_parameters"]))
        assert torch.equal(after.tensor(name).bfloat16(), before.tensor(name).bfloat16()) == frozen, name
    with pytest.raises(UserError, match="and the options now say otherwise"):
        sft_main(SftArguments(**{**again, "freeze_parameters": ["model.embed_tokens"], "max_steps": 8}))


def test_what_is_refused(tmp_path: Path) -> None:
    start, rows = tiny_start(tmp_path, "llama", tie_word_embeddings=True), write_rows(tmp_path / "rows.jsonl")
    for text, options in {
        "one matrix with": {"freeze_parameters_regex": "q_proj"},
        "nearest: model.layers.0": {"freeze_parameters": ["model.layer.0"]},
        "nothing is left": {"freeze_parameters_ratio": 1.0},
        "no regular expression": {"freeze_parameters_regex": "("},
        "trained already": {"trainable_parameters": ["model.norm"]},
        "nothing to train": {"freeze_parameters_ratio": 1.0, "trainable_parameters": ["model.layers.3."], "pp": 2},
        "beside an adapter": {"freeze_parameters": ["model.norm"], "sft_type": "lora"},
    }.items():
        with pytest.raises(UserError, match=text):
            sft_main(
                SftArguments(
                    resume_from_checkpoint=str(start), dataset=[str(rows)], output_dir=str(tmp_path / "out"), **options
                )
            )
