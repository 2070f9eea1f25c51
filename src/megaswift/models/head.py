"""What may stand on the last layer in place of an output layer: scores of whole sequences, transformers' ForSequenceClassification.

A config says so by its architecture. Of each sequence the state of one token is scored: the last one that is not the
config's pad token, transformers' rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megaswift.models.whole import whole_of

SCORE = "score.weight"  # its name in checkpoints and in Hugging Face folders alike
ENDING = "ForSequenceClassification"
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"  # transformers' names


@dataclass(frozen=True)
class ScoreHead:
    """A head that is asked for: how many scores, and what `problem_type` in config.json says that they are."""

    labels: int
    problem: str | None = None


def labels_of(config: Any) -> int | None:
    """Scores that a model gives each sequence; None for a language model, which has an output layer."""
    names = getattr(config, "architectures", None) or ()
    return int(config.num_labels) if any(str(name).endswith(ENDING) for name in names) else None


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of this config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification

    if labels_of(config) is not None:
        return AutoModelForSequenceClassification
    return AutoModelForCausalLM if whole_of(config) is None else AutoModelForImageTextToText


def auto_config(config: Any) -> Any:
    """What that class is given: the config of the whole model, where this one is of the text model within it."""
    return config if labels_of(config) is not None else whole_of(config) or config


__all__ = ["ENDING", "MULTI", "REGRESSION", "SCORE", "SINGLE", "ScoreHead", "auto_class", "auto_config", "labels_of"]
