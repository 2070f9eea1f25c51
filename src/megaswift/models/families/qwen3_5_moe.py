"""Qwen3.5 with experts as it is published (35B-A3B to 397B-A17B), its text: that of qwen3_5_moe_text."""

from megaswift.models.families.qwen3_5_moe_text import QWEN3_5_MOE_TEXT
from megaswift.models.families.qwen3_vl import LANGUAGE_MODEL, TOWER
from megaswift.models.whole import text_within

QWEN3_5_MOE = text_within(
    QWEN3_5_MOE_TEXT, "qwen3_5_moe", LANGUAGE_MODEL, tiny={"text_config": QWEN3_5_MOE_TEXT.tiny, "vision_config": TOWER}
)
