"""Adapters that begin as a part of the base (PiSSA, OLoRA): PEFT's own values, runs, resumes, and exports that stand beside the base as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments, SftArguments
from megaswift.errors import DataError, UserError
from megaswift.models.adapters import Lora
from megaswift.run.method import adapter_of
from megaswift.store.manifest import read_manifest
from megaswift.weights.convert.lora_start import halves_of, load_start
from tests import tiny
from tests.lora.adapters import lora_of, peft_model
from tests.lora.test_parity_command import parity
from tests.lora.test_runs import EPSILON, reference
from tests.ranks import RankPool
from tests.training import long, tiny_start, train, write_rows

RUN: dict[str, Any] = {
    "sft_type": "lora", "lora_rank": 4, "lora_alpha": 6.0, "lora_dropout": 0.1, "use_rslora": True, "learning_rate": 5e-3, "max_steps": 6,
    "save_steps": 3, "gradient_accumulation_steps": 4, "dataset_test_ratio": 0.0, "adam_epsilon": EPSILON,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    write_rows(root / "rows.jsonl")
    return tiny_start(root, "qwen2", tie_word_embeddings=True)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_values_are_those_of_peft(kind: str, start: Path) -> None:
    """A and B up to a common sign of each of their r, and what is left of the weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = lora_of(start.parent / "hf", alpha=6.0, init=kind)
    base = AutoModelForCausalLM.from_pretrained(start.parent / "hf", dtype=torch.float32)
    before = base.model.layers[1].mlp.up_proj.weight.detach().clone()
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6.0, target_modules=["up_proj"], init_lora_weights=kind))
    theirs = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    a, b = halves_of(before, lora, 7)
    signs = (a * theirs.lora_A["default"].weight.detach()).sum(1).sign()
    for found, wanted in (
        (a * signs[:, None], theirs.lora_A["default"].weight),
        (b * signs, theirs.lora_B["default"].weight),
        (before - lora.scale * b @ a, theirs.base_layer.weight),
    ):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6)
    assert (before - theirs.base_layer.weight).norm() > 0.1 * before.norm()


def test_the_quick_form_takes_nearly_as_much() -> None:
    """With random vectors of its own seed, and without moving anybody else's random state."""
    torch.manual_seed(1)
    weight = torch.randn(96, 64)
    state = torch.get_rng_state()
    left = {}
    for kind in ("pissa", "pissa_niter_4", "pissa_niter_16"):
        lora = Lora(8, 16.0, 0.0, (), init=kind)
        a, b = halves_of(weight, lora, 7)
        again = halves_of(weight, lora, 7)
        assert torch.equal(a, again[0]) and torch.equal(b, again[1])
        left[kind] = float((weight - lora.scale * b @ a).norm())
    assert torch.equal(state, torch.get_rng_state())
    assert left["pissa"] <= left["pissa_niter_16"] <= left["pissa_niter_4"] < 1.05 * left["pissa"] < 0.95 * float(weight.norm())


@pytest.mark.parametrize("kind", ["pissa", pytest.param("olora", marks=long)])
def test_a_run_is_that_of_peft_and_its_export_stands_beside_the_base(
    kind: str, start: Path, pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))
    folder, rows = start.parent / "hf", start.parent / "rows.jsonl"
    common: dict[str, Any] = {"resume_from_checkpoint": str(start), "dataset": [str(rows)], **RUN, "init_weights": kind}
    runs = {
        name: train(pool, tmp_path / name, 2, **common, **options)
        for name, options in {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2sp": {"tp": 2, "sequence_parallel": True}}.items()
        if name == "tp2" or "MEGASWIFT_LONG" in os.environ
    }
    losses, wanted = reference(runs["tp2"], folder)
    for name, run in runs.items():
        assert run.losses == pytest.approx(losses, abs=5e-6), name
    first, run = load_start(runs["tp2"].directory / "initial_adapter"), runs["tp2"].directory
    assert set(first) == set(wanted)

    other = tmp_path / "other" / run.parent.name / run.name
    shutil.copytree(run, other)
    shutil.rmtree(other / "iter_0000006")
    again = train(pool, tmp_path / "other", 2, **{**common, "resume_from_checkpoint": str(other)}, tp=1, pp=2)
    assert again.losses[-3:] == pytest.approx(losses[-3:], abs=1e-5), "the base lacks the same values again"

    adapter = export_main(ExportArguments(ckpt_dir=str(run), to_hf=True, hf_output_dir=str(tmp_path / "adapter")))
    merged = export_main(
        ExportArguments(ckpt_dir=str(run), to_hf=True, merge_lora=True, hf_output_dir=str(tmp_path / "merged"))
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["init_lora_weights"] is True and not config["use_rslora"]
    assert read_manifest(adapter)["verified"]["logits"]["max_abs"] < 1e-5
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter)).eval()(tokens).logits
        whole = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits
        lora = lora_of(folder, alpha=6.0, rslora=True)
        trained = peft_model(folder, lora)  # what the run trained: values beside weights that lack the first ones
        for name, value in wanted.items():
            trained.get_submodule(name.removesuffix(".weight"))["default"].weight.copy_(value)
            if "lora_A" in name:
                weight = trained.get_submodule(name.removesuffix(".lora_A.weight")).base_layer.weight
                weight -= lora.scale * first[name.replace("lora_A", "lora_B")] @ first[name]
        live = trained.eval()(tokens).logits
    assert float((found - whole).abs().max()) < 1e-5 and float((found - live).abs().max()) < 2e-4

    path = run / "initial_adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="that its base lacks, cannot be read"):
        export_main(ExportArguments(ckpt_dir=str(run), to_hf=True, hf_output_dir=str(tmp_path / "damaged")))


def test_parity_knows_it(start: Path, pool: RankPool, tmp_path: Path) -> None:
    options = {"sft_type": "lora", "lora_rank": 4, "lora_dropout": 0.1, "init_weights": "pissa", "tp": 2}
    assert parity(pool, (start, start.parent / "rows.jsonl"), tmp_path, 2, **options)["problem"] is None


def test_what_is_refused() -> None:
    dense, experts = tiny.tiny_config("qwen2"), tiny.tiny_config("qwen3_moe")
    for text, config, options in (
        ("does not go with --quantization_bit", dense, {"quantization_bit": 4}),
        ("does not go with --use_dora", dense, {"use_dora": True, "lora_dropout": 0.0}),
        ("does not go with --target_modules", experts, {"target_modules": ["all-experts"], "lora_dropout": 0.0}),
    ):
        with pytest.raises(UserError, match=text):
            adapter_of(SftArguments(sft_type="lora", init_weights="pissa", **options), config)
    assert not Lora(4, 8.0, 0.0, ()).is_part_of_base
