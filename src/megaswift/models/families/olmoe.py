"""OLMoE: experts in every layer, whose weights stay as softmax over all gives them; queries and keys of all heads are normed together."""

from __future__ import annotations

from typing import Any

from megaswift.models.experts import ROUTING_FIELDS, kind_with, usual_expert_rules, without_mlp
from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Experts, Kind
from megaswift.models.rules import copy

_LAYER, _ATTENTION = "model.layers.{i}.", "decoder.layers.{i}.self_attention."


def _kind(config: Any, layer: int) -> Kind:
    renormalise = bool(config.norm_topk_prob)
    experts = Experts(config.num_experts, config.num_experts_per_tok, config.intermediate_size, renormalise=renormalise)
    return kind_with(experts, qk_norm=True, qk_norm_over_heads=True)


OLMOE = Family(
    name="olmoe",
    hf_types=("olmoe",),
    rules=without_mlp(LLAMA.rules)
    + (
        copy(_ATTENTION + "q_layernorm.weight", _LAYER + "self_attn.q_norm.weight", ("q_rows",), split=0),
        copy(_ATTENTION + "k_layernorm.weight", _LAYER + "self_attn.k_norm.weight", ("kv_rows",), split=0),
    )
    + usual_expert_rules(),
    settings=decoder_settings,
    kind=_kind,
    extra_fields=ROUTING_FIELDS,
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=131,
        max_position_embeddings=256,
        pad_token_id=None,
        eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)
