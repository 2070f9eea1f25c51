"""HunYuan 1 dense (0.5B to 7B): each head's query and key are normed after they rotate, with a base that grows by `alpha`."""

from __future__ import annotations

from typing import Any

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import ALPHA, MAIN, Kind
from megaswift.models.rules import in_layer


def _kind(config: Any, layer: int) -> Kind:
    rope = config.rope_parameters
    grows = rope.get("rope_type") == "dynamic" and rope.get("alpha")
    return Kind(qk_norm_rotated=True, rotation=ALPHA if grows else MAIN)


HUNYUAN_V1_DENSE = Family(
    name="hunyuan_v1_dense",
    hf_types=("hunyuan_v1_dense",),
    rules=LLAMA.rules
    + tuple(
        in_layer(f"self_attention.core_attention.{one[0]}_layernorm.weight", f"self_attn.{one}_layernorm.weight", "head_dim")
        for one in ("query", "key")
    ),
    settings=decoder_settings,
    kind=_kind,
    extra_fields=frozenset(("eod_token_id",)),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, head_dim=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0},
    ),
)  # fmt: skip
