"""GLM-4 (glm-4-9b-hf) and GLM-Edge: half of each head rotates, by neighbours; gate and up are one tensor in the folder."""

from __future__ import annotations

from megaswift.models.families.llama import LLAMA
from megaswift.models.families.phi3 import GATE_UP, PHI3, QKV
from megaswift.models.family import Family, decoder_settings
from megaswift.models.kinds import Kind
from megaswift.models.rules import by_halves, changed, qkv_bias

GLM = Family(
    name="glm",
    hf_types=("glm",),
    rules=changed(
        LLAMA.rules,
        {
            QKV: by_halves(next(rule for rule in LLAMA.rules if rule.megatron.endswith(QKV))),
            GATE_UP: next(rule for rule in PHI3.rules if rule.megatron.endswith(GATE_UP)),
        },
    )
    + (by_halves(qkv_bias(layers=lambda kind: kind.qkv_bias)),),
    settings=decoder_settings,
    kind=lambda config, layer: Kind(qkv_bias=bool(config.attention_bias)),
    attention_bias=None,
    partial_rotary=True,
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, head_dim=16,
        attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
)  # fmt: skip
