"""Llama 2 to 3.x and every decoder built like it (SmolLM2, Yi, DeepSeek-LLM): the rules that the other families start from."""

from megaswift.models.family import OUTPUT_LAYER, Family, decoder_settings
from megaswift.models.rules import copy, gate_up, qkv, vocab

_HF = "model.layers.{i}."
_MEGATRON = "decoder.layers.{i}."

LLAMA = Family(
    name="llama",
    hf_types=("llama",),
    rules=(
        vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        copy(_MEGATRON + "self_attention.linear_qkv.layer_norm_weight", _HF + "input_layernorm.weight", ("hidden",)),
        qkv(
            _MEGATRON + "self_attention.linear_qkv.weight",
            (_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
        ),
        copy(_MEGATRON + "self_attention.linear_proj.weight", _HF + "self_attn.o_proj.weight", ("hidden", "q_rows"), split=1),
        copy(_MEGATRON + "mlp.linear_fc1.layer_norm_weight", _HF + "post_attention_layernorm.weight", ("hidden",)),
        gate_up(_MEGATRON + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight")),
        copy(_MEGATRON + "mlp.linear_fc2.weight", _HF + "mlp.down_proj.weight", ("hidden", "ffn"), split=1),
        copy("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
        vocab(OUTPUT_LAYER, "lm_head.weight"),
    ),
    settings=decoder_settings,
    tiny=dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=96,
        vocab_size=131,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
)
