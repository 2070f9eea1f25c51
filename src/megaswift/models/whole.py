"""Models with a tower for pictures whose text model alone is trained: where its tensors stand in the whole, and what is carried along."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megaswift.errors import UserError
from megaswift.models.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.family import Family
    from megaswift.models.parameters import Parameter

OPTION = "--language_model_only"
TEXT_CONFIG = "text_config"  # the field in which a whole model's config has that of its text model
_PICTURE_FIELD = r"(image|video|audio|vision|boi|eoi)(_start|_end)?_token_(id|index)"
_LAYERS, _HEAD = "model.", "lm_head.weight"  # of a text model by itself
_HELD = "model.language_model."  # where transformers holds the text model, whatever the folder calls it


@dataclass(frozen=True)
class Whole:
    """A whole model, as folders hold it.

    Args:
        layers: what the names of the text model's tensors begin with, in the place of "model.".
        head: name of the output layer.
        carried: patterns of the names of all other tensors.
        defaults: fields that published configs leave out, with what their tensors say where transformers' default is another.
    """

    layers: str
    head: str
    carried: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def text_within(family: Family, name: str, whole: Whole, **changes: Any) -> Family:
    """The family of whole models whose text model is of a family.

    Args:
        name: of the new family, which is their `model_type`.
        changes: other fields of the family.
    """
    rules = _within(family.rules, whole)
    return replace(family, **{"name": name, "hf_types": (name,), "rules": rules, "whole": whole, **changes})


def _within(rules: Iterable[Rule], whole: Whole) -> tuple[Rule, ...]:
    made = []
    for rule in rules:
        stored = tuple(_renamed(name, whole.layers, whole.head) for name in rule.hf)
        held = tuple(_renamed(name, _HELD, _HEAD) for name in rule.hf)
        loaded = None if rule.loaded is None else _renamed(rule.loaded, _HELD, _HEAD)
        made.append(replace(rule, hf=stored, held=() if held == stored else held, loaded=loaded))
    return tuple(made)


def _renamed(name: str, layers: str, head: str) -> str:
    return head if name == _HEAD else layers + name.removeprefix(_LAYERS)


def text_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text model's config out of a whole model's: it goes by the whole's `model_type`, and knows it (`whole_of`).

    Whether output layer and embedding are one table the whole model's config says. The config of a text model is returned as it is.
    """
    if not hasattr(config, TEXT_CONFIG):
        return config
    text: Any = config.get_text_config()
    kind = type(text)
    made: Any = object.__new__(type(kind.__name__, (kind,), {"model_type": config.model_type, "whole": config}))
    made.__dict__.update(text.__dict__)
    made.model_type = config.model_type
    made.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    return made


def is_within(parameters: Sequence[Parameter]) -> bool:
    """Whether a model's parameters are those of a text model within a whole one, whose towers have modules of the same names."""
    return any(part.in_model.startswith(_HELD) for parameter in parameters for part in parameter.hf)


def whole_of(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The config of the whole model that a text model's config belongs to; None for a model that is text alone."""
    return getattr(type(config), "whole", None)


def picture_ids(config: PreTrainedConfig) -> tuple[int, ...]:
    """Ids of the tokens that stand for pictures, videos and sounds, or around them, by a whole model's config; () for others."""
    whole = whole_of(config)
    if whole is None:
        return ()
    found = (getattr(whole, name, None) for name in sorted(vars(whole)) if re.fullmatch(_PICTURE_FIELD, name))
    return tuple(dict.fromkeys(number for number in found if isinstance(number, int)))


def decoder_of(model: Any) -> Any:
    """The part of transformers' model for causal text, or for pictures and text, that embeds tokens and has the layers."""
    return getattr(model.model, "language_model", model.model)


def require_language_model_only(config: PreTrainedConfig, asked: bool, where: str) -> None:
    """Raise UserError where the text of a whole model would be trained and nobody said so, or there is nothing else."""
    whole = whole_of(config)
    if whole is not None and not asked:
        raise UserError(
            f"{config.model_type} reads pictures, too, and only its text model can be trained.",
            where=where,
            fix=f"add {OPTION} true: the text model is trained, all other tensors are carried along as they are, and what is "
            "exported is the whole model",
        )
    if whole is None and asked:
        raise UserError(
            f"{config.model_type} is a language model and nothing else.", where=f"{OPTION}, {where}", fix=f"leave {OPTION} out"
        )


__all__ = [
    "OPTION", "TEXT_CONFIG", "Whole", "decoder_of", "is_within", "picture_ids", "require_language_model_only", "text_of", "text_within",
    "whole_of",
]  # fmt: skip
