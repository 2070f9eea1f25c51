"""Mistral Small 3.1 and Ministral 3, their text: mistral, or ministral3, as the config says."""

from __future__ import annotations

from typing import Any

from megaswift.errors import UserError
from megaswift.models.families.gemma3 import TOWERS
from megaswift.models.families.ministral3 import MINISTRAL3
from megaswift.models.families.mistral import MISTRAL
from megaswift.models.kinds import Kind
from megaswift.models.whole import Whole, text_within, whole_of

_TEXTS = {family.name: family for family in (MISTRAL, MINISTRAL3)}


def _kind(config: Any, layer: int) -> Kind:
    whole: Any = whole_of(config)
    name = whole.text_config.model_type
    if name not in _TEXTS:
        raise UserError(
            f"a text model of type {name!r} is not known here (only {', '.join(_TEXTS)}).",
            where="config.json: text_config: model_type",
        )
    return _TEXTS[name].kind(config, layer)


MISTRAL3 = text_within(
    MINISTRAL3,
    "mistral3",
    Whole("language_model.model.", "language_model.lm_head.weight", TOWERS, {"tie_word_embeddings": False}),
    kind=_kind,
    tiny={
        "text_config": MINISTRAL3.tiny | {"model_type": "ministral3"},
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "head_dim": 8, "image_size": 16, "patch_size": 4,
        },
        "tie_word_embeddings": False,
    },
)  # fmt: skip
