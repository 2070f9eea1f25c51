"""gpt-oss (20b, 120b): windows in every second layer, sinks in all, biases everywhere, experts whose gates are clamped and whose rows alternate."""

from __future__ import annotations

from typing import Any

from megaswift.models.experts import ROUTING_FIELDS, kind_with, without_mlp
from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings, typed_window
from megaswift.models.kinds import Experts, Kind
from megaswift.models.parameters import alternating, whole
from megaswift.models.rules import Rule, copy, in_layer, qkv_bias

_MLP = "decoder.layers.{i}.mlp."
_EXPERT = _MLP + "experts.local_experts.{e}."
_LAYER = "model.layers.{i}."
_HF = _LAYER + "mlp.experts."


def _kind(config: Any, layer: int) -> Kind:
    experts = Experts(
        config.num_local_experts,
        config.num_experts_per_tok,
        config.intermediate_size,
        biases=True,
        clamp=(float(config.swiglu_limit), float(config.swiglu_alpha)),
    )
    return kind_with(experts, norm="wide_rms", bias=True, qkv_bias=True, sinks=True, window=typed_window(config, layer))


def _gate_up(end: str, hf: str, *columns: str, transposed: bool = False) -> Rule:
    """Gate and up of each expert, one tensor of the folder for all of them, in which their rows alternate."""
    return Rule(
        _EXPERT + "linear_fc1." + end,
        (_HF + hf,),
        lambda sizes: [(2 * sizes["expert_ffn"], *(sizes[name] for name in columns))],
        lambda sizes: alternating(sizes["expert_ffn"]),
        stacked=True,
        transposed=transposed,
    )


def _down(end: str, hf: str, *columns: str, transposed: bool = False) -> Rule:
    return Rule(
        _EXPERT + "linear_fc2." + end,
        (_HF + hf,),
        lambda sizes: [(sizes.hidden, *(sizes[name] for name in columns))],
        lambda sizes: whole(sizes.hidden, 1 if columns else None),
        stacked=True,
        transposed=transposed,
    )


GPT_OSS = Family(
    name="gpt_oss",
    hf_types=("gpt_oss",),
    rules=without_mlp(LLAMA.rules)
    + (
        qkv_bias(),
        in_layer("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "hidden"),
        in_layer("self_attention.core_attention.softmax_offset", "self_attn.sinks", "heads", split=0),
        in_layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
        copy(_MLP + "router.weight", _LAYER + "mlp.router.weight", ("experts", "hidden")),
        copy(_MLP + "router.bias", _LAYER + "mlp.router.bias", ("experts",)),
        _gate_up("weight", "gate_up_proj", "hidden", transposed=True),
        _gate_up("bias", "gate_up_proj_bias"),
        _down("weight", "down_proj", "expert_ffn", transposed=True),
        _down("bias", "down_proj_bias"),
    ),
    settings=decoder_settings,
    kind=_kind,
    attention_bias=True,
    extra_fields=ROUTING_FIELDS | {"swiglu_alpha", "swiglu_limit"},
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=40,
        num_local_experts=8,
        num_experts_per_tok=4,
        sliding_window=9,
        swiglu_limit=1.5,
        vocab_size=131,
        max_position_embeddings=256,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    ),
)
