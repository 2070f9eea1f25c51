"""ERNIE 4.5 dense: Llama's tensors, with rotation of neighbouring rows in place of halves and an explicit head size."""

from __future__ import annotations

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings
from megaswift.models.rules import by_halves

ERNIE4_5 = Family(
    name="ernie4_5",
    hf_types=("ernie4_5",),
    rules=tuple(by_halves(rule) if ".linear_qkv.weight" in rule.megatron else rule for rule in LLAMA.rules),
    settings=decoder_settings,
    rotates_in_fp32=True,
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=96,
        vocab_size=130,
        max_position_embeddings=256,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
        use_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
)
