"""The proof: it passes what is right, and names what is wrong: field, layer, module, tensor."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from megaswift.errors import DataError, UserError
from megaswift.models import family_of, parameters_of
from megaswift.proof.parity import Parity, _prompt, _verdict, compare
from megaswift.proof.prove import prove
from megaswift.weights.convert import Precisions, hf_to_megatron, verify_round_trip
from megaswift.weights.convert.model import check_megatron
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader

FP32 = Precisions(torch.float32)
ATTENTION, MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."


def parity(folder: Path, release: Path) -> Parity:
    return compare(load_config(folder), HFCheckpoint.open(folder), Reader(release), FP32, folder)


def altered(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The Megatron form of a folder whose tensors were changed."""
    copy = target / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    return tiny.to_megatron(copy, target / "release")


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_right_conversions_pass(name: str, tiny_folders: Any) -> None:
    folder, release = tiny_folders(name, tie_word_embeddings=name in ("qwen2", "mistral"))
    proof = prove(load_config(folder), HFCheckpoint.open(folder), Reader(release), FP32, folder, 7)
    logits = proof["logits"]
    assert not logits["failed"]
    assert len(logits["prompts"]) >= 8 and logits["positions"] > 300
    # What transformers' own fp32 computes of a gated delta net is 1e-5 from what it computes in fp64.
    delta = any(kind.delta for kind in family_of(name).layers(load_config(folder)))
    assert (
        logits["max_abs"] < (5e-5 if delta else 1e-5)
        and logits["mean_kl"] < (1e-10 if delta else 1e-12)
        and logits["top1"] == 1.0
    )
    assert len(logits["layers"]) == 1 + load_config(folder).num_hidden_layers
    assert all(item["equal"] for item in proof["config"])


ROPE = {"rope_theta": 10000.0}
HONOURED: dict[str, tuple[str, dict[str, Any]]] = {
    "rms_norm_eps": ("llama", {"rms_norm_eps": 1e-2}),
    "rope_theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "linear": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 8.0}}),
    "dynamic": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 512}),
    "yarn": (
        "qwen3",
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "llama3": ("mistral", {"rope_parameters": {**tiny.tiny_config("llama").rope_parameters, "factor": 2.0}}),
    "head_dim": ("qwen3", {"head_dim": 24}),
    "one key/value head": ("llama", {"num_key_value_heads": 1}),
    "as many key/value heads": ("qwen2", {"num_key_value_heads": 8}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("qwen2", {"tie_word_embeddings": False}),
    "sizes": ("llama", {"intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": 77}),
    "sliding_window": ("mistral", {"sliding_window": 48}),
    "sliding_window, some layers": (
        "qwen2",
        {"sliding_window": 12, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "sliding_window, experts": ("mixtral", {"sliding_window": 12}),
    "layer_types": ("gemma2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
    "caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "query_pre_attn_scalar": ("gemma3_text", {"query_pre_attn_scalar": 7, "final_logit_softcapping": 2.0}),
    "no attention_bias": ("glm", {"attention_bias": False}),
    "attention_bias": ("glm4", {"attention_bias": True}),
    "partial_rotary_factor": ("nemotron", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25, **ROPE}}),
    "no window, so all rotate": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "no alpha": ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "default", **ROPE}}),
    "window of all layers": ("ministral3", {"sliding_window": 12}),
    "use_bias": ("starcoder2", {"use_bias": False, "norm_epsilon": 1e-2}),
    "logit_scale": ("cohere", {"logit_scale": 3.0, "layer_norm_eps": 1e-2}),
    "short_factor": ("phi3", {"rope_parameters": {**tiny.tiny_config("phi3").rope_parameters, "short_factor": [2.0, 7.0]}}),
    "no_rope_layers": ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
    "num_experts": ("qwen3_moe", {"num_experts": 3}),
    "num_experts_per_tok": ("qwen3_moe", {"num_experts_per_tok": 5}),
    "norm_topk_prob": ("qwen3_moe", {"norm_topk_prob": False}),
    "decoder_sparse_step": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "mlp_only_layers": ("qwen2_moe", {"mlp_only_layers": [0, 3]}),
    "shared_expert_intermediate_size": ("qwen2_moe", {"shared_expert_intermediate_size": 24}),
    "moe_intermediate_size": ("qwen2_moe", {"moe_intermediate_size": 8}),
    "factors": ("granitemoe", {"embedding_multiplier": 7.0, "logits_scaling": 0.3, "residual_multiplier": 0.2}),
    "attention_multiplier": ("granitemoe", {"attention_multiplier": 0.5}),
}


@pytest.mark.parametrize("case", HONOURED)
def test_every_honoured_field_reaches_the_computation(case: str, tmp_path: Path) -> None:
    name, changes = HONOURED[case]
    tiny.save_tiny(tmp_path / "hf", name, **changes)
    result = parity(tmp_path / "hf", tiny.to_megatron(tmp_path / "hf", tmp_path / "release"))
    assert not result.failed, (result.failed, result.where)
    assert all(item.equal for item in result.config)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}, {"attention_dropout": 0.1}, {"logit_scale": 2.0},
        {"pretraining_tp": 2}, {"partial_rotary_factor": 0.5}, {"quantization_config": {"bits": 4}},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_fields_that_are_not_honoured_are_refused(changes: dict[str, Any], tiny_folders: Any, tmp_path: Path) -> None:
    folder, _ = tiny_folders("llama", tie_word_embeddings=False)
    shutil.copytree(folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=next(iter(changes)).replace("rope_parameters", "longrope").replace("quantization_config", "quantized")
    ):
        load_config(tmp_path / "hf")


def test_a_wrong_epsilon_is_named(tiny_folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, release = tiny_folders("llama", tie_word_embeddings=False)
    family = family_of("llama")
    wrong = dataclasses.replace(family, settings=lambda config: family.settings(config) | {"layernorm_epsilon": 1e-6})
    monkeypatch.setattr("megaswift.megatron.model.family_of", lambda name: wrong)
    with pytest.raises(DataError) as caught:
        prove(load_config(folder), HFCheckpoint.open(folder), Reader(release), FP32, folder, 0)
    assert "rms_norm_eps is [1e-05] in config.json and [1e-06] in the Megatron model" in caught.value.what
    assert "does not compute what transformers computes" in caught.value.what
    assert "decoder.layers.0.input_layernorm" in caught.value.where


def test_a_dropped_rope_factor_is_named(tiny_folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaswift.megatron import model

    class NoFactor(model.RotaryTable):
        def __init__(self, config: Any, device: torch.device, name: str) -> None:
            plain = type(config).from_dict(
                config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
            )
            super().__init__(plain, device, name)

    folder, release = tiny_folders("llama", tie_word_embeddings=False)
    monkeypatch.setattr(model, "RotaryTable", NoFactor)
    with pytest.raises(DataError) as caught:
        prove(load_config(folder), HFCheckpoint.open(folder), Reader(release), FP32, folder, 0)
    assert "rope_parameters (factor 4.0" in caught.value.what
    assert "decoder.layers.0.self_attention.linear_proj" in caught.value.where and "RoPE" in caught.value.where


def test_swapped_tensors_are_named(tiny_folders: Any, tmp_path: Path) -> None:
    folder, _ = tiny_folders("qwen3", tie_word_embeddings=False)
    one, two = ATTENTION.format(2) + "o_proj.weight", ATTENTION.format(3) + "o_proj.weight"

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[two] = tensors[two], tensors[one]

    release = altered(folder, tmp_path, swap)
    result = parity(folder, release)
    assert "decoder.layers.2.self_attention.linear_proj" in result.where and one.removesuffix(".weight") in result.where
    assert [value < 1e-5 for value in result.layers] == [True, True, True, False, False]
    (tmp_path / "good").mkdir()
    recorded = hf_to_megatron(HFCheckpoint.open(folder), load_config(folder), tmp_path / "good", FP32).tensors
    with pytest.raises(DataError) as caught:
        verify_round_trip(Reader(release), load_config(folder), recorded, FP32)
    assert caught.value.where == f"{one}, {two}"


def test_transposed_gate_and_up_are_named(tiny_folders: Any, tmp_path: Path) -> None:
    folder, _ = tiny_folders("llama", tie_word_embeddings=False)
    gate, up = MLP.format(1) + "gate_proj.weight", MLP.format(1) + "up_proj.weight"

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    result = parity(folder, altered(folder, tmp_path, swap))
    assert "decoder.layers.1.mlp.linear_fc1" in result.where and "gate_proj" in result.where


def test_a_wrong_rule_that_survives_the_round_trip_is_caught_by_the_logits(
    tiny_folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = tiny_folders("llama", tie_word_embeddings=False)
    family = family_of("llama")
    rules = tuple(
        dataclasses.replace(rule, hf=rule.hf[::-1]) if rule.megatron.endswith("linear_fc1.weight") else rule
        for rule in family.rules
    )
    monkeypatch.setattr("megaswift.models.family_of", lambda name: dataclasses.replace(family, rules=rules))
    (tmp_path / "release").mkdir()
    done = hf_to_megatron(HFCheckpoint.open(folder), load_config(folder), tmp_path / "release", FP32)
    assert verify_round_trip(Reader(tmp_path / "release"), load_config(folder), done.tensors, FP32) == len(done.tensors)
    result = parity(folder, tmp_path / "release")
    assert "decoder.layers.0.mlp.linear_fc" in result.where, result.where


@pytest.mark.parametrize("worst", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("number", ["logits", "KL", "likeliest", "states"])
def test_each_limit_is_judged_alone(number: str, worst: float) -> None:
    within = Parity(max_abs=1e-6, mean_kl=1e-12, top1=1.0, layers=[1e-6, 1e-6])
    assert _verdict(within, 1e-4) == ""
    changes: dict[str, Any] = {"logits": {"max_abs": worst}, "KL": {"mean_kl": worst}, "states": {"layers": [worst, 1e-6]}}
    changes["likeliest"] = {"top1": 0.5 if worst == 1.0 else float("nan")}
    failed = _verdict(dataclasses.replace(within, **changes[number]), 1e-4)
    assert number in failed and ";" not in failed


def test_logits_that_are_no_numbers_differ() -> None:
    found = _prompt("p", torch.zeros(70, 3), torch.tensor([0.0, float("nan"), 0.0]).expand(70, 3), 1e-4)
    assert found.max_abs == found.mean_kl == float("inf")


def test_logits_beyond_their_limit_stop_the_proof(tiny_folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, release = tiny_folders("llama", tie_word_embeddings=False)
    monkeypatch.setattr("megaswift.proof.parity.MAX_LOGIT", -1.0)
    with pytest.raises(DataError, match="does not compute what transformers computes: logits differ"):
        prove(load_config(folder), HFCheckpoint.open(folder), Reader(release), FP32, folder, 7)


def test_a_tensor_that_the_model_does_not_have_is_named(tiny_folders: Any) -> None:
    folder, release = tiny_folders("llama", tie_word_embeddings=False)
    config = load_config(folder)
    check_megatron(Reader(release), parameters_of(config))
    config.tie_word_embeddings = True
    with pytest.raises(DataError, match=r"Not expected: output_layer\.weight"):
        check_megatron(Reader(release), parameters_of(config))


def test_embedding_and_output_layer_are_named(tiny_folders: Any, tmp_path: Path) -> None:
    folder, _ = tiny_folders("llama", tie_word_embeddings=False)
    for number, (name, place) in enumerate(
        {"model.embed_tokens.weight": "embedding", "lm_head.weight": "output_layer"}.items()
    ):
        result = parity(folder, altered(folder, tmp_path / str(number), lambda tensors, name=name: tensors[name].mul_(1.01)))
        assert result.where.startswith(place), result.where


def test_a_failed_proof_makes_nothing_and_exits_3(
    tiny_folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megaswift.cli import main

    folder, _ = tiny_folders("llama", tie_word_embeddings=False)
    family = family_of("llama")
    wrong = dataclasses.replace(family, settings=lambda config: family.settings(config) | {"layernorm_epsilon": 1e-6})
    monkeypatch.setattr("megaswift.megatron.model.family_of", lambda name: wrong)
    words = [
        "export",
        "--to_megatron",
        "true",
        "--model_type",
        "t",
        "--model_id_or_path",
        str(folder),
        "--megatron_output_dir",
        str(tmp_path / "m"),
    ]
    assert main(words) == 3
    assert "rms_norm_eps" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--verify", "false"]) == 0
    assert "not verified (--verify false)" in capsys.readouterr().out
