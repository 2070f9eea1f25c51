"""Whole runs over text: resumed at another layout with the same rows, exported, from random weights, refused where they must be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megaswift.commands.export import export_main
from megaswift.commands.pt import pt_main
from megaswift.commands.sft import sft_main
from megaswift.commands.verify import verify_main
from megaswift.config.options import ExportArguments, PtArguments, SftArguments, VerifyArguments
from megaswift.config.text import NOT_OF_TEXT
from megaswift.data.batches import Batches
from megaswift.data.text_rows import open_rows
from megaswift.errors import DataError, UserError
from megaswift.run.problems import contradictions
from megaswift.run.spec import RUN_FILE, Run
from megaswift.store.manifest import read_manifest
from megaswift.weights.hf.random_start import random_folder
from tests import tiny
from tests.pretrain.texts import write_texts
from tests.ranks import RankPool
from tests.training import Trained, tiny_start, train, written_job

STEP = 8 * 32  # tokens
COMMON: dict[str, Any] = {
    "arguments": PtArguments, "max_length": 32, "train_tokens": str(5 * STEP + 1), "gradient_accumulation_steps": 8, "save_steps": 3,
    "eval_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_start(tmp_path_factory.mktemp("start"), "qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("text")
    return [f"{write_texts(root / 'a.jsonl', 80)}:0.7", f"{write_texts(root / 'b.txt', 40, 1)}:0.3"]


def run_of(run: Trained) -> Run:
    return Run.read(run.directory / RUN_FILE)


def rows_seen(run: Trained, steps: range) -> list[Any]:
    """(documents, first token) of the rows that the run's own file says for these steps."""
    spec = run_of(run)
    rows: Any = open_rows(spec.data.train)
    found = []
    for step in steps:
        for rank in range(spec.parallel.dp):
            batches = Batches(
                rows, micro_batch_size=spec.batch.micro_batch_size, global_batch_size=spec.batch.global_batch_size, dp_rank=rank,
                dp_size=spec.parallel.dp, seed=spec.seed, pad_id=0,
            )  # fmt: skip
            found += [(step, *rows.place(row)) for batch in batches.step(step) for row in batch.sample_ids]
    return sorted(found, key=repr)


def test_a_run_goes_on_with_the_rows_that_are_left(start: Path, items: list[str], pool: RankPool, tmp_path: Path) -> None:
    """Three steps on one process and the rest on two, at another micro batch, are the run that was not interrupted; the budget is one
    token more than five steps have, so there are six. A larger budget goes on from there, and each step has the rows of a long run."""
    common: dict[str, Any] = {**COMMON, "resume_from_checkpoint": str(start), "dataset": items}
    whole = train(pool, tmp_path / "whole", 1, **common)
    assert len(whole.losses) == 6 and run_of(whole).schedule.tokens == 5 * STEP + 1
    assert all(row["eval_end_token_probability"] > 0 for row in whole.rows if "eval_loss" in row)
    plan = json.loads((whole.directory / "plan.json").read_text())
    assert plan["megatron"]["train_iters"] == 6 and plan["objective"]["kind"] == "text"

    other = tmp_path / "other"
    shutil.copytree(whole.directory, other / "tiny-chat-tp1-pp1" / whole.directory.name)
    shutil.rmtree(other / "tiny-chat-tp1-pp1" / whole.directory.name / "iter_0000006")
    words = {**common, "gradient_accumulation_steps": 2, "batch_size": 2}
    again = train(pool, other, 2, **words, resume=True, model_type="tiny-chat")
    assert again.losses[3:] == pytest.approx(whole.losses[3:], abs=2e-6)
    assert again.eval_losses[-1] == pytest.approx(whole.eval_losses[-1], abs=2e-6)
    assert rows_seen(again, range(6)) == rows_seen(whole, range(6))

    longer = {**words, "train_tokens": str(8 * STEP), "batch_size": 1, "gradient_accumulation_steps": 4}
    last = train(pool, other, 2, **longer, resume=True, model_type="tiny-chat", cp=2)
    assert len(last.losses) == 8 and run_of(last).schedule.train_iters == 8
    assert rows_seen(last, range(8)) == rows_seen(whole, range(8)), "a larger budget changes no row"
    assert read_manifest(last.directory / "iter_0000008")["objective"]["kind"] == "text"

    asked = {name: value for name, value in common.items() if name not in ("arguments", "resume_from_checkpoint")}
    with pytest.raises(UserError, match="training rows, their order"):
        pt_main(PtArguments(**{**asked, "reset_attention_mask": False}, resume_from_checkpoint=str(last.directory)))
    with pytest.raises(UserError, match="was trained by swift pt, and does not go on by swift sft"):
        sft_main(
            SftArguments(
                resume_from_checkpoint=str(last.directory), dataset=["self-cognition"], model_name=["a"], model_author=["b"]
            )
        )

    folder = export_main(ExportArguments(ckpt_dir=str(last.directory), to_hf=True))
    assert verify_main(VerifyArguments(directory=str(folder), deep=True)) is not False


@pytest.mark.parametrize(("tokens", "steps"), [(STEP, 1), (STEP + 1, 2), (4 * STEP - 1, 4), (4 * STEP, 4)])
def test_a_budget_is_rounded_up_to_a_step(
    tokens: int, steps: int, start: Path, items: list[str], tmp_path: Path, capsys: Any
) -> None:
    options = {name: value for name, value in COMMON.items() if name != "arguments"} | {"train_tokens": str(tokens)}
    with mock.patch("tests.training.SftArguments", PtArguments):
        path = written_job(1, resume_from_checkpoint=str(start), dataset=items, output_dir=str(tmp_path), **options)
    run = Run.read(path)
    assert run.schedule.train_iters == steps and run.schedule.epochs is None
    said = " ".join(capsys.readouterr().out.split())
    assert f"{tokens:,} tokens (--train_tokens) / 256 a step = {steps} steps" in said and f": {steps * STEP:,} tokens" in said
    assert "0.7 of the rows from" in said and "passes over" in said


def test_from_nothing(items: list[str], pool: RankPool, tmp_path: Path) -> None:
    """A config and a tokenizer are enough. The weights are those that transformers draws, the same at two layouts, and others by another seed."""
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    tiny.save_tiny(whole, "qwen2", vocab_size=300, eos_token_id=1, pad_token_id=2, initializer_range=0.05)
    tiny.write_tokenizer(whole)
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    common: dict[str, Any] = {
        **COMMON,
        "model_type": "tiny-chat",
        "model_id_or_path": str(bare),
        "init": "random",
        "dataset": items,
    }
    one = train(pool, tmp_path / "one", 1, **common)
    two = train(pool, tmp_path / "two", 2, **common | {"gradient_accumulation_steps": 4}, tp=2, sequence_parallel=True)
    assert two.losses == pytest.approx(one.losses, abs=2e-6) and one.losses[-1] < one.losses[0]

    folder = random_folder(bare, 42, "fp32")
    torch.manual_seed(42)
    config = transformers.AutoConfig.from_pretrained(bare)
    drawn = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, drawn[name]) for name, value in found.items()) and len(found) > 10
    assert float(found["model.embed_tokens.weight"].std()) == pytest.approx(0.05, rel=0.05)
    assert float(found["model.layers.0.mlp.down_proj.weight"].std()) == pytest.approx(0.05, rel=0.05)
    assert (found["model.norm.weight"] == 1).all()
    other = load_file(random_folder(bare, 7, "bf16") / "model.safetensors")
    assert other["model.norm.weight"].dtype == torch.bfloat16
    assert not torch.equal(other["model.embed_tokens.weight"].float(), found["model.embed_tokens.weight"])
    assert (folder / "config.json").read_bytes() == (bare / "config.json").read_bytes()

    folder = export_main(ExportArguments(ckpt_dir=str(two.directory), to_hf=True))
    assert (folder / "model.safetensors").exists()
    with pytest.raises(DataError, match="no safetensors file in the model directory"):
        pt_main(PtArguments(**{name: value for name, value in common.items() if name not in ("arguments", "init")}))
    with pytest.raises(UserError, match="--resume_from_checkpoint names some"):
        pt_main(PtArguments(init="random", resume_from_checkpoint=str(whole), dataset=items, max_steps=1))


def test_refused_options() -> None:
    """Each by its name and with its reason; a file of all options, with their defaults, is no wish."""
    assert not list(contradictions(PtArguments(**PtArguments().to_dict())))
    values = {
        "template_type": "chatml", "system": "", "template_date": "2026-01-01", "loss_scale": "all", "model_name": ["a"], "model_author": ["b"],
        "truncation_strategy": "split", "packing": False, "group_by_length": True, "streaming": True, "task_type": "seq_cls",
        "num_labels": 2, "problem_type": "regression",
    }  # fmt: skip
    assert values.keys() == NOT_OF_TEXT.keys()
    for name, value in values.items():
        [problem] = contradictions(PtArguments(**{name: value}))
        assert problem.what == f"--{name} means nothing in swift pt: {NOT_OF_TEXT[name]}." and problem.where == f"--{name}"
    assert not list(contradictions(PtArguments(packing=True)))


def test_a_blend_must_say_how_much(start: Path, items: list[str]) -> None:
    with pytest.raises(UserError, match="nothing says how much of it is trained on") as caught:
        pt_main(PtArguments(resume_from_checkpoint=str(start), dataset=items, max_length=32))
    assert "--train_tokens 500M" in caught.value.fix
    with pytest.raises(UserError, match="both say how much"):
        pt_main(PtArguments(resume_from_checkpoint=str(start), dataset=items, max_length=32, max_steps=5, train_tokens="2B"))
