"""Granite 3 with experts (1B-A400M, 3B-A800M): factors on embeddings, scores, residual sums and logits; a layer's experts are one tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megaswift.models.experts import ROUTING_FIELDS, expert_rules, kind_with, without_mlp
from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Experts, Factors, Kind
from megaswift.models.parameters import fused, stacked
from megaswift.models.rules import Rule

_LAYER = "model.layers.{i}."
_MOE = _LAYER + "block_sparse_moe."


def _kind(config: Any, layer: int) -> Kind:
    experts = Experts(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size)
    return kind_with(experts, residual_factor=float(config.residual_multiplier))


def _as_one(rule: Rule) -> Rule:
    """A rule of experts that the folder holds in one tensor, gate above up."""
    if rule.megatron.endswith("linear_fc1.weight"):
        return replace(
            rule,
            hf=rule.hf[:1],
            shapes=lambda sizes: [(2 * sizes["expert_ffn"], sizes.hidden)],
            arrangement=lambda sizes: fused(stacked(*[sizes["expert_ffn"]] * 2), [sizes["expert_ffn"]] * 2),
            stacked=True,
        )
    return replace(rule, stacked=True) if "{e}" in rule.megatron else rule


GRANITEMOE = Family(
    name="granitemoe",
    hf_types=("granitemoe",),
    rules=without_mlp(LLAMA.rules)
    + tuple(
        _as_one(rule)
        for rule in expert_rules(
            _MOE + "router.layer.weight",
            _MOE + "input_linear.weight",
            _MOE + "input_linear.weight",
            _MOE + "output_linear.weight",
            norm=_LAYER + "post_attention_layernorm.weight",
            loaded=_MOE + "experts.",
            loaded_router=_MOE + "router.weight",
        )
    ),
    settings=lambda config: decoder_settings(config) | {"softmax_scale": float(config.attention_multiplier)},
    kind=_kind,
    factors=lambda config: Factors(float(config.embedding_multiplier), logits=1.0 / float(config.logits_scaling)),
    extra_fields=ROUTING_FIELDS | {"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"},
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=131,
        max_position_embeddings=256,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)
