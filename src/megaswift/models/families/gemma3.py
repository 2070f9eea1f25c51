"""Gemma 3 from 4B on, its text: that of gemma3_text."""

from megaswift.models.families.gemma3_text import GEMMA3_TEXT
from megaswift.models.whole import Whole, text_within

TOWERS = ("vision_tower.*", "multi_modal_projector.*")

GEMMA3 = text_within(
    GEMMA3_TEXT,
    "gemma3",
    Whole("language_model.model.", "language_model.lm_head.weight", TOWERS),
    tiny={
        "text_config": GEMMA3_TEXT.tiny,
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
    },
)  # fmt: skip
