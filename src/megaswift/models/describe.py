"""Families, and one model's config, in words: what layers are made of, and which fields of a config count. Made from the families."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megaswift.models import families
from megaswift.models.family import HONOURED_FIELDS, NEUTRAL_FIELDS, Family
from megaswift.models.kinds import ALPHA, MAIN, Kind
from megaswift.models.registry import MODEL_TYPES
from megaswift.models.whole import TEXT_CONFIG, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NORMS = {
    "rms": "RMS", "wide_rms": "RMS, weights in fp32", "zero_centred_rms": "RMS, weights minus one", "layer": "layer norm, with bias",
    "zero_centred_layer": "layer norm, weights minus one", "wide_layer": "layer norm without bias",
}  # fmt: skip
_ACTIVATIONS = {"silu": "SiLU", "gelu_tanh": "GELU (tanh)", "relu2": "ReLU squared"}


def table() -> list[dict[str, str]]:
    """One row a family: its name, how many models are registered by name, its layers, the layouts that it is proven at."""
    rows = []
    for name, family in sorted({family.name: family for family in families().values()}.items()):
        config = tiny_config(family)
        kinds = family.layers(config)
        models = [entry.hf_id for entry in MODEL_TYPES.values() if entry.family in family.hf_types]
        rows.append(
            {
                "model_type": name,
                "for example": models[0] if models else "",
                "attention": attention(family, config, _has_windows(family)),
                "MLP": mlp(kinds),
                "norms": norms(kinds),
                "embeddings and logits": outside(family, config),
                "carried along": carried(family, config),
                "layouts": layouts(kinds),
            }
        )
    return rows


def carried(family: Family, config: Any) -> str:
    """What folders hold beside the model that is trained, and what comes back as it was."""
    words = ["what reads pictures"] * (family.whole is not None) + ["layers that predict ahead"] * bool(family.ahead(config))
    return ", ".join(words)


def layouts(kinds: Sequence[Kind]) -> str:
    """Ways in which a model of such layers is split over processes."""
    experts = next((kind.experts for kind in kinds if kind.experts is not None), None)
    return "tp pp cp dp sp" + ("" if experts is None else " ep" if experts.biases else " ep etp")


def tiny_config(family: Family, **changes: Any) -> Any:
    """The config of a family's tiny model, with changes; of whole models that of the text, which changes but for tied tables are of."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = family.tiny | changes
    if family.whole is not None:
        outside = {name: value for name, value in changes.items() if name == "tie_word_embeddings"}
        inside = {name: value for name, value in changes.items() if name not in outside}
        values = family.tiny | outside | {TEXT_CONFIG: family.tiny[TEXT_CONFIG] | inside}
    config = CONFIG_MAPPING[family.hf_types[0]](**copy.deepcopy(values))  # it takes nested values as its own
    return config if family.whole is None else text_of(config)


def _has_windows(family: Family) -> str:
    """Which layers take a window where a config gives one."""
    more = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}
    try:
        kinds = family.layers(tiny_config(family, **more))
    except (TypeError, ValueError):
        return ""
    count = sum(kind.window is not None for kind in kinds)
    return "" if not count else "windows" if count == len(kinds) else "windows in some layers"


def attention(family: Family, config: Any, windows: str = "") -> str:
    """What is special about attention in the layers of a model.

    Args:
        windows: which layers have a window, in words.
    """
    kinds, settings = family.layers(config), family.settings(config)
    words = [windows] if windows else []
    if any(kind.delta is not None for kind in kinds):
        words.append("linear attention (gated delta net) in some layers")
    if any(kind.output_gate for kind in kinds):
        words.append("a gate for each head's result")
    kinds = [kind for kind in kinds if kind.delta is None] or kinds
    if any(kind.score_cap is not None for kind in kinds):
        words.append("scores capped")
    if any(kind.sinks for kind in kinds):
        words.append("sinks")
    if any(kind.qk_norm_over_heads for kind in kinds):
        words.append("queries and keys normed over all heads")
    elif any(kind.qk_norm or kind.qk_norm_rotated for kind in kinds):
        words.append("each head's query and key normed" + (" after the rotation" if kinds[0].qk_norm_rotated else ""))
    if any(kind.rotation is None for kind in kinds):
        words.append("some layers without positions")
    if len({kind.rotation for kind in kinds} - {None}) > 1:
        words.append("angles by layer type")
    first = kinds[0]
    if first.rotation == ALPHA:
        words.append("base grows by alpha")
    if first.query_rotation is not None:
        words.append("queries grow with their position")
    if family.partial_rotary:
        words.append("a part of each head rotates")
    if settings.get("softmax_scale") is not None:
        words.append("scores by a factor of the config")
    if first.latent is not None:
        words.append("latent" if first.latent.query is None else "latent, queries too")
    if settings["add_qkv_bias"] or any(kind.qkv_bias or kind.bias for kind in kinds):
        words.append("biases")
    return ", ".join(words) or "as Llama's"


def mlp(kinds: Sequence[Kind]) -> str:
    """What the MLPs of these layers are."""
    dense = [kind for kind in kinds if kind.experts is None]
    words = []
    if dense:
        gated = "gated " if dense[0].mlp == "gated" else ""
        words.append(f"{gated}{_ACTIVATIONS[dense[0].activation]}" + (", beside attention" if dense[0].beside else ""))
    experts = next((kind.experts for kind in kinds if kind.experts is not None), None)
    if experts is not None:
        biased = " with biases and clamped gates" if experts.biases else ""
        words.append(f"experts{biased}" + (" and one that all tokens go to" if experts.shared_ffn else ""))
    return "; ".join(words)


def norms(kinds: Sequence[Kind]) -> str:
    """Which norms there are, and where."""
    return f"{_NORMS[kinds[0].norm]}, {kinds[0].norms}"


def outside(family: Family, config: Any) -> str:
    """What happens before the first and after the last layer."""
    factors = family.factors(config)
    words = ["embeddings by a factor"] * (factors.embedding != 1.0) + ["logits by a factor"] * (factors.logits != 1.0)
    return ", ".join(words + ["logits capped"] * (factors.logit_cap is not None))


def fields(family: Family, config: PreTrainedConfig) -> list[tuple[str, str, str]]:
    """(field, value, what it is to training) of all that a config says and that counts, or that is left out."""
    rows = []
    for name, value in sorted(config.to_dict().items()):
        if name in NEUTRAL_FIELDS or value is None:
            continue
        meaning = "left out: training has no dropout" if name in family.left_out and value else ""
        if not meaning and name in HONOURED_FIELDS | family.extra_fields | {family.activation_field}:
            meaning = "honoured"
        rows.append((name, str(value), meaning or "off"))
    return rows


def layers(kinds: Sequence[Kind]) -> list[tuple[str, str]]:
    """(numbers of layers, what they have that others have not) of each kind of layer."""
    found: dict[Kind, list[int]] = {}
    for number, kind in enumerate(kinds):
        found.setdefault(kind, []).append(number)
    rows = []
    for kind, numbers in found.items():
        words = [f"a window of {kind.window} tokens" if kind.window is not None else "sees all before a token"]
        if kind.delta is not None:
            words = [f"linear attention, {kind.delta.heads} states of {kind.delta.key_dim} x {kind.delta.value_dim}"]
        elif kind.rotation is None:
            words.append("no positions")
        elif kind.rotation != MAIN:
            words.append(f"angles: {kind.rotation}")
        if kind.experts is not None:
            words.append(f"{kind.experts.count} experts, {kind.experts.chosen} of them for each token")
        rows.append((_spans(numbers), "; ".join(words)))
    return rows


def _spans(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
