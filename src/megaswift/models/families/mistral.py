"""Mistral 7B: Llama's tensors; v0.1 has a sliding window in all layers."""

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings, every_window
from megaswift.models.kinds import Kind

MISTRAL = Family(
    name="mistral",
    hf_types=("mistral",),
    rules=LLAMA.rules,
    settings=decoder_settings,
    kind=lambda config, layer: Kind(window=every_window(config)),
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=96,
        vocab_size=128,
        max_position_embeddings=256,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
)
