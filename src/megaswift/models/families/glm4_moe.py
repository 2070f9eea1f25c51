"""GLM 4.5 to 4.7: a part of each head rotates; experts chosen by sigmoid and a bias, beside one for every token."""

from __future__ import annotations

from typing import Any

from megaswift.models.experts import (
    ROUTING_FIELDS,
    dense_mlp,
    grouped_sigmoid_experts,
    kind_with,
    only,
    shared_rules,
    usual_expert_rules,
    without_mlp,
)
from megaswift.models.families.llama import LLAMA
from megaswift.models.families.qwen3 import QWEN3
from megaswift.models.family import Family, decoder_settings, layers_after
from megaswift.models.kinds import Kind
from megaswift.models.rules import qkv_bias

_MLP = "model.layers.{i}.mlp."


def _kind(config: Any, layer: int) -> Kind:
    attention: dict[str, Any] = dict(qkv_bias=bool(config.attention_bias), qk_norm=bool(config.use_qk_norm))
    if layer < config.first_k_dense_replace:
        return Kind(**attention)
    return kind_with(grouped_sigmoid_experts(config), **attention)


GLM4_MOE = Family(
    name="glm4_moe",
    hf_types=("glm4_moe",),
    rules=without_mlp(LLAMA.rules)
    + (qkv_bias(layers=lambda kind: kind.qkv_bias),)
    + only((rule for rule in QWEN3.rules if rule not in LLAMA.rules), lambda kind: kind.qk_norm)
    + dense_mlp(LLAMA.rules)
    + usual_expert_rules(_MLP + "gate.e_score_correction_bias")
    + shared_rules(*(f"{_MLP}shared_experts.{name}_proj.weight" for name in ("gate", "up", "down"))),
    settings=decoder_settings,
    kind=_kind,
    attention_bias=None,
    partial_rotary=True,
    extra_fields=ROUTING_FIELDS
    | frozenset(
        "n_routed_experts n_shared_experts n_group topk_group first_k_dense_replace routed_scaling_factor use_qk_norm "
        "num_nextn_predict_layers num_mtp_layers".split()
    ),
    ahead=layers_after,
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        attention_bias=True,
        use_qk_norm=True,
        intermediate_size=96,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
        vocab_size=131,
        max_position_embeddings=256,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
)
