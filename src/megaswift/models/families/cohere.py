"""Command R: one layer norm before attention and MLP, which stand beside each other; heads rotate by neighbours; a factor on logits."""

from __future__ import annotations

from megaswift.models.families.ernie4_5 import ERNIE4_5
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Factors, Kind
from megaswift.models.rules import changed

COHERE = Family(
    name="cohere",
    hf_types=("cohere",),
    rules=changed(ERNIE4_5.rules, {"linear_fc1.layer_norm_weight": None}),
    settings=lambda config: decoder_settings(config, "layer_norm_eps"),
    kind=lambda config, layer: Kind(norm="wide_layer", beside=True),
    factors=lambda config: Factors(logits=float(config.logit_scale)),
    extra_fields=frozenset(("layer_norm_eps", "logit_scale")),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1,
        logit_scale=0.25, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)  # fmt: skip
