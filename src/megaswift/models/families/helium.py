"""Helium: Llama's tensors; heads rotate by neighbours, and norms multiply with their weight in fp32."""

from __future__ import annotations

from megaswift.models.families.ernie4_5 import ERNIE4_5
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Kind

HELIUM = Family(
    name="helium",
    hf_types=("helium",),
    rules=ERNIE4_5.rules,
    settings=decoder_settings,
    kind=lambda config, layer: Kind(norm="wide_rms"),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)  # fmt: skip
