"""DeepSeek V3 and R1, Moonlight, Kimi K2: latent attention; experts chosen by sigmoid and a bias, within groups, beside one for every token."""

from __future__ import annotations

from typing import Any

from megaswift.models.experts import (
    ROUTING_FIELDS,
    dense_mlp,
    grouped_sigmoid_experts,
    kind_with,
    only_value,
    shared_rules,
    usual_expert_rules,
    without_mlp,
)
from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings, layers_after
from megaswift.models.kinds import LATENT, Kind
from megaswift.models.latent import LATENT_FIELDS, latent_of, latent_rules, latent_settings

_MLP = "model.layers.{i}.mlp."

# Beside the usual ones; the last are of code that comes with published folders, and of training from the beginning.
FIELDS = LATENT_FIELDS | frozenset(
    "n_routed_experts n_shared_experts n_group topk_group topk_method first_k_dense_replace moe_layer_freq routed_scaling_factor "
    "scoring_func rope_interleave ep_size seq_aux aux_loss_alpha num_nextn_predict_layers num_mtp_layers".split()
)


def _kind(config: Any, layer: int) -> Kind:
    for field, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        only_value(config, field, value)
    latent = latent_of(config)
    if layer < config.first_k_dense_replace:
        return Kind(attention=LATENT, latent=latent)
    return kind_with(grouped_sigmoid_experts(config), attention=LATENT, latent=latent)


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    hf_types=("deepseek_v3",),
    rules=latent_rules(without_mlp(LLAMA.rules))
    + dense_mlp(LLAMA.rules)
    + usual_expert_rules(_MLP + "gate.e_score_correction_bias")
    + shared_rules(*(f"{_MLP}shared_experts.{name}_proj.weight" for name in ("gate", "up", "down"))),
    settings=lambda config: latent_settings(config, decoder_settings(config)),
    kind=_kind,
    extra_fields=ROUTING_FIELDS | FIELDS,
    ahead=layers_after,
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        intermediate_size=96,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        vocab_size=130,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        pad_token_id=None,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    ),
)
