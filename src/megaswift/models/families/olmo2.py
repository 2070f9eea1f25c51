"""OLMo 2: norms behind attention and MLP and none before them; queries and keys of all heads are normed together."""

from __future__ import annotations

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Kind
from megaswift.models.rules import changed, in_layer, norms_behind

# Llama's without the norms before attention and MLP, and with norms behind them.
RULES_BEHIND = changed(
    LLAMA.rules, {"linear_qkv.layer_norm_weight": None, "linear_fc1.layer_norm_weight": None}
) + norms_behind("post_attention_layernorm", "post_feedforward_layernorm")

OLMO2 = Family(
    name="olmo2",
    hf_types=("olmo2",),
    rules=RULES_BEHIND
    + (
        in_layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "q_rows", split=0),
        in_layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "kv_rows", split=0),
    ),
    settings=decoder_settings,
    kind=lambda config, layer: Kind(norm="wide_rms", norms="behind", qk_norm=True, qk_norm_over_heads=True),
    rotates_in_fp32=True,
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)  # fmt: skip
