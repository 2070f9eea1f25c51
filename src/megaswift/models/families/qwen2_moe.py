"""Qwen1.5 and Qwen2 with experts (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): weights of the chosen experts stay as softmax over all
gives them, and one expert beside them, behind a gate, sees every token.
"""

from __future__ import annotations

from typing import Any

from megaswift.errors import UserError
from megaswift.models.experts import (
    ROUTING_FIELDS,
    dense_mlp,
    every_step,
    kind_with,
    shared_rules,
    usual_expert_rules,
    without_mlp,
)
from megaswift.models.families.qwen2 import QWEN2
from megaswift.models.family import Family
from megaswift.models.kinds import Experts, Kind

_LAYER = "model.layers.{i}."
_SHARED = _LAYER + "mlp.shared_expert."


def _kind(config: Any, layer: int) -> Kind:
    if not config.qkv_bias:
        raise UserError(
            "qkv_bias = false is not supported (only true).",
            where="config.json: qkv_bias",
            fix="train this model elsewhere; nothing was converted",
        )
    if not every_step(config, layer):
        return Kind()
    experts = Experts(
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        renormalise=bool(config.norm_topk_prob),
        shared_ffn=config.shared_expert_intermediate_size,
        shared_gate=True,
    )
    return kind_with(experts)


QWEN2_MOE = Family(
    name="qwen2_moe",
    hf_types=("qwen2_moe",),
    rules=without_mlp(QWEN2.rules)
    + dense_mlp(QWEN2.rules)
    + usual_expert_rules()
    + shared_rules(
        _SHARED + "gate_proj.weight",
        _SHARED + "up_proj.weight",
        _SHARED + "down_proj.weight",
        _LAYER + "mlp.shared_expert_gate.weight",
    ),
    settings=QWEN2.settings,
    kind=_kind,
    attention_bias=None,
    extra_fields=ROUTING_FIELDS | {"decoder_sparse_step", "mlp_only_layers", "shared_expert_intermediate_size", "qkv_bias"},
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=96,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        vocab_size=130,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)
