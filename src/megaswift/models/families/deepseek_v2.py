"""DeepSeek V2 and V2.5, V2 Lite, Coder V2: latent attention; experts chosen by softmax, of all or of the best groups, beside those for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megaswift.errors import UserError
from megaswift.models.experts import ROUTING_FIELDS, kind_with, only_value
from megaswift.models.families.deepseek_v3 import DEEPSEEK_V3, FIELDS
from megaswift.models.kinds import LATENT, Experts, Kind
from megaswift.models.latent import latent_of

GREEDY, GROUPS = "greedy", "group_limited_greedy"


def _kind(config: Any, layer: int) -> Kind:
    for field, value in (("scoring_func", "softmax"), ("norm_topk_prob", False), ("moe_layer_freq", 1)):
        only_value(config, field, value)
    if config.topk_method not in (GREEDY, GROUPS):
        raise UserError(
            f"topk_method = {config.topk_method!r} is not supported (only {GREEDY!r} and {GROUPS!r}).",
            where="config.json: topk_method",
            fix="train this model elsewhere; nothing was converted",
        )
    latent, grouped = latent_of(config), config.topk_method == GROUPS
    if layer < config.first_k_dense_replace:
        return Kind(attention=LATENT, latent=latent)
    experts = Experts(
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        renormalise=False,
        factor=float(config.routed_scaling_factor),
        groups=config.n_group if grouped else 1,
        kept=config.topk_group if grouped else 1,
        group_score="best",
        shared_ffn=config.moe_intermediate_size * config.n_shared_experts,
    )
    return kind_with(experts, attention=LATENT, latent=latent)


DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    name="deepseek_v2",
    hf_types=("deepseek_v2",),
    rules=tuple(rule for rule in DEEPSEEK_V3.rules if not rule.megatron.endswith("expert_bias")),
    kind=_kind,
    rotates_in_fp32=True,
    extra_fields=ROUTING_FIELDS | FIELDS - {"rope_interleave", "num_nextn_predict_layers", "num_mtp_layers"},
    ahead=lambda config: (),
    tiny={name: value for name, value in DEEPSEEK_V3.tiny.items() if name != "norm_topk_prob"}
    | {
        "q_lora_rank": None,
        "topk_method": GROUPS,
        "routed_scaling_factor": 2.0,
        "n_shared_experts": 2,
        "rope_parameters": DEEPSEEK_V3.tiny["rope_parameters"] | {"mscale": 0.9, "mscale_all_dim": 0.707},
    },
)
