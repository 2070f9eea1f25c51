"""Ministral 3: Mistral whose queries grow with their position, beyond the length that it was first trained at."""

from __future__ import annotations

from typing import Any

from megaswift.errors import UserError
from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings, every_window
from megaswift.models.kinds import QUERIES, Kind


def _kind(config: Any, layer: int) -> Kind:
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if not isinstance(config.rope_parameters.get(name), (int, float)):
            raise UserError(f"rope_parameters has no {name}, by which queries grow.", where=f"config.json: {name}")
    return Kind(window=every_window(config), query_rotation=QUERIES)


MINISTRAL3 = Family(
    name="ministral3",
    hf_types=("ministral3",),
    rules=LLAMA.rules,
    settings=decoder_settings,
    kind=_kind,
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, head_dim=16,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 8,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
        },
    ),
)  # fmt: skip
