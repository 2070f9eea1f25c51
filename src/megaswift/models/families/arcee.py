"""Arcee (AFM-4.5B): Llama with an MLP without a gate, of squared ReLUs."""

from __future__ import annotations

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Kind
from megaswift.models.rules import changed, in_layer

UP = "mlp.linear_fc1.weight"

ARCEE = Family(
    name="arcee",
    hf_types=("arcee",),
    rules=changed(LLAMA.rules, {UP: in_layer(UP, "mlp.up_proj.weight", "ffn", "hidden", split=0)}),
    settings=decoder_settings,
    kind=lambda config, layer: Kind(mlp="plain", activation="relu2"),
    activations=("relu2",),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, head_dim=16,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    ),
)  # fmt: skip
