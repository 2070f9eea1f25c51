"""Nemotron (Minitron 4B to 15B, Nemotron-4): zero-centred layer norms, half of each head rotates, an MLP of squared ReLUs without a gate."""

from __future__ import annotations

from megaswift.models.families.arcee import ARCEE
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Kind
from megaswift.models.rules import copy, in_layer

NEMOTRON = Family(
    name="nemotron",
    hf_types=("nemotron",),
    rules=ARCEE.rules
    + (
        in_layer("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias", "hidden"),
        in_layer("mlp.linear_fc1.layer_norm_bias", "post_attention_layernorm.bias", "hidden"),
        copy("decoder.final_layernorm.bias", "model.norm.bias", ("hidden",)),
    ),
    settings=lambda config: decoder_settings(config, "norm_eps"),
    kind=lambda config, layer: Kind(mlp="plain", activation="relu2", norm="zero_centred_layer"),
    activations=ARCEE.activations,
    partial_rotary=True,
    extra_fields=frozenset(("norm_eps",)),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
)  # fmt: skip
