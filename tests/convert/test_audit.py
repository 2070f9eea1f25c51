"""The config audit: each of its rows sees a Megatron model that was built wrong in just that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.errors import DataError
from megaswift.proof.audit import audit, require_equal
from megaswift.proof.streams import hf_stream, megatron_stream, one_process
from megaswift.weights.convert import Precisions
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader


@pytest.fixture(scope="module")
def models(tiny_folders: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Config, transformers' model and Megatron-Core's of a tiny Qwen2, whose RoPE is yarn."""
    folder, release = tiny_folders("qwen2", tie_word_embeddings=True)
    config = load_config(folder)
    with one_process():
        yield (
            config,
            hf_stream(config, HFCheckpoint.open(folder), Precisions(torch.float32)),
            megatron_stream(config, Reader(release)),
        )


def meta(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(*shape, device="meta"))


# Row of the audit -> what is built wrong: (object, attribute, value), from the model and its first layer.
WRONG: dict[str, Callable[[Any, Any], tuple[Any, str, Any]]] = {
    "num_hidden_layers": lambda model, layer: (model.decoder, "layers", model.decoder.layers[:-1]),
    "hidden_size": lambda model, layer: (model.embedding.word_embeddings, "weight", meta(130, 60)),
    "num_attention_heads": lambda model, layer: (layer.self_attention, "num_attention_heads_per_partition", 7),
    "num_key_value_heads": lambda model, layer: (layer.self_attention, "num_query_groups_per_partition", 8),
    "head_dim": lambda model, layer: (layer.self_attention, "hidden_size_per_attention_head", 16),
    "intermediate_size": lambda model, layer: (layer.mlp.linear_fc1, "weight", meta(190, 64)),
    "vocab_size": lambda model, layer: (model, "true_vocab", 128),
    "rms_norm_eps": lambda model, layer: (model.decoder.layers[2].pre_mlp_layernorm, "eps", 1e-5),
    "hidden_act": lambda model, layer: (model.config, "activation_func", torch.nn.functional.gelu),
    "hidden_act (not gated)": lambda model, layer: (model.config, "gated_linear_unit", False),
    "attention_bias (q, k, v)": lambda model, layer: (layer.self_attention.linear_qkv, "bias", None),
    "attention_bias (o)": lambda model, layer: (layer.self_attention.linear_proj, "bias", meta(64)),
    "mlp_bias": lambda model, layer: (layer.mlp.linear_fc1, "bias", meta(192)),
    "q/k norm": lambda model, layer: (model.decoder.layers[1].self_attention, "q_layernorm", torch.nn.RMSNorm(8, eps=1e-6)),
    "norms around attention and MLP": lambda model, layer: (layer, "input_layernorm", torch.nn.Identity()),
    "layers that rotate": lambda model, layer: (model.decoder.layers[3].self_attention.core_attention, "rotation", None),
    "attention scale": lambda model, layer: (layer.self_attention.core_attention, "softmax_scale", 1.001 * 8**-0.5),
    "attention scale (last layer)": lambda model, layer: (model.decoder.layers[-1].self_attention.core_attention, "softmax_scale", 0.3),
    "tie_word_embeddings": lambda model, layer: (model, "share_embeddings_and_output_weights", False),
    "attention_dropout": lambda model, layer: (model.config, "attention_dropout", 0.1),
    "rope_parameters (frequencies)": lambda model, layer: (model.ropes["main"], "inverse", model.ropes["main"].inverse * 1.0001),
    "rope_parameters (number)": lambda model, layer: (model.ropes["main"], "inverse", model.ropes["main"].inverse[:-1]),
    "rope_parameters (yarn's attention factor)": lambda model, layer: (model.ropes["main"], "scale", model.ropes["main"].scale * 1.01),
}  # fmt: skip


def routed(layer: Any, **changes: Any) -> tuple[Any, str, Any]:
    return layer.mlp.router, "experts", replace(layer.mlp.router.experts, **changes)


# The same for a model with experts in its first layer but not in all.
WRONG_EXPERTS: dict[str, Callable[[Any, Any], tuple[Any, str, Any]]] = {
    "layers with experts": lambda model, layer: (model.decoder.layers[2], "mlp", model.decoder.layers[1].mlp),
    "experts, rows of one": lambda model, layer: (layer.mlp.experts.linear_fc1, "weight", meta(4, 40, 64)),
    "num_experts_per_tok": lambda model, layer: routed(layer, chosen=3),
    "norm_topk_prob": lambda model, layer: routed(layer, renormalise=True),
    "shared expert": lambda model, layer: (layer.mlp.shared_experts.linear_fc1, "weight", meta(48, 64)),
    "gate of the shared expert": lambda model, layer: (layer.mlp, "shared_gate", None),
    "intermediate_size": lambda model, layer: (model.decoder.layers[1].mlp.linear_fc1, "weight", meta(190, 64)),
}
WRONG_FACTORS: dict[str, Callable[[Any, Any], tuple[Any, str, Any]]] = {
    "embedding_multiplier": lambda model, layer: (model, "embedding_factor", 1.0),
    "residual_multiplier": lambda model, layer: (model.decoder.layers[2], "residual_factor", 1.0),
    "logits_scaling": lambda model, layer: (model, "logits_factor", 2.0),
    "attention scale": lambda model, layer: (layer.self_attention.core_attention, "softmax_scale", None),
}


WRONG_LIMITS: dict[str, Callable[[Any, Any], tuple[Any, str, Any]]] = {
    "sliding_window": lambda model, layer: (layer.self_attention.core_attention, "window", 10),
    "attn_logit_softcapping": lambda model, layer: (model.decoder.layers[1].self_attention.core_attention, "score_cap", None),
    "final_logit_softcapping": lambda model, layer: (model, "logit_cap", None),
    "embedding_multiplier": lambda model, layer: (model, "embedding_factor", 8.1),
    "norms around attention and MLP": lambda model, layer: (layer, "post_mlp_layernorm", torch.nn.Identity()),
    "attention scale": lambda model, layer: (layer.self_attention.core_attention, "softmax_scale", None),
}
WRONG_GROWTH: dict[str, Callable[[Any, Any], tuple[Any, str, Any]]] = {
    "rope_parameters (queries": lambda model, layer: (model.ropes["queries"], "growth", (0.5, 16)),
}


@pytest.mark.parametrize(
    ("family", "cases"),
    [("qwen2_moe", WRONG_EXPERTS), ("granitemoe", WRONG_FACTORS), ("gemma2", WRONG_LIMITS), ("ministral3", WRONG_GROWTH)],
)
def test_experts_and_factors_built_wrong_are_seen(family: str, cases: dict[str, Any], tiny_folders: Any) -> None:
    folder, release = tiny_folders(family, tie_word_embeddings=False)
    config = load_config(folder)
    with one_process():
        reference, measured = (
            hf_stream(config, HFCheckpoint.open(folder), Precisions(torch.float32)),
            megatron_stream(config, Reader(release)),
        )
        assert all(item.equal for item in audit(config, reference, measured))
        for name, wrong in cases.items():
            with mock.patch.object(*wrong(measured.module, measured.module.decoder.layers[0])):
                found = {item.field for item in audit(config, reference, measured) if not item.equal}
                assert any(row == name or row.startswith(name + ":") for row in found), name


def row_of(name: str, rows: set[str]) -> str:
    """The row that a case of WRONG is about."""
    return next(row for row in sorted(rows, key=len, reverse=True) if name == row or name.startswith(row.split(" (factor")[0]))


@pytest.mark.parametrize("name", WRONG)
def test_each_row_sees_a_model_built_wrong(name: str, models: Any) -> None:
    config, reference, measured = models
    right = audit(config, reference, measured)
    assert all(item.equal for item in right)
    place, attribute, value = WRONG[name](measured.module, measured.module.decoder.layers[0])
    with mock.patch.object(place, attribute, value):
        found = audit(config, reference, measured)
    row = row_of(name, {item.field for item in right})
    wrong = {item.field for item in found if not item.equal}
    assert row in wrong and wrong <= {row, "attention scale"}, wrong  # the scale follows from the size of a head
    with pytest.raises(DataError, match="config audit: ") as caught:
        require_equal(found, "config.json")
    assert f"{row} is " in caught.value.what


def test_every_row_has_its_case(models: Any) -> None:
    rows = {item.field for item in audit(*models)}
    assert {row_of(name, rows) for name in WRONG} == rows
