"""Qwen3-Next (80B-A3B): gated delta nets and gated attention, many small experts, and one beside them behind a gate."""

from __future__ import annotations

from typing import Any

from megaswift.models.delta import DELTA_FIELDS, delta_rules, gated_attention_rules, kind_of, projections_by_key_head
from megaswift.models.experts import ROUTING_FIELDS, dense_mlp, every_step, shared_rules, usual_expert_rules, without_mlp
from megaswift.models.families.qwen3_5_text import OUTSIDE_ATTENTION
from megaswift.models.family import LINEAR_TYPES, Family, decoder_settings
from megaswift.models.kinds import Experts, Kind

_LAYER = "model.layers.{i}."
_SHARED = _LAYER + "mlp.shared_expert."
EXPERT_RULES = usual_expert_rules() + shared_rules(
    _SHARED + "gate_proj.weight",
    _SHARED + "up_proj.weight",
    _SHARED + "down_proj.weight",
    _LAYER + "mlp.shared_expert_gate.weight",
)


def experts_of(config: Any) -> Experts:
    """Experts by softmax, whose weights add up to one unless the config says otherwise, and one that every token goes to."""
    return Experts(
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        renormalise=bool(getattr(config, "norm_topk_prob", True)),
        shared_ffn=config.shared_expert_intermediate_size,
        shared_gate=True,
    )


def _kind(config: Any, layer: int) -> Kind:
    return kind_of(config, layer, experts_of(config) if every_step(config, layer) else None)


QWEN3_NEXT = Family(
    name="qwen3_next",
    hf_types=("qwen3_next",),
    rules=without_mlp(OUTSIDE_ATTENTION)
    + dense_mlp(OUTSIDE_ATTENTION)
    + gated_attention_rules()
    + delta_rules(*projections_by_key_head())
    + EXPERT_RULES,
    settings=decoder_settings,
    kind=_kind,
    partial_rotary=True,
    layer_types=LINEAR_TYPES,
    ahead=lambda config: ("mtp.*",),
    extra_fields=DELTA_FIELDS | ROUTING_FIELDS | {"decoder_sparse_step", "mlp_only_layers", "shared_expert_intermediate_size"},
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[2],
        vocab_size=131,
        max_position_embeddings=256,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    ),
)
