"""HunYuan with experts (A13B): the dense model's attention; in every layer experts chosen by softmax, beside one for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megaswift.errors import UserError
from megaswift.models.experts import ROUTING_FIELDS, expert_rules, kind_with, only_value, shared_rules, without_mlp
from megaswift.models.families.hunyuan_v1_dense import HUNYUAN_V1_DENSE
from megaswift.models.kinds import Experts, Kind

_LAYER = "model.layers.{i}."
_MLP = _LAYER + "mlp."

# Fields that published folders have and transformers does not ask for, and what it computes.
_MEANT = {
    "use_mixed_mlp_moe": True, "use_cla": False, "use_mla": False, "use_qk_norm": True, "use_rotary_pos_emb": True, "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "group_limited_greedy": False, "moe_layer_num_skipped": 0, "norm_type": "rms", "moe_drop_tokens": False,
}  # fmt: skip
# Sizes of what is off by these, or of images, which the text model has not.
_UNUSED = (
    "moe_random_routing_dropped_token cla_share_factor kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "n_group topk_group attention_head_dim org_vocab_size pad_id eod_token_id im_start_id im_end_id im_newline_id mask_init_id "
    "text_start_id text_end_id dense_list class_num pool_type add_classification_head num_media_embeds position_embedding_xdrope"
)


def _same(config: Any, field: str, value: Any) -> Any:
    """What a field says for each layer, which must be the same in all. Raises UserError else."""
    found = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(found) != 1:
        raise UserError(
            f"{field} = {value} differs between layers, which is not supported.",
            where=f"config.json: {field}",
            fix="train this model elsewhere; nothing was converted",
        )
    return found.pop()


def _kind(config: Any, layer: int) -> Kind:
    for field, value in _MEANT.items():
        only_value(config, field, value)
    for field, value in (("num_shared_expert", 1), ("moe_intermediate_size", config.intermediate_size)):
        told = getattr(config, field, None)
        if told is not None and _same(config, field, told) != value:
            raise UserError(
                f"{field} = {told} is not supported (only {value}, which is what transformers computes).",
                where=f"config.json: {field}",
                fix="train this model elsewhere; nothing was converted",
            )
    experts = Experts(
        _same(config, "num_experts", config.num_experts),
        _same(config, "moe_topk", config.moe_topk),
        config.intermediate_size,
        shared_ffn=config.intermediate_size,
    )
    dense = HUNYUAN_V1_DENSE.kind(config, layer)
    return kind_with(experts, qk_norm_rotated=dense.qk_norm_rotated, rotation=dense.rotation)


HUNYUAN_V1_MOE = replace(
    HUNYUAN_V1_DENSE,
    name="hunyuan_v1_moe",
    hf_types=("hunyuan_v1_moe",),
    rules=without_mlp(HUNYUAN_V1_DENSE.rules)
    + expert_rules(
        _MLP + "gate.wg.weight",
        *(f"{_MLP}experts.{{e}}.{name}_proj.weight" for name in ("gate", "up", "down")),
        norm=_LAYER + "post_attention_layernorm.weight",
        loaded=_MLP + "experts.",
    )
    + shared_rules(*(f"{_MLP}shared_mlp.{name}_proj.weight" for name in ("gate", "up", "down"))),
    kind=_kind,
    extra_fields=ROUTING_FIELDS | _MEANT.keys() | {"moe_topk", "num_shared_expert"} | set(_UNUSED.split()),
    tiny=HUNYUAN_V1_DENSE.tiny | {"intermediate_size": 48, "num_experts": 4, "moe_topk": 2},
)
