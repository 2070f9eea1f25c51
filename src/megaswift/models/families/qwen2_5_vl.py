"""Qwen2.5-VL, its text: Qwen2-VL's, beside another tower."""

from megaswift.models.families.qwen2 import QWEN2
from megaswift.models.families.qwen2_vl import TEXT, VISUAL
from megaswift.models.families.qwen3_5_text import TEXT_ONLY
from megaswift.models.whole import text_within

QWEN2_5_VL = text_within(
    QWEN2,
    "qwen2_5_vl",
    VISUAL,
    neutral_rotation=TEXT_ONLY,
    tiny={
        "text_config": TEXT,
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
            "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0],
        },
    },
)  # fmt: skip
