"""MiniMax M2: queries and keys of all heads normed together, a part of each head rotates; experts chosen by sigmoid and a bias."""

from __future__ import annotations

from typing import Any

from megaswift.errors import UserError
from megaswift.models.experts import ROUTING_FIELDS, expert_rules, kind_with, only_value, without_mlp
from megaswift.models.families.olmoe import OLMOE
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Experts, Kind

_LAYER = "model.layers.{i}."
_MOE = _LAYER + "block_sparse_moe."

# Fields that published folders have and transformers does not ask for, and what it computes.
_MEANT = {
    "scoring_func": "sigmoid", "use_routing_bias": True, "norm_topk_prob": True, "use_qk_norm": True, "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0, "router_jitter_noise": 0.0,
}  # fmt: skip


def _kind(config: Any, layer: int) -> Kind:
    for field, value in _MEANT.items():
        only_value(config, field, value)
    if set(getattr(config, "attn_type_list", None) or [1]) != {1}:
        raise UserError(
            "attn_type_list names layers without full attention, which transformers computes in all.",
            where="config.json: attn_type_list",
            fix="train this model elsewhere; nothing was converted",
        )
    experts = Experts(
        config.num_local_experts, config.num_experts_per_tok, config.intermediate_size, score="sigmoid", bias=True
    )
    return kind_with(experts, qk_norm=True, qk_norm_over_heads=True)


MINIMAX_M2 = Family(
    name="minimax_m2",
    hf_types=("minimax_m2",),
    rules=without_mlp(OLMOE.rules)
    + expert_rules(
        _MOE + "gate.weight",
        *(f"{_MOE}experts.{{e}}.{name}.weight" for name in ("w1", "w3", "w2")),
        norm=_LAYER + "post_attention_layernorm.weight",
        loaded=_LAYER + "mlp.experts.",
        loaded_router=_LAYER + "mlp.gate.weight",
        bias=_MOE + "e_score_correction_bias",
        loaded_bias=_LAYER + "mlp.e_score_correction_bias",
    ),
    settings=decoder_settings,
    kind=_kind,
    partial_rotary=True,
    extra_fields=ROUTING_FIELDS
    | _MEANT.keys()
    | {"rotary_dim", "attn_type_list", "mlp_intermediate_size", "use_mtp", "num_mtp_modules", "mtp_transformer_layers"},
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        rotary_dim=8,
        intermediate_size=24,
        num_local_experts=8,
        num_experts_per_tok=3,
        vocab_size=131,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
)
