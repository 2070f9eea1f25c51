"""StarCoder2: layer norms, an MLP without a gate, and biases everywhere. It is trained without the dropouts that its config names."""

from __future__ import annotations

from megaswift.models.families.llama import LLAMA
from megaswift.models.family import Family, decoder_settings, every_window
from megaswift.models.kinds import Kind
from megaswift.models.rules import changed, copy, in_layer, qkv_bias


def _biased(kind: Kind) -> bool:
    return kind.bias


STARCODER2 = Family(
    name="starcoder2",
    hf_types=("starcoder2",),
    rules=changed(
        LLAMA.rules,
        {
            "mlp.linear_fc1.weight": in_layer("mlp.linear_fc1.weight", "mlp.c_fc.weight", "ffn", "hidden", split=0),
            "mlp.linear_fc2.weight": in_layer("mlp.linear_fc2.weight", "mlp.c_proj.weight", "hidden", "ffn", split=1),
        },
    )
    + (
        in_layer("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias", "hidden"),
        qkv_bias(layers=_biased),
        in_layer("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "hidden", layers=_biased),
        in_layer("mlp.linear_fc1.layer_norm_bias", "post_attention_layernorm.bias", "hidden"),
        in_layer("mlp.linear_fc1.bias", "mlp.c_fc.bias", "ffn", split=0, layers=_biased),
        in_layer("mlp.linear_fc2.bias", "mlp.c_proj.bias", "hidden", layers=_biased),
        copy("decoder.final_layernorm.bias", "model.norm.bias", ("hidden",)),
    ),
    settings=lambda config: decoder_settings(config, "norm_epsilon"),
    kind=lambda config, layer: Kind(
        mlp="plain", activation="gelu_tanh", norm="layer", bias=bool(config.use_bias), window=every_window(config)
    ),
    activations=("gelu_pytorch_tanh",),
    left_out=frozenset(("attention_dropout", "residual_dropout", "embedding_dropout")),
    extra_fields=frozenset(("norm_epsilon", "use_bias")),
    tiny=dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
        vocab_size=131, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1,
        sliding_window=9, use_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)  # fmt: skip
