"""Gemma 2: zero-centred norms around attention and MLP, caps of scores and of logits, and a window in every other layer."""

from __future__ import annotations

from typing import Any

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings, typed_window
from megaswift.models.kinds import Factors, Kind
from megaswift.models.rules import changed, in_layer, norms_behind


def gemma_settings(config: Any) -> dict[str, Any]:
    """Scores are divided by the root of a number of its own, whatever the size of a head."""
    return decoder_settings(config) | {"softmax_scale": config.query_pre_attn_scalar**-0.5}


def gemma_factors(config: Any) -> Factors:
    """Embeddings are multiplied by the root of their width, as the model's precision has it."""
    return Factors(config.hidden_size**0.5, embedding_rounded=True, logit_cap=config.final_logit_softcapping)


GEMMA2 = Family(
    name="gemma2",
    hf_types=("gemma2",),
    rules=changed(
        LLAMA.rules,
        {"linear_fc1.layer_norm_weight": in_layer("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm.weight", "hidden")},
    )
    + norms_behind("post_attention_layernorm", "post_feedforward_layernorm"),
    settings=gemma_settings,
    kind=lambda config, layer: Kind(
        norm="zero_centred_rms", norms="around", activation="gelu_tanh", window=typed_window(config, layer),
        score_cap=config.attn_logit_softcapping,
    ),
    factors=gemma_factors,
    activations=("gelu_pytorch_tanh",),
    activation_field="hidden_activation",
    extra_fields=frozenset(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, head_dim=16,
        sliding_window=9, query_pre_attn_scalar=24, attn_logit_softcapping=3.0, final_logit_softcapping=5.0,
    ),
)  # fmt: skip
