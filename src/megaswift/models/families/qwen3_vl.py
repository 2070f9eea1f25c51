"""Qwen3-VL, its text: Qwen3, whose rotation tells three axes apart that are the same for text."""

from megaswift.models.families.qwen2_vl import TEXT
from megaswift.models.families.qwen3 import QWEN3
from megaswift.models.families.qwen3_5_text import TEXT_ONLY
from megaswift.models.kinds import Kind
from megaswift.models.whole import Whole, text_within

LANGUAGE_MODEL = Whole("model.language_model.", "lm_head.weight", ("model.visual.*",))
TOWER = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "spatial_merge_size": 2, "num_position_embeddings": 16,
}  # fmt: skip

QWEN3_VL = text_within(
    QWEN3,
    "qwen3_vl",
    LANGUAGE_MODEL,
    kind=lambda config, layer: Kind(qk_norm=True),
    neutral_rotation=TEXT_ONLY,
    tiny={
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        "vision_config": TOWER | {"deepstack_visual_indexes": [0]},
    },
)  # fmt: skip
