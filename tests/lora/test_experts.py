"""Adapters of models with experts against PEFT: loss, norm and every gradient, however tokens and experts are spread; runs and exports."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments, SftArguments
from megaswift.data.store import TokenRows
from megaswift.errors import UserError
from megaswift.proof.adapter_readers import vllm_refuses
from megaswift.proof.parity import compare_adapter
from megaswift.proof.streams import TrainedAdapter
from megaswift.run.method import adapter_of
from megaswift.store.manifest import read_manifest
from megaswift.weights.base import base_digest
from megaswift.weights.convert import precisions_of_folder
from megaswift.weights.convert.lora import load_adapter
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from tests import tiny
from tests.engine.test_packed import job
from tests.lora.adapters import adapted, by_hf_name, lora_of, parameters_of, peft_model, peft_step, save_adapter
from tests.lora.test_layouts import one_step
from tests.lora.test_runs import EPSILON, reference
from tests.ranks import RankPool
from tests.training import long, tiny_start, train, write_rows

SAMPLES, STEPS = 48, 6
EVERYWHERE = "MEGASWIFT_LONG" in os.environ
SOME = ("tp2", "tp2, ep2, etp2, sp", "pp2, vpp2, ep2", "cp2, ep2")  # in the default suite, with the first case
# name -> processes, tp, pp, sequence parallel, cp, vpp where it is not 1; and more options
LAYOUTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "one": ((1, 1, 1, False, 1), {}),
    "dp2": ((2, 1, 1, False, 1), {}),
    "ep2": ((2, 1, 1, False, 1), {"ep": 2}),
    "ep2, recomputed": ((2, 1, 1, False, 1), {"ep": 2, "gradient_checkpointing": True}),
    "etp2": ((2, 1, 1, False, 1), {"etp": 2}),
    "tp2": ((2, 2, 1, False, 1), {}),
    "tp2, sp": ((2, 2, 1, True, 1), {}),
    "tp2, etp2": ((2, 2, 1, False, 1), {"etp": 2}),
    "tp2, etp2, sp": ((2, 2, 1, True, 1), {"etp": 2}),
    "tp2, ep2": ((2, 2, 1, False, 1), {"ep": 2}),
    "tp2, ep2, sp": ((2, 2, 1, True, 1), {"ep": 2}),
    "tp2, ep2, etp2, sp": ((4, 2, 1, True, 1), {"ep": 2, "etp": 2}),
    "ep2, dp4": ((4, 1, 1, False, 1), {"ep": 2}),
    "pp2, ep2": ((4, 1, 2, False, 1), {"ep": 2}),
    "pp2, vpp2, ep2": ((4, 1, 2, False, 1, 2), {"ep": 2}),
    "cp2": ((2, 1, 1, False, 2), {}),
    "cp2, ep2": ((2, 1, 1, False, 2), {"ep": 2}),
}
ROUTED = ["all-linear", "all-experts", "all-router"]
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 64}  # rows of whole blocks
CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe, all, base in 4 bits": {"family": "qwen3_moe", "words": ROUTED, "sizes": WIDE, "lora": {"bits": 4}},
    "qwen3_moe, all": {"family": "qwen3_moe", "words": ROUTED},
    "qwen3_moe, attention, base in 4 bits, scales in 8": {
        "family": "qwen3_moe",
        "words": ["all-linear"],
        "sizes": WIDE,
        "lora": {"bits": 4, "double": True},
    },
    "mixtral, all, base in 8 bits": {"family": "mixtral", "words": ROUTED, "lora": {"bits": 8}},
    "qwen2_moe, all-linear": {"family": "qwen2_moe", "words": ["all-linear"]},
    "mixtral, all, rsLoRA": {"family": "mixtral", "words": ROUTED, "lora": {"rslora": True}},
    "dots1, experts of some layers, and attention": {"family": "dots1", "words": [r"model\.layers\.[03].*mlp\..*", "q_proj"]},
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name == next(iter(CASES)) else long) for name in CASES])
def test_gradients_are_those_of_peft(case: str, pool: RankPool, tmp_path: Path) -> None:
    chosen = CASES[case]
    start = tiny_start(tmp_path, chosen["family"], tie_word_embeddings=False, **chosen.get("sizes", {}))
    folder, rows = tmp_path / "hf", write_rows(tmp_path / "rows.jsonl", SAMPLES)
    lora = lora_of(folder, chosen["words"], **chosen.get("lora", {}))
    model = peft_model(folder, lora)
    save_adapter(model, lora, tmp_path / "adapter")
    parameters, wanted = parameters_of(folder, lora), None
    for number, name in enumerate(LAYOUTS if EVERYWHERE else SOME):
        layout, options = LAYOUTS[name]
        path, target = tmp_path / f"{number}.json", tmp_path / name
        with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(layout[0])}):
            made = job(start, rows, *layout, batch=2, padding_free=False, **options)
        adapted(made, lora, tmp_path / "adapter").write(path)
        if wanted is None:
            wanted = peft_step(model, lora, TokenRows.open(made.data.train))
        loss, norm, gradients = wanted
        assert set(gradients) == {part.name for parameter in parameters for part in parameter.hf}
        (figures,) = pool.run(layout[0], one_step, [(str(path), str(target))])[0]
        found = by_hf_name(target / "iter_0000001", parameters)
        worst = max((float((found[key] - value).norm() / value.norm()), key) for key, value in gradients.items() if value.any())
        print(f"{case} {name:24} loss {abs(figures['loss'] - loss):.1e} norm {abs(figures['norm'] / norm - 1):.1e} {worst}")
        assert figures["loss"] == pytest.approx(loss, abs=2e-6), name
        assert figures["norm"] == pytest.approx(norm, rel=1e-5), name
        assert worst[0] < 2e-5, f"{name}: {worst}"
        assert all(torch.equal(found[key], value) for key, value in gradients.items() if not value.any()), name


RUN: dict[str, Any] = {
    "sft_type": "lora", "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": ROUTED, "learning_rate": 5e-3,
    "max_steps": STEPS, "save_steps": STEPS // 2, "gradient_accumulation_steps": 4, "adam_epsilon": EPSILON, "batch_size": 1,
    "dataset_test_ratio": 0.1,
}  # fmt: skip
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2, ep2, sp": (2, {"tp": 2, "ep": 2, "sequence_parallel": True}),
    "ep2": (2, {"ep": 2}),
    "etp2": (2, {"etp": 2}),
}


def test_a_run_is_that_of_peft_goes_on_elsewhere_and_is_exported(pool: RankPool, tmp_path: Path) -> None:
    """Losses, the adapter after six steps, the same from the middle on at another layout; PEFT and the merged model compute it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start, rows = tiny_start(tmp_path, "qwen2_moe", tie_word_embeddings=False), write_rows(tmp_path / "rows.jsonl", SAMPLES)
    folder = tmp_path / "hf"
    lora = lora_of(folder, ROUTED)
    parameters, wanted, made = parameters_of(folder, lora), None, {}
    for name, (world, options) in RUNS.items():
        run = train(pool, tmp_path / "out", world, resume_from_checkpoint=str(start), dataset=[str(rows)], **{**RUN, **options})
        wanted = wanted or reference(run, folder)
        made[name], (losses, adapter) = run, wanted
        found = by_hf_name(run.directory / f"iter_{STEPS:07d}", parameters)
        worst = max((float((found[key] - value).norm() / value.norm().clamp_min(1e-6)), key) for key, value in adapter.items())
        assert run.losses == pytest.approx(losses, abs=5e-6), name
        assert worst[0] < 2e-4, f"{name}: {worst}"
        health = json.loads((run.directory / "experts.json").read_text())
        assert all(0 < layer["drift"] < 1 for layer in health["window"]), "routers have adapters, and move"
        assert sum(health["after"][0]["load"]) == 2 * health["after"][0]["tokens"]
    first = made["tp2, ep2, sp"]
    shutil.rmtree(first.directory / f"iter_{STEPS:07d}")
    again = {**RUN, "resume_from_checkpoint": str(first.directory), "ep": 2, "tp": 1, "pp": 2, "gradient_accumulation_steps": 2}
    again |= {"sequence_parallel": False}
    more = train(pool, tmp_path / "more", 4, dataset=[str(rows)], **again)
    assert more.losses[-3:] == pytest.approx(losses[-3:], abs=1e-5)

    run = made["ep2"].directory
    done = export_main(ExportArguments(ckpt_dir=str(run), to_hf=True, hf_output_dir=str(tmp_path / "adapter")))
    merged = export_main(
        ExportArguments(ckpt_dir=str(run), to_hf=True, merge_lora=True, hf_output_dir=str(tmp_path / "merged"))
    )
    manifest = read_manifest(done)
    assert manifest["verified"]["logits"]["max_abs"] < 1e-5 and "gate" in manifest["serves"]["vllm"]
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = base(tokens).logits
        with_adapter = PeftModel.from_pretrained(base, str(done)).eval()(tokens).logits
        whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens).logits
    assert float((with_adapter - whole).abs().max()) < 5e-6 < 1e-2 < float((with_adapter - plain).abs().max())
    going_on = {name: value for name, value in RUN.items() if name not in ("lora_rank", "lora_alpha", "target_modules")}
    third = train(
        pool, tmp_path / "third", 1, resume_from_checkpoint=str(start), dataset=[str(rows)],
        **{**going_on, "adapters": str(done), "max_steps": 1, "gradient_accumulation_steps": 8},
    )  # fmt: skip
    assert third.losses[0] < losses[0] - 0.1, "it begins where the exported adapter ended"


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "dots1", "granitemoe"])
def test_peft_loads_what_is_written(name: str, tmp_path: Path, tiny_folders: Any) -> None:
    """Logits at every position and the states after each layer, as an export proves them; a fault is seen and placed."""
    folder, _ = tiny_folders(name, tie_word_embeddings=False)
    config = load_config(folder)
    lora = lora_of(folder, ROUTED if name != "granitemoe" else ["all-linear"], rslora=True)
    save_adapter(peft_model(folder, lora), lora, tmp_path / "adapter")
    source, written = HFCheckpoint.open(folder), load_adapter(tmp_path / "adapter")
    tiny.write_tokenizer(tmp_path)
    values = {p.name: p.arrangement.pack([written[part.name] for part in p.hf]) for p in parameters_of(folder, lora)}
    precisions = precisions_of_folder(source, config)

    def compared() -> Any:
        given = TrainedAdapter(lora, values)
        return compare_adapter(config, source, precisions, tmp_path / "adapter", given, tmp_path)

    found = compared()
    assert not found.failed and found.max_abs < 1e-5 and all(item.equal for item in found.config)
    key = next(key for key in values if key.endswith("linear_fc2.lora_B" if name != "granitemoe" else "linear_proj.lora_B"))
    values[key] = values[key] * 1.1
    assert "logits differ" in compared().failed


def test_what_is_refused(tmp_path: Path) -> None:
    """What PEFT cannot load or compute, by name and with a way out."""
    qwen, granite, dense = (tiny.tiny_config(name, tie_word_embeddings=False) for name in ("qwen2_moe", "granitemoe", "llama"))
    for text, config, options in (
        ("no dropout for adapters of experts", qwen, {"target_modules": ["all-experts"]}),
        ("no dropout for adapters of experts", qwen, {"target_modules": ["all-router"]}),
        ("DoRA for attention alone", qwen, {"use_dora": True, "lora_dropout": 0.0}),
        (
            r"blocks of 64 along a row; .*local_experts.0.linear_fc2.weight has rows of \d+ on each rank of --etp 1",
            qwen,
            {"quantization_bit": 4},
        ),
        (r"of the 12 matrices in the experts of layer 0", qwen, {"target_modules": [r".*experts\.0\..*"], "lora_dropout": 0.0}),
        ("are named", qwen, {"target_modules": ["gate_proj", "up_proj"], "lora_dropout": 0.0}),
        ("in one tensor", granite, {"target_modules": ["all-experts"]}),
        ("it has no experts", dense, {"target_modules": ["all-experts"]}),
    ):
        with pytest.raises(UserError, match=text):
            adapter_of(SftArguments(sft_type="lora", **options), config)
    assert not any("experts" in name for name in adapter_of(SftArguments(sft_type="lora"), granite).targets)
    targets = adapter_of(SftArguments(sft_type="lora"), qwen).targets
    assert any("shared_expert." in name for name in targets) and not any(".experts." in name for name in targets)


def test_names_are_those_that_vllm_reads() -> None:
    lora = {"r": 4, "bias": "none"}
    name = "base_model.model.model.layers.0.mlp.experts.{}.{}.lora_{}.weight"
    shapes = {
        name.format(expert, module, half): (4, 8) if half == "A" else (8, 4)
        for expert in range(2) for module in ("gate_proj", "up_proj", "down_proj") for half in "AB"
    }  # fmt: skip
    assert vllm_refuses(lora, shapes) == ""
    assert "all three" in vllm_refuses(lora, {key: value for key, value in shapes.items() if "down" not in key})
    assert "no adapters for gate" in vllm_refuses(lora, {"base_model.model.model.layers.0.mlp.gate.lora_A.weight": (4, 8)})


def test_a_base_whose_experts_are_one_tensor_is_known_in_both_forms(tmp_path: Path) -> None:
    """granitemoe's folder and what was converted from it: an adapter begins from either."""
    start = tiny_start(tmp_path, "granitemoe")
    config = load_config(tmp_path / "hf")
    assert base_digest(tmp_path / "hf", config) == base_digest(start / "release", config)
