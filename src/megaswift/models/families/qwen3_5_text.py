"""Qwen3.5 dense, text (0.8B to 27B): three of four layers are gated delta nets, the others attention with a gate; norms are stored minus one."""

from __future__ import annotations

from megaswift.models.delta import (
    DELTA_FIELDS,
    PUBLISHED_FIELDS,
    delta_rules,
    gated_attention_rules,
    kind_of,
    projections_apart,
)
from megaswift.models.families.llama import LLAMA
from megaswift.models.family import LINEAR_TYPES, Family, decoder_settings

# The text model's attention, and whatever follows it, is what all of these have.
OUTSIDE_ATTENTION = tuple(
    rule for rule in LLAMA.rules if not rule.megatron.endswith(("linear_qkv.weight", "self_attention.linear_proj.weight"))
)
# The positions of text are the same on the three axes that these tell apart.
TEXT_ONLY = frozenset(("mrope_section", "mrope_interleaved"))

QWEN3_5_TEXT = Family(
    name="qwen3_5_text",
    hf_types=("qwen3_5_text",),
    rules=OUTSIDE_ATTENTION + gated_attention_rules() + delta_rules(*projections_apart()),
    settings=decoder_settings,
    kind=kind_of,
    partial_rotary=True,
    layer_types=LINEAR_TYPES,
    neutral_rotation=TEXT_ONLY,
    ahead=lambda config: ("mtp.*",),
    extra_fields=DELTA_FIELDS | PUBLISHED_FIELDS,
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=96,
        vocab_size=131,
        max_position_embeddings=256,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=12,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    ),
)
