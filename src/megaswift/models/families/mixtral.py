"""Mixtral: Mistral's attention, and in every layer experts of which each token goes to two."""

from __future__ import annotations

from typing import Any

from megaswift.errors import UserError
from megaswift.models.experts import ROUTING_FIELDS, expert_rules, kind_with, without_mlp
from megaswift.models.families.mistral import MISTRAL
from megaswift.models.family import Family, decoder_settings, every_window
from megaswift.models.kinds import Experts, Kind

_LAYER = "model.layers.{i}."
_EXPERT = _LAYER + "block_sparse_moe.experts.{e}."


def _kind(config: Any, layer: int) -> Kind:
    if config.router_jitter_noise:
        raise UserError(
            f"router_jitter_noise = {config.router_jitter_noise!r} is not supported (only 0).",
            where="config.json: router_jitter_noise",
            fix="set it to 0: it is noise of a training from the beginning",
        )
    experts = Experts(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size)
    return kind_with(experts, window=every_window(config))


MIXTRAL = Family(
    name="mixtral",
    hf_types=("mixtral",),
    rules=without_mlp(MISTRAL.rules)
    + expert_rules(
        _LAYER + "block_sparse_moe.gate.weight",
        _EXPERT + "w1.weight",
        _EXPERT + "w3.weight",
        _EXPERT + "w2.weight",
        norm=_LAYER + "post_attention_layernorm.weight",
        loaded=_LAYER + "mlp.experts.",
        loaded_router=_LAYER + "mlp.gate.weight",
    ),
    settings=decoder_settings,
    kind=_kind,
    extra_fields=ROUTING_FIELDS | {"router_jitter_noise"},
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=48,
        vocab_size=131,
        max_position_embeddings=256,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
)
