"""Seed-OSS: Qwen2's tensors with an explicit head size. It is trained without the dropouts that its config names."""

from __future__ import annotations

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Kind
from megaswift.models.rules import qkv_bias

SEED_OSS = Family(
    name="seed_oss",
    hf_types=("seed_oss",),
    rules=LLAMA.rules + (qkv_bias(layers=lambda kind: kind.qkv_bias),),
    settings=decoder_settings,
    kind=lambda config, layer: Kind(qkv_bias=bool(config.attention_bias)),
    attention_bias=None,
    left_out=frozenset(("attention_dropout", "residual_dropout")),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, head_dim=16,
        attention_bias=True, attention_dropout=0.1, residual_dropout=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)  # fmt: skip
