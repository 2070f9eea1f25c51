"""Qwen3.5 as it is published (0.8B to 27B), its text: that of qwen3_5_text."""

from megaswift.models.families.qwen3_5_text import QWEN3_5_TEXT
from megaswift.models.families.qwen3_vl import LANGUAGE_MODEL, TOWER
from megaswift.models.whole import text_within

QWEN3_5 = text_within(QWEN3_5_TEXT, "qwen3_5", LANGUAGE_MODEL, tiny={"text_config": QWEN3_5_TEXT.tiny, "vision_config": TOWER})
