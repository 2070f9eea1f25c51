"""Qwen3 dense. Differs from Llama by per-head norms on query and key and by an explicit head size."""

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings, typed_window
from megaswift.models.kinds import Kind
from megaswift.models.rules import copy

QWEN3 = Family(
    name="qwen3",
    hf_types=("qwen3",),
    rules=LLAMA.rules
    + (
        copy("decoder.layers.{i}.self_attention.q_layernorm.weight", "model.layers.{i}.self_attn.q_norm.weight", ("head_dim",)),
        copy("decoder.layers.{i}.self_attention.k_layernorm.weight", "model.layers.{i}.self_attn.k_norm.weight", ("head_dim",)),
    ),
    settings=decoder_settings,
    kind=lambda config, layer: Kind(qk_norm=True, window=typed_window(config, layer)),
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=96,
        vocab_size=128,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 1000000.0, "factor": 2.0},
    ),
)
