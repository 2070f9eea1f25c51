"""OLMo 3: OLMo 2 with a window in three of four layers; yarn widens the angles of the others alone."""

from __future__ import annotations

from dataclasses import replace

from megaswift.models.families.olmo2 import OLMO2
from megaswift.models.family import typed_window
from megaswift.models.kinds import Kind

OLMO3 = replace(
    OLMO2,
    name="olmo3",
    hf_types=("olmo3",),
    kind=lambda config, layer: Kind(
        norm="wide_rms", norms="behind", qk_norm=True, qk_norm_over_heads=True, rotation=config.layer_types[layer],
        window=typed_window(config, layer),
    ),
    tiny=OLMO2.tiny | dict(
        sliding_window=9,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
)  # fmt: skip
