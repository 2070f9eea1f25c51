"""Granite 3 dense: Llama with factors on embeddings, scores, what layers add, and logits."""

from __future__ import annotations

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Factors, Kind

GRANITE = Family(
    name="granite",
    hf_types=("granite",),
    rules=LLAMA.rules,
    settings=lambda config: decoder_settings(config) | {"softmax_scale": float(config.attention_multiplier)},
    kind=lambda config, layer: Kind(residual_factor=float(config.residual_multiplier)),
    factors=lambda config: Factors(float(config.embedding_multiplier), logits=1.0 / float(config.logits_scaling)),
    extra_fields=frozenset(("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1,
        embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)  # fmt: skip
