"""Qwen2-VL, its text: Qwen2, whose rotation tells three axes apart that are the same for text."""

from megaswift.models.families.qwen2 import QWEN2
from megaswift.models.families.qwen3_5_text import TEXT_ONLY
from megaswift.models.whole import Whole, text_within

VISUAL = Whole("model.", "lm_head.weight", ("visual.*",))
TEXT = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96,
    "vocab_size": 131, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}  # fmt: skip

QWEN2_VL = text_within(
    QWEN2,
    "qwen2_vl",
    VISUAL,
    neutral_rotation=TEXT_ONLY,
    tiny={
        "text_config": TEXT,
        "vision_config": {
            "depth": 1, "embed_dim": 16, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2,
        },
    },
)  # fmt: skip
