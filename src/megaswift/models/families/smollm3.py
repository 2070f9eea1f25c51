"""SmolLM3: Llama's tensors, and layers that know no positions (NoPE): every fourth one, as its config lists them."""

from __future__ import annotations

from typing import Any

from megaswift.errors import UserError
from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import MAIN, Kind


def _kind(config: Any, layer: int) -> Kind:
    """no_rope_layers has a 1, against its name, for each layer that rotates."""
    rotates = config.no_rope_layers
    if len(rotates) < config.num_hidden_layers or rotates[layer] not in (0, 1):
        raise UserError(
            f"no_rope_layers = {rotates!r} is not a 0 or 1 for each of the {config.num_hidden_layers} layers.",
            where="config.json: no_rope_layers",
            fix="fetch config.json again",
        )
    return Kind(rotation=MAIN if rotates[layer] else None)


SMOLLM3 = Family(
    name="smollm3",
    hf_types=("smollm3",),
    rules=LLAMA.rules,
    settings=decoder_settings,
    kind=_kind,
    extra_fields=frozenset(("no_rope_layers", "no_rope_layer_interval")),
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=96,
        vocab_size=131,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
        no_rope_layers=[1, 0, 1, 0],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)
