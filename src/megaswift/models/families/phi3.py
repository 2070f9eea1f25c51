"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's tensors, fused in the folder too; part of each head may rotate; a window in all layers."""

from __future__ import annotations

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import LONGROPE, Family, decoder_settings, every_window
from megaswift.models.kinds import Kind
from megaswift.models.rules import as_one, changed

QKV, GATE_UP = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
_OF = {name: rule for rule in LLAMA.rules for name in (QKV, GATE_UP) if rule.megatron.endswith(name)}

PHI3 = Family(
    name="phi3",
    hf_types=("phi3",),
    rules=changed(
        LLAMA.rules,
        {
            QKV: as_one(_OF[QKV], "model.layers.{i}.self_attn.qkv_proj.weight"),
            GATE_UP: as_one(_OF[GATE_UP], "model.layers.{i}.mlp.gate_up_proj.weight"),
        },
    ),
    settings=decoder_settings,
    kind=lambda config, layer: Kind(window=every_window(config)),
    partial_rotary=True,
    rope_types=("default", LONGROPE),
    left_out=frozenset(("attention_dropout", "resid_pdrop", "embd_pdrop")),
    extra_fields=frozenset(("original_max_position_embeddings",)),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1,
        sliding_window=9, original_max_position_embeddings=160,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 160,
            "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0],
        },
    ),
)  # fmt: skip
