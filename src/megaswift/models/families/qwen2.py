"""Qwen1.5, Qwen2 and Qwen2.5 dense. Differs from Llama by a bias on query, key and value."""

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings, typed_window
from megaswift.models.kinds import Kind
from megaswift.models.rules import qkv

_ATTENTION = "model.layers.{i}.self_attn."

QWEN2 = Family(
    name="qwen2",
    hf_types=("qwen2",),
    rules=LLAMA.rules
    + (
        qkv(
            "decoder.layers.{i}.self_attention.linear_qkv.bias",
            (_ATTENTION + "q_proj.bias", _ATTENTION + "k_proj.bias", _ATTENTION + "v_proj.bias"),
            bias=True,
        ),
    ),
    settings=lambda config: decoder_settings(config) | {"add_qkv_bias": True},
    kind=lambda config, layer: Kind(window=typed_window(config, layer)),
    attention_bias=None,
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=96,
        vocab_size=130,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    ),
)
