"""Gemma 3, text: Gemma 2 with norms on query and key in place of the caps, and angles of its own in layers with a window."""

from __future__ import annotations

from megaswift.models.families.gemma2 import GEMMA2, gemma_factors, gemma_settings
from megaswift.models.family import Family, typed_window
from megaswift.models.kinds import Kind
from megaswift.models.rules import in_layer

# How often a layer without a window comes; transformers has made layer_types of it.
_PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")

GEMMA3_TEXT = Family(
    name="gemma3_text",
    hf_types=("gemma3_text",),
    rules=GEMMA2.rules
    + tuple(in_layer(f"self_attention.{one}_layernorm.weight", f"self_attn.{one}_norm.weight", "head_dim") for one in "qk"),
    settings=gemma_settings,
    kind=lambda config, layer: Kind(
        norm="zero_centred_rms", norms="around", activation="gelu_tanh", qk_norm=True, rotation=config.layer_types[layer],
        window=typed_window(config, layer),
    ),
    factors=gemma_factors,
    activations=GEMMA2.activations,
    activation_field=GEMMA2.activation_field,
    extra_fields=frozenset(("query_pre_attn_scalar", "final_logit_softcapping", *_PATTERN)),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, head_dim=16,
        sliding_window=9, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0},
        },
    ),
)  # fmt: skip
