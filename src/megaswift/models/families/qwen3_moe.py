"""Qwen3 with experts (30B-A3B, 235B-A22B): Qwen3's attention; of 128 experts each token goes to eight."""

from __future__ import annotations

from typing import Any

from megaswift.models.experts import ROUTING_FIELDS, dense_mlp, every_step, kind_with, usual_expert_rules, without_mlp
from megaswift.models.families.qwen3 import QWEN3
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Experts, Kind


def _kind(config: Any, layer: int) -> Kind:
    if not every_step(config, layer):
        return Kind(qk_norm=True)
    experts = Experts(
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, renormalise=bool(config.norm_topk_prob)
    )
    return kind_with(experts, qk_norm=True)


QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_types=("qwen3_moe",),
    rules=without_mlp(QWEN3.rules) + dense_mlp(QWEN3.rules) + usual_expert_rules(),
    settings=decoder_settings,
    kind=_kind,
    extra_fields=ROUTING_FIELDS | {"decoder_sparse_step", "mlp_only_layers"},
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        vocab_size=128,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
)
