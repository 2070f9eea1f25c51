"""How long a sample may be: what a model holds, and what training can hold of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megaswift.models import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def attention_window(config: PreTrainedConfig) -> int | None:
    """Sliding window in tokens of the config, where some layer is said to use one that its kind does not; else None.

    Such a layer attends to everything before a token, so samples may not be longer than the window.
    """
    if any(kind.window is not None for kind in family_of(config.model_type).layers(config)):
        return None
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return int(window)


def context_length(config: Any) -> int:
    """Most tokens that a model can hold, as its config means it; the one place where that is worked out.

    max_position_embeddings, for llama3 too, whose scaling is counted in already. Where linear, dynamic or yarn RoPE widens
    it, `factor` times original_max_position_embeddings, which transformers takes for max_position_embeddings where only
    yarn's may be given; a max_position_embeddings that is larger was written after the scaling.
    """
    length = getattr(config, "max_position_embeddings", None) or 2**20
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("linear", "dynamic", "yarn") and rope.get("factor"):
        original = rope.get("original_max_position_embeddings") or length
        length = max(length, int(original * rope["factor"]))
    return int(length)


def trained_length(config: Any) -> tuple[int, str]:
    """Most tokens of a sample that training can hold, and what sets the limit.

    Less than `context_length` under a sliding window that the layers do not have, under dynamic RoPE, whose angles beyond
    max_position_embeddings are others for each length of a row, and under longrope, which has another table there.
    """
    limit, reason = context_length(config), "max_position_embeddings and its RoPE scaling"
    positions = getattr(config, "max_position_embeddings", None) or limit
    rope = getattr(config, "rope_parameters", None) or {}
    if limit == positions:
        reason = "max_position_embeddings"
    elif rope.get("rope_type") == "dynamic":
        limit, reason = positions, "dynamic RoPE, which training holds up to max_position_embeddings"
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        if original is not None and original < limit:
            limit, reason = int(original), "longrope, whose table is another one beyond original_max_position_embeddings"
    window = attention_window(config)
    return (window, "its sliding window") if window is not None and window <= limit else (limit, reason)
