"""A model family: its Hugging Face type names, its tensor rules, and what its config means to Megatron-Core.

A config field that changes the computation is honoured (it reaches the settings) or refused; none is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megaswift.errors import UserError
from megaswift.models.delta import delta_sizes
from megaswift.models.experts import expert_sizes
from megaswift.models.head import SCORE, labels_of
from megaswift.models.kinds import Factors, Kind
from megaswift.models.latent import latent_sizes
from megaswift.models.parameters import Parameter
from megaswift.models.rules import Rule, Sizes, copy, expanded, is_mixed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.whole import Whole

OUTPUT_LAYER = "output_layer.weight"

# Fields of decoder configs that say nothing about the computation of a training step.
NEUTRAL_FIELDS = frozenset(
    "transformers_version architectures output_hidden_states return_dict dtype torch_dtype chunk_size_feed_forward "
    "is_encoder_decoder id2label label2id problem_type initializer_range use_cache pad_token_id bos_token_id eos_token_id "
    "_name_or_path name_or_path output_attentions max_window_layers auto_map attn_implementation _attn_implementation "
    "unsloth_fixed unsloth_version transformers.js_config is_llama_config rope_interleaved use_mrope "
    "tokenizer_class language task_specific_params finetuning_task "
    # Bookkeeping of transformers 4 and 5: how a model was loaded, saved, spread over devices or compiled.
    "_attn_implementation_autoset _attn_implementation_internal attn_implementation_internal _attn_was_changed "
    "_experts_implementation _experts_implementation_internal experts_implementation _flash_attn_2_enabled "
    "_pre_quantization_dtype _commit_hash _auto_class _from_auto _from_pipeline _configuration_file "
    "base_model_tp_plan base_model_pp_plan base_model_ep_plan base_model_fsdp_plan distributed_config compile_config "
    "cache_implementation gradient_checkpointing torchscript use_bfloat16 tf_legacy_loss return_dict_in_generate "
    "ignore_keys_at_rope_validation keys_to_ignore_at_inference output_scores custom_pipelines "
    # Of tasks and generation: a training step has none of it.
    "num_labels classifier_dropout prefix sep_token_id decoder_start_token_id is_decoder is_composition "
    # Of other tools: what a tokenizer may do, what a model was made from.
    "max_sequence_length model_max_length tokenizer_model_max_length tokenizer_padding_side pad_token model_name".split()
)
# Fields whose meaning every family honours through `decoder_settings`, `Sizes` or the rope code.
HONOURED_FIELDS = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters rope_scaling rope_theta "
    "attention_bias attention_dropout mlp_bias sliding_window use_sliding_window layer_types pretraining_tp "
    "partial_rotary_factor is_causal".split()
)
LAYER_TYPES = ("full_attention", "sliding_attention")
LINEAR_TYPES = ("full_attention", "linear_attention")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
LONGROPE, LONGROPE_LISTS = "longrope", ("short_factor", "long_factor")  # one factor a frequency


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: short name, for messages.
        hf_types: values of `model_type` in config.json.
        rules: tensor rules, output layer included (it is left out for tied models).
        settings: Hugging Face config -> settings of Megatron-Core's TransformerConfig.
        tiny: config values of a tiny model of this family, on which the parity tests run.
        kind: config and number of a layer, from 0 -> what that layer is made of.
        rotates_in_fp32: whether query and key rotate in fp32 whatever the model's precision.
        attention_bias: what `attention_bias` in the config may say (None: any value is honoured by `settings` or `kind`).
        activations: what the config may say of the activation, all of which mean what `kind` computes.
        activation_field: where it says that.
        rope_types: which types of rotation its tables may be of.
        partial_rotary: whether `partial_rotary_factor` is honoured: transformers' model asks for it.
        layer_types: what `layer_types` in the config may name.
        neutral_rotation: entries of rope_parameters that say nothing about text.
        left_out: fields of dropouts that training leaves out, whatever they say.
        extra_fields: config fields that only this family honours, in `settings`, `kind` or `factors`.
        factors: config -> what embeddings and logits are multiplied by.
        ahead: config -> patterns of tensors of layers that predict further ahead, which folders may hold (`models/prediction.py`).
        whole: the model that reads pictures, too, which the trained text model is a part of (`models/whole.py`).
        stacked_experts: whether folders may hold all experts of a layer as one tensor, too (`weights/hf/stacked_experts.py`).
    """

    name: str
    hf_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    settings: Callable[[Any], dict[str, Any]]
    tiny: dict[str, Any]
    kind: Callable[[Any, int], Kind] = lambda config, layer: Kind()
    rotates_in_fp32: bool = False
    attention_bias: bool | None = False
    activations: tuple[str, ...] = ("silu", "swish")
    activation_field: str = "hidden_act"
    rope_types: tuple[str, ...] = ROPE_TYPES
    partial_rotary: bool = False
    layer_types: tuple[str, ...] = LAYER_TYPES
    neutral_rotation: frozenset[str] = field(default_factory=frozenset)
    left_out: frozenset[str] = field(default_factory=frozenset)
    extra_fields: frozenset[str] = field(default_factory=frozenset)
    factors: Callable[[Any], Factors] = lambda config: Factors()
    ahead: Callable[[Any], tuple[str, ...]] = lambda config: ()
    whole: Whole | None = None
    stacked_experts: bool = False

    def carried(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """Patterns of tensors that folders hold beside the model that is trained, and that are carried along as they are."""
        return (self.whole.carried if self.whole is not None else ()) + self.ahead(config)

    def rules_for(self, tied: bool) -> tuple[Rule, ...]:
        """The rules of a model with tied or separate output weights."""
        return tuple(rule for rule in self.rules if not (tied and rule.megatron == OUTPUT_LAYER))

    def layers(self, config: PreTrainedConfig) -> list[Kind]:
        """What the layers of a model of this family are made of, from the first to the last."""
        return [self.kind(config, layer) for layer in range(config.num_hidden_layers)]

    def is_mixed(self, config: PreTrainedConfig) -> bool:
        """Whether layers of this model differ in the tensors that they have."""
        return is_mixed(self.rules, self.layers(config))

    def loading(self, config: PreTrainedConfig) -> dict[str, Any]:
        """With what transformers must load such a model to compute what its config says: its SDPA attention drops caps of scores and sinks."""
        capped = any(kind.score_cap is not None or kind.sinks for kind in self.layers(config))
        return {"attn_implementation": "eager"} if capped else {}

    def parameters(self, config: PreTrainedConfig) -> list[Parameter]:
        """All tensors of a model of this family, in the order of the computation."""
        kinds = self.layers(config)
        sizes = sizes_of(config)
        more = delta_sizes(kinds) | expert_sizes(kinds) | latent_sizes(kinds, sizes.heads)
        labels = labels_of(config)
        if labels is not None:
            rules = (*self.rules_for(tied=True), copy(SCORE, SCORE, ("labels", "hidden")))
            return expanded(rules, replace(sizes, more=more | {"labels": labels}), kinds)
        return expanded(self.rules_for(is_tied(config)), replace(sizes, more=more), kinds)

    def audit(self, config: PreTrainedConfig, where: str = "config.json") -> None:
        """Raise UserError for a config field that this family neither honours nor knows as neutral."""
        values = config.to_dict()
        unknown = [
            name
            for name, value in values.items()
            if name not in NEUTRAL_FIELDS | HONOURED_FIELDS | self.extra_fields | self.left_out | {self.activation_field}
            and not _says_nothing(value)
        ]
        if unknown:
            raise UserError(
                f"config fields that the {self.name} family does not know and that may change the computation: {', '.join(sorted(unknown))}.",
                where=where,
                fix="remove them from config.json if they mean nothing to the model",
            )
        _require(values, self.activation_field, self.activations, where)
        if "attention_dropout" not in self.left_out:
            _require(values, "attention_dropout", (0, 0.0, None), where)
        _require(values, "mlp_bias", (False, None), where)
        _require(values, "pretraining_tp", (1, None), where)
        if not self.partial_rotary:
            _require(values, "partial_rotary_factor", (1, 1.0, None), where)
        _require(values, "is_causal", (True, None), where)
        kinds = {str(kind) for kind in values.get("layer_types") or ()}
        if not kinds <= set(self.layer_types):
            raise UserError(
                f"layer_types names {', '.join(sorted(kinds - set(self.layer_types)))}, which is not supported (only {', '.join(self.layer_types)}).",
                where=f"{where}: layer_types",
                fix="train this model elsewhere; nothing was converted",
            )
        if self.attention_bias is not None:
            _require(values, "attention_bias", (self.attention_bias, None), where)
        window = values.get("sliding_window")
        if window is not None and (type(window) is not int or window < 0):
            raise UserError(
                f"sliding_window = {window!r} is not a number of tokens.", where=where, fix="fetch config.json again"
            )
        for place, rope in _rotations(values.get("rope_parameters") or {}):
            self._audit_rotation(rope, where, place)
        self.layers(config)

    def _audit_rotation(self, rope: dict[str, Any], where: str, place: str) -> None:
        """The same for one entry of rope_parameters, whose name is `place`."""
        kind = rope.get("rope_type", "default")
        if kind not in self.rope_types:
            known = ", ".join(self.rope_types)
            raise UserError(f"RoPE type {kind!r} is not supported.", where=f"{where}: {place}", fix=f"known types: {known}")
        if not self.partial_rotary:
            _require(rope, "partial_rotary_factor", (1, 1.0, None), f"{where}: {place}")
        numbers = {name: value for name, value in rope.items() if name not in {"rope_type", "type"} | self.neutral_rotation}
        if kind == LONGROPE:
            numbers |= {f"{name}[{n}]": one for name in LONGROPE_LISTS for n, one in enumerate(numbers.pop(name, None) or [])}
        for name, value in numbers.items():
            if value is not None and not isinstance(value, (int, float)):
                raise UserError(f"{place}: {name} = {value!r} is not a number.", where=where, fix="fetch config.json again")


def _rotations(rope: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The entries of rope_parameters by name: one, or one a layer type."""
    if rope and set(rope) <= set(LAYER_TYPES):
        return [(f"rope_parameters: {name}", entry) for name, entry in rope.items() if entry is not None]
    return [("rope_parameters", rope)]


def _says_nothing(value: Any) -> bool:
    """Whether a field is there, but off: null, false, an empty list or object."""
    return value is None or value is False or value == [] or value == {}


def _require(values: dict[str, Any], name: str, allowed: tuple[Any, ...], where: str) -> None:
    if values.get(name) not in allowed:
        raise UserError(
            f"{name} = {values.get(name)!r} is not supported (only {allowed[0]!r}).",
            where=f"{where}: {name}",
            fix="train this model elsewhere; nothing was converted",
        )


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """Sizes of a decoder from its Hugging Face config."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        ffn=getattr(config, "intermediate_size", None)
        or config.moe_intermediate_size,  # of those whose layers all have experts
        vocab=config.vocab_size,
        rotary=int(head_dim * float((getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor") or 1.0)),
    )


def typed_window(config: Any, layer: int) -> int | None:
    """The window of a layer that `layer_types` says to have one."""
    return every_window(config) if config.layer_types[layer] == "sliding_attention" else None


def every_window(config: Any) -> int | None:
    """The window that all layers have, whatever `layer_types` says; None where the config gives none.

    Raises UserError for a window in which a token would not see itself.
    """
    window = config.sliding_window
    if window is not None and window < 1:
        raise UserError(f"sliding_window = {window!r} leaves no token to see.", where="config.json: sliding_window")
    return window


def decoder_settings(config: PreTrainedConfig, epsilon: str = "rms_norm_eps") -> dict[str, Any]:
    """Settings that all decoders share; what their layers are made of is said by their kinds.

    Args:
        epsilon: the config's name for what norms add to a variance.
    """
    sizes = sizes_of(config)
    return {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_query_groups": sizes.kv_heads,
        "kv_channels": sizes.head_dim,
        "ffn_hidden_size": sizes.ffn,
        "layernorm_epsilon": getattr(config, epsilon),
        "normalization": "RMSNorm",
        "add_qkv_bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def layers_after(config: PreTrainedConfig) -> tuple[str, ...]:
    """`Family.ahead` of families that number these layers on from the model's own."""
    first = config.num_hidden_layers
    return tuple(f"model.layers.{first + number}.*" for number in range(getattr(config, "num_nextn_predict_layers", None) or 0))


def is_tied(config: PreTrainedConfig) -> bool:
    """Whether input embedding and output layer are one matrix; a model with a head of scores has no output layer."""
    return bool(getattr(config, "tie_word_embeddings", False)) and labels_of(config) is None


def padded_vocab(vocab: int, tp: int) -> int:
    """Vocabulary rows that tensor parallelism can split evenly."""
    return math.ceil(vocab / tp) * tp


__all__ = [
    "OUTPUT_LAYER",
    "Family",
    "decoder_settings",
    "every_window",
    "is_tied",
    "layers_after",
    "padded_vocab",
    "sizes_of",
    "typed_window",
]
