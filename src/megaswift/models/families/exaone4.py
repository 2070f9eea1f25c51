"""EXAONE 4: norms behind attention and MLP; in models with windows the layers without one know no positions (NoPE)."""

from __future__ import annotations

from typing import Any

from megaswift.models.families.olmo2 import RULES_BEHIND
from megaswift.models.family import Family, decoder_settings, typed_window
from megaswift.models.kinds import MAIN, Kind
from megaswift.models.rules import in_layer


def _kind(config: Any, layer: int) -> Kind:
    window = typed_window(config, layer)
    rotates = config.sliding_window is None or window is not None
    return Kind(norms="behind", qk_norm=True, window=window, rotation=MAIN if rotates else None)


EXAONE4 = Family(
    name="exaone4",
    hf_types=("exaone4",),
    rules=RULES_BEHIND
    + tuple(in_layer(f"self_attention.{one}_layernorm.weight", f"self_attn.{one}_norm.weight", "head_dim") for one in "qk"),
    settings=decoder_settings,
    kind=_kind,
    extra_fields=frozenset(("sliding_window_pattern",)),  # transformers has made layer_types of it
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, head_dim=16,
        sliding_window=9, sliding_window_pattern=4, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)  # fmt: skip
