"""A run's adapter as a PEFT folder: what peft itself makes of it, merged and not, served, verified; and what is not published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megaswift.commands.export import export_main
from megaswift.commands.verify import verify_main
from megaswift.config.options import ExportArguments, InferArguments, VerifyArguments
from megaswift.errors import DataError, UserError
from megaswift.inference.model_ref import choose
from megaswift.models.adapters import Lora
from megaswift.proof.adapter_readers import vllm_refuses
from megaswift.store.manifest import read_manifest
from tests.ranks import RankPool
from tests.training import tiny_start, train, write_rows

OPTIONS: dict[str, Any] = {
    "sft_type": "lora", "lora_rank": 4, "lora_dropout": 0.1, "learning_rate": 2e-2, "max_steps": 4, "gradient_accumulation_steps": 2,
    "dataset_test_ratio": 0.0, "system": "Be short.",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> (run, folder of its base), each trained once: one of the seven linear layers, one with a norm and the head as well."""
    pool, made = RankPool(), {}
    options = {
        "linear": (1, {}),
        "whole": (2, {"tp": 2, "modules_to_save": ["norm", "lm_head", "k_norm"], "target_modules": ["q_proj", r".*\.2\.mlp\.up_proj"]}),
    }  # fmt: skip

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            start = tiny_start(root, "qwen3", tie_word_embeddings=False)
            world, more = options[name]
            run = train(
                pool,
                root / "out",
                world,
                resume_from_checkpoint=str(start),
                dataset=[str(write_rows(root / "rows.jsonl"))],
                **OPTIONS,
                **more,
            )
            made[name] = (run.directory, root / "hf")
        return made[name]

    yield get
    pool.close()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 60)[None]).logits[0]


@pytest.mark.parametrize("name", ["linear", "whole"])
def test_peft_makes_of_it_what_the_merged_model_makes(name: str, runs: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, folder = runs(name)
    adapter = export_main(ExportArguments(ckpt_dir=str(run), to_hf=True, hf_output_dir=str(tmp_path / "adapter")))
    merged = export_main(
        ExportArguments(ckpt_dir=str(run), to_hf=True, merge_lora=True, hf_output_dir=str(tmp_path / "merged"))
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = logits(base)
    found = logits(PeftModel.from_pretrained(base, str(adapter)))
    wanted = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    assert float((found - wanted).abs().max()) < 5e-6
    assert float((found - plain).abs().max()) > 1e-2
    manifest, config = read_manifest(adapter), json.loads((adapter / "adapter_config.json").read_text())
    assert manifest["kind"] == "adapter" and manifest["verified"]["logits"]["max_abs"] < 1e-5
    assert config["base_model_name_or_path"] == str(folder.resolve())
    assert (manifest["serves"]["vllm"] == "names and shapes") == (name == "linear")
    assert config["target_modules"] == (
        sorted(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")) if name == "linear"
        else ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj",
              "model.layers.2.mlp.up_proj", "model.layers.3.self_attn.q_proj"]
    )  # fmt: skip
    assert read_manifest(merged)["merged"]["rounding"]["lost"] < 1e-5
    verify_main(VerifyArguments(directory=str(adapter), deep=True))


def test_a_run_and_its_adapter_answer_alike(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--ckpt_dir RUN, --ckpt_dir ADAPTER and --adapters ADAPTER are one merged model, with the run's system prompt."""
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))
    run, folder = runs("linear")
    adapter = export_main(ExportArguments(ckpt_dir=str(run), to_hf=True, hf_output_dir=str(tmp_path / "adapter")))
    weights = []
    for args in (
        InferArguments(ckpt_dir=str(run)),
        InferArguments(ckpt_dir=str(adapter)),
        InferArguments(adapters=[str(adapter)]),
        InferArguments(adapters=[str(adapter)], model_id_or_path=str(folder)),
    ):
        chosen = choose(args, ("system",))
        assert chosen.args.system == "Be short."
        weights.append(load_file(chosen.locate().path / "model.safetensors"))
    assert all(torch.equal(weights[0][name], other[name]) for other in weights for name in weights[0])
    assert not torch.equal(weights[0]["model.layers.0.self_attn.q_proj.weight"], load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip
    other = tiny_start(tmp_path / "other", "qwen3", seed=3, tie_word_embeddings=False).parent / "hf"
    with pytest.raises(DataError, match="not the weights that the adapter was trained beside"):
        choose(InferArguments(adapters=[str(adapter)], model_id_or_path=str(other))).locate()
    with pytest.raises(UserError, match="no adapter in PEFT's form"):
        choose(InferArguments(adapters=[str(run)]))


def test_what_peft_computes_otherwise_is_not_published(runs: Any, tmp_path: Path) -> None:
    """A config that says another scale, and a tensor under another's name: refused, and nothing is there."""
    run, _ = runs("linear")
    honest = Lora.peft_config

    def other_scale(self: Lora, *args: Any) -> dict[str, Any]:
        return {**honest(self, *args), "lora_alpha": self.alpha * 1.01}

    with mock.patch.object(Lora, "peft_config", other_scale), pytest.raises(DataError, match="PEFT does not compute") as caught:
        export_main(ExportArguments(ckpt_dir=str(run), to_hf=True, hf_output_dir=str(tmp_path / "adapter")))
    assert "linear_qkv" in caught.value.where
    assert not list(tmp_path.iterdir())


def test_a_base_elsewhere(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base was moved it is named; another one is refused, and without its folder it is made of its Megatron weights."""
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))
    run, folder = runs("linear")
    moved = folder.rename(folder.with_name("moved"))
    try:
        words = {"ckpt_dir": str(run), "to_hf": True}
        made = export_main(ExportArguments(**words, hf_output_dir=str(tmp_path / "made")))
        assert "bases" in json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"]
        named = export_main(ExportArguments(**words, model_id_or_path=str(moved), hf_output_dir=str(tmp_path / "named")))
        assert json.loads((named / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
        other = tiny_start(tmp_path / "other", "qwen3", seed=3, tie_word_embeddings=False).parent / "hf"
        with pytest.raises(DataError, match="trained beside are not to be found"):
            export_main(ExportArguments(**words, model_id_or_path=str(other), hf_output_dir=str(tmp_path / "bad")))
    finally:
        moved.rename(folder)


def test_rounding_of_a_merge_is_told(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a bf16 base a small adapter is lost in part: how much is measured, and too much is refused."""
    from megaswift.export.adapter import merge_loss
    from megaswift.weights.convert.lora import Adapter
    from megaswift.weights.hf.read import HFCheckpoint
    from tests.lora.adapters import lora_of, peft_model

    _, folder = runs("linear")
    from transformers import AutoModelForCausalLM

    from megaswift.weights.convert.lora import merge_adapter

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    lora = lora_of(folder)
    peft_model(folder, lora).save_pretrained(tmp_path / "adapter")
    adapter, base = Adapter.open(tmp_path / "adapter"), HFCheckpoint.open(tmp_path / "base")
    merge_adapter(adapter, base, tmp_path / "merged")
    found = merge_loss(adapter, base, HFCheckpoint.open(tmp_path / "merged"))
    name = found["tensor"]
    a, b, scale = adapter.pairs[name]
    added = scale * (b @ a)
    lost = ((base.tensor(name).float() + added).bfloat16().float() - base.tensor(name).float() - added).norm() / added.norm()
    assert 1e-4 < found["lost"] < 0.1 and found["lost"] == pytest.approx(float(lost), rel=1e-3)


def test_what_vllm_refuses() -> None:
    config = {"r": 8, "bias": "none", "modules_to_save": None, "use_dora": False}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    shapes = {name.format("A"): (8, 32), name.format("B"): (32, 8)}
    assert vllm_refuses(config, shapes) == ""
    assert "modules_to_save" in vllm_refuses({**config, "modules_to_save": ["norm"]}, shapes)
    assert "rank" in vllm_refuses({**config, "r": 1024}, shapes)
    assert "DoRA" in vllm_refuses({**config, "use_dora": True}, shapes)
    assert "shape" in vllm_refuses(config, {name.format("B"): (8, 32)})
    assert "lm_head" in vllm_refuses(config, {"base_model.model.lm_head.lora_A.weight": (8, 32)})
    assert "does not know" in vllm_refuses(config, {"model.norm.weight": (32,)})
