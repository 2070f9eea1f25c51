"""dots.llm1: Qwen3's attention; experts chosen by sigmoid and a bias, within groups, beside one that every token goes to."""

from __future__ import annotations

from typing import Any

from megaswift.models.experts import (
    ROUTING_FIELDS,
    dense_mlp,
    grouped_sigmoid_experts,
    kind_with,
    shared_rules,
    usual_expert_rules,
    without_mlp,
)
from megaswift.models.families.qwen3 import QWEN3
from megaswift.models.family import Family, decoder_settings, typed_window
from megaswift.models.kinds import Kind

_LAYER = "model.layers.{i}."
_SHARED = _LAYER + "mlp.shared_experts."


def _kind(config: Any, layer: int) -> Kind:
    if layer < config.first_k_dense_replace:
        return Kind(qk_norm=True, window=typed_window(config, layer))
    return kind_with(grouped_sigmoid_experts(config), qk_norm=True, window=typed_window(config, layer))


DOTS1 = Family(
    name="dots1",
    hf_types=("dots1",),
    rules=without_mlp(QWEN3.rules)
    + dense_mlp(QWEN3.rules)
    + usual_expert_rules(_LAYER + "mlp.gate.e_score_correction_bias")
    + shared_rules(_SHARED + "gate_proj.weight", _SHARED + "up_proj.weight", _SHARED + "down_proj.weight"),
    settings=decoder_settings,
    kind=_kind,
    extra_fields=ROUTING_FIELDS
    | {"n_routed_experts", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "routed_scaling_factor"},
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        layer_types=["full_attention"] * 4,
        sliding_window=None,
        vocab_size=130,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)
