"""ERNIE 4.5 with experts: the dense model's attention; experts chosen by softmax and a bias, beside those for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megaswift.models.experts import (
    ROUTING_FIELDS,
    dense_mlp,
    kind_with,
    only_value,
    shared_rules,
    usual_expert_rules,
    without_mlp,
)
from megaswift.models.families.ernie4_5 import ERNIE4_5
from megaswift.models.kinds import Experts, Kind

_MLP, _BIAS = "model.layers.{i}.mlp.", "moe_statics.e_score_correction_bias"


def _kind(config: Any, layer: int) -> Kind:
    for field, value in (("moe_gate", "topk"), ("moe_use_aux_free", True), ("use_rmsnorm", True)):
        only_value(config, field, value)
    inside = config.moe_layer_start_index <= layer <= config.moe_layer_end_index
    if not inside or (layer + 1) % config.moe_layer_interval:
        return Kind()
    experts = Experts(
        config.moe_num_experts,
        config.moe_k,
        config.moe_intermediate_size,
        least=float(config.moe_norm_min),
        bias=True,
        shared_ffn=config.moe_intermediate_size * config.moe_num_shared_experts,
    )
    return kind_with(experts)


ERNIE4_5_MOE = replace(
    ERNIE4_5,
    name="ernie4_5_moe",
    hf_types=("ernie4_5_moe",),
    rules=without_mlp(ERNIE4_5.rules)
    + dense_mlp(ERNIE4_5.rules)
    + tuple(
        replace(rule, stacked=True) if rule.megatron.endswith("expert_bias") else rule  # of one row, for one group of experts
        for rule in usual_expert_rules(_MLP + _BIAS, _MLP + "gate." + _BIAS)
    )
    + shared_rules(*(f"{_MLP}shared_experts.{name}_proj.weight" for name in ("gate", "up", "down"))),
    kind=_kind,
    extra_fields=ROUTING_FIELDS
    | frozenset(
        "moe_k moe_num_experts moe_num_shared_experts moe_layer_start_index moe_layer_end_index moe_layer_interval moe_norm_min "
        "moe_gate moe_use_aux_free moe_capacity use_rmsnorm num_nextn_predict_layers".split()
    ),
    ahead=lambda config: ("model.mtp_*",) if getattr(config, "num_nextn_predict_layers", None) else (),
    tiny=ERNIE4_5.tiny
    | {
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
        "moe_layer_interval": 1,
    },
)
