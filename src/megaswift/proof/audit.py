"""Config audit: every field of config.json that changes the computation, and what the built Megatron model does with it.

What no family knows was refused when the config was loaded (Family.audit). Here each honoured field is compared with
the model as it was built, not with the settings that it was built from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megaswift.errors import DataError
from megaswift.models import family_of
from megaswift.models.family import NEUTRAL_FIELDS, is_tied
from megaswift.models.head import labels_of
from megaswift.models.kinds import ALPHA, MAIN, QUERIES
from megaswift.models.lengths import attention_window
from megaswift.models.whole import decoder_of
from megaswift.proof.streams import windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.proof.streams import Streamed


@dataclass(frozen=True)
class Finding:
    """One field: what config.json means to transformers, what the Megatron model has, and whether they are the same."""

    field: str
    config: str
    megatron: str
    equal: bool


def audit(config: PreTrainedConfig, reference: Streamed, measured: Streamed) -> list[Finding]:
    """Compare the model that transformers builds with the one that Megatron-Core builds."""
    theirs: Any = reference.module
    ours: Any = measured.module
    first = [hasattr(one, "self_attn") for one in decoder_of(theirs).layers].index(True)  # the first layer that attends
    twin, attention, settings = decoder_of(theirs).layers[first], ours.decoder.layers[first].self_attention, ours.config
    shape = theirs.get_input_embeddings().weight.shape
    rows: list[tuple[str, Any, Any]] = [
        ("num_hidden_layers", len(decoder_of(theirs).layers), len(ours.decoder.layers)),
        ("hidden_size", shape[1], ours.embedding.word_embeddings.weight.shape[1]),
        *(_latent_sizes if hasattr(attention, "latent") else _head_sizes)(twin.self_attn, attention),
        *_mlps([_mlp(one) for one in decoder_of(theirs).layers], [one.mlp for one in ours.decoder.layers]),
        *_factors(config, theirs, ours),
        ("vocab_size", shape[0], ours.true_vocab),
        ("rms_norm_eps", _epsilons(decoder_of(theirs)), _epsilons(ours)),
        ("hidden_act", _activation(_mlp(twin)), _gated(_name(settings.activation_func), settings.gated_linear_unit)),
        *_linear_attention(decoder_of(theirs).layers, ours.decoder.layers),
        ("attention_bias (o)", twin.self_attn.o_proj.bias is not None, attention.linear_proj.bias is not None),
        (
            "q/k norm",
            _layers(
                decoder_of(theirs).layers,
                lambda one: any(hasattr(getattr(one, "self_attn", None), name) for name in ("q_norm", "query_layernorm")),
            ),
            _layers(ours.decoder.layers, lambda one: any(_has_weights(norm) for norm in _query_norms(one.self_attention))),
        ),
        (
            "norms around attention and MLP",
            sorted({sum("Norm" in type(part).__name__ for part in one.children()) for one in decoder_of(theirs).layers}),
            sorted({sum("Norm" in type(part).__name__ for part in one.children()) for one in ours.decoder.layers}),
        ),
        (
            "layers that rotate",
            _layers(decoder_of(theirs).layers, lambda one: hasattr(one, "self_attn") and _rotates(config, one.self_attn)),
            _layers(ours.decoder.layers, lambda one: _rotation(one.self_attention) is not None),
        ),
        ("attention scale", round(float(twin.self_attn.scaling), 9), _scale(ours)),
        ("tie_word_embeddings", is_tied(config), bool(ours.share_embeddings_and_output_weights)),
        *_limits(config, theirs, ours),
    ]
    if "attention_dropout" not in family_of(config.model_type).left_out:
        dropout = float(getattr(config, "attention_dropout", 0.0) or 0.0)
        rows.append(("attention_dropout", dropout, float(settings.attention_dropout)))
    found = [Finding(name, str(left), str(right), left == right) for name, left, right in rows]
    return found + [_rope(config, theirs, ours, name) for name in sorted(ours.ropes)] + _window(config)


def require_equal(findings: list[Finding], where: str) -> None:
    """Raise DataError naming every field that the Megatron model does not honour."""
    wrong = [
        f"{item.field} is {item.config} in config.json and {item.megatron} in the Megatron model"
        for item in findings
        if not item.equal
    ]
    if wrong:
        raise DataError(
            f"config audit: {'; '.join(wrong)}.", where=where, fix="nothing was made; report it with this config.json"
        )


def neutral_fields(config: PreTrainedConfig) -> list[str]:
    """Fields of the config that change nothing in the computation of a training step."""
    return sorted(name for name, value in config.to_dict().items() if name in NEUTRAL_FIELDS and value is not None)


def _epsilons(model: torch.nn.Module) -> list[float]:
    norms: list[Any] = [module for module in model.modules() if "Norm" in type(module).__name__]
    return sorted({float(getattr(norm, "variance_epsilon", 0.0) or norm.eps) for norm in norms})


def _head_sizes(twin: Any, attention: Any) -> list[tuple[str, Any, Any]]:
    """Rows on heads, and on the biases of what makes queries, keys and values."""
    return [
        ("num_attention_heads", _heads(twin)[0], attention.num_attention_heads_per_partition),
        ("num_key_value_heads", _heads(twin)[1], attention.num_query_groups_per_partition),
        ("head_dim", twin.head_dim, attention.hidden_size_per_attention_head),
        ("attention_bias (q, k, v)", _query(twin).bias is not None, attention.linear_qkv.bias is not None),
        *_gates(twin, attention.config),
    ]


def _latent_sizes(twin: Any, attention: Any) -> list[tuple[str, Any, Any]]:
    """Rows on latent attention: heads, the narrow states, the parts of a head, by the shapes of weights."""
    latent, heads, states = attention.latent, attention.num_attention_heads_per_partition, twin.q_lora_rank is not None
    query = twin.q_b_proj if states else twin.q_proj
    mine = attention.linear_q_up_proj if latent.query is not None else attention.linear_q_proj
    return [
        ("num_attention_heads", twin.num_heads, heads),
        ("q_lora_rank", query.weight.shape[1] if states else None, mine.weight.shape[1] if latent.query is not None else None),
        ("kv_lora_rank", twin.kv_b_proj.weight.shape[1], attention.linear_kv_up_proj.weight.shape[1]),
        ("qk_nope_head_dim", query.weight.shape[0] // twin.num_heads - twin.qk_rope_head_dim, latent.still),
        (
            "qk_rope_head_dim",
            twin.kv_a_proj_with_mqa.weight.shape[0] - twin.kv_b_proj.weight.shape[1],
            attention.linear_kv_down_proj.weight.shape[0] - attention.linear_kv_up_proj.weight.shape[1],
        ),
        ("v_head_dim", twin.o_proj.weight.shape[1] // twin.num_heads, attention.linear_proj.weight.shape[1] // heads),
        ("rope_interleave", bool(getattr(twin.config, "rope_interleave", True)), latent.neighbours),
        ("attention_bias (q, k, v)", twin.kv_a_proj_with_mqa.bias is not None, False),
    ]


def _rotation(attention: Any) -> str | None:
    """The tables that a layer of ours rotates by."""
    own = attention if hasattr(attention, "latent") else getattr(attention, "core_attention", None)
    name: str | None = getattr(own, "rotation", None)
    return name


def _query(attention: Any) -> Any:
    """The layer of transformers that makes queries: with keys and values in one, or apart."""
    return attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj


def _heads(attention: Any) -> tuple[int, int, bool]:
    """Heads for queries, and for keys and values, of transformers' attention, by the rows of its weights; whether queries bring gates."""
    size = attention.head_dim
    heads = attention.o_proj.weight.shape[1] // size
    if hasattr(attention, "qkv_proj"):
        return heads, (attention.qkv_proj.weight.shape[0] // size - heads) // 2, False
    queries = attention.q_proj.weight.shape[0] // size
    return heads, attention.k_proj.weight.shape[0] // size, queries == 2 * heads


def _gates(attention: Any, settings: Any) -> list[tuple[str, Any, Any]]:
    """A row on the gates of heads; none for a model without them."""
    row = ("gates of heads", _heads(attention)[2], bool(settings.attention_output_gate))
    return [row] if any(row[1:]) else []


def _query_norms(attention: Any) -> list[Any]:
    """The norms of queries before and after they rotate, where there are such."""
    if hasattr(attention, "latent"):
        return []  # the norms of its narrow states are not of queries
    core = getattr(attention, "core_attention", None)
    return [getattr(attention, "q_layernorm", None), getattr(core, "q_layernorm", None)]


def _linear_attention(theirs: Any, ours: Any) -> list[tuple[str, Any, Any]]:
    """Rows on layers with linear attention; none for a model without them."""
    has_one = [hasattr(layer, "linear_attn") for layer in theirs]
    if not any(has_one):
        return []
    first = has_one.index(True)
    twin, own = theirs[first].linear_attn, ours[first].self_attention
    sizes = (own.delta.key_heads, own.delta.heads, own.delta.key_dim, own.delta.value_dim, own.delta.width)
    named = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "conv_kernel_size")
    return [
        (
            "layers with linear attention",
            _layers(theirs, lambda one: hasattr(one, "linear_attn")),
            _layers(ours, lambda one: hasattr(one.self_attention, "delta")),
        ),
        ("linear attention: heads, sizes, convolution", tuple(getattr(twin, name) for name in named), sizes),
    ]


def _rotates(config: Any, attention: Any) -> bool:
    """Whether a layer of transformers uses positions, as its forward code decides."""
    if config.model_type == "cohere2":
        return attention.sliding_window is not None
    if config.model_type == "exaone4":
        return attention.sliding_window is None or attention.is_sliding
    return bool(getattr(attention, "use_rope", True))


def _limits(config: Any, theirs: Any, ours: Any) -> list[tuple[str, Any, Any]]:
    """Rows on windows and caps of scores and logits; none for a model without them."""
    cores = [getattr(layer.self_attention, "core_attention", None) for layer in ours.decoder.layers]
    count = len(cores)  # how many there should be has a row of its own
    # What transformers' Gemma 3 has under this name its attention does not use.
    twins = [getattr(layer, "self_attn", None) for layer in decoder_of(theirs).layers[:count]]
    scored = labels_of(config) is not None  # transformers caps no scores
    caps = [getattr(twin, "attn_logit_softcapping", None) for twin in twins]
    rows: list[tuple[str, Any, Any]] = [
        ("attn_logit_softcapping", caps, [getattr(core, "score_cap", None) for core in cores]),
        ("layers with sinks", [hasattr(twin, "sinks") for twin in twins], [_has_sinks(core) for core in cores]),
        ("final_logit_softcapping", None if scored else getattr(config, "final_logit_softcapping", None), ours.logit_cap),
    ]
    if attention_window(config) is None:
        rows.append(("sliding_window", windows_of(config, theirs)[:count], [getattr(core, "window", None) for core in cores]))
    return [row for row in rows if row[1] != row[2] or any(row[1] if isinstance(row[1], list) else [row[1]])]


def _has_sinks(core: Any) -> bool:
    return getattr(core, "softmax_offset", None) is not None


def _mlp(layer: Any) -> Any:
    """The MLP of a layer of transformers."""
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def _mlps(theirs: list[Any], ours: list[Any]) -> list[tuple[str, Any, Any]]:
    """Rows on the MLPs: which layers have experts, how many, how large, how they are chosen; sizes and biases of dense ones."""
    rows: list[tuple[str, Any, Any]] = []
    experts = [hasattr(mlp, "experts") for mlp in theirs]
    if any(experts):
        twin, mlp = theirs[experts.index(True)], ours[experts.index(True)]
        gate, router = _bare(getattr(twin, "gate", None) or twin.router), mlp.router.experts
        shared = next((getattr(twin, name) for name in _SHARED if getattr(twin, name, None) is not None), None)
        shared_gate = getattr(twin, "shared_expert_gate", None)
        rows += [
            (
                "layers with experts",
                _layers(theirs, lambda one: hasattr(one, "experts")),
                _layers(ours, lambda one: hasattr(one, "experts")),
            ),
            (
                "experts, rows of one",
                _expert_rows(_bare(twin.experts)),
                list(mlp.experts.linear_fc1.weight.shape[:2]),
            ),
            ("num_experts_per_tok", int(gate.top_k), router.chosen),
            # DeepSeek V2's, which has a topk_method, divides by no sum.
            (
                "norm_topk_prob",
                bool(getattr(gate, "norm_topk_prob", not hasattr(gate, "topk_method"))),
                router.renormalise,
            ),
            *_choices(twin, gate, mlp.router),
            (
                "shared expert",
                None if shared is None else shared.gate_proj.weight.shape[0],
                None if mlp.shared_experts is None else mlp.shared_experts.linear_fc1.weight.shape[0] // 2,
            ),
            ("gate of the shared expert", shared_gate is not None, mlp.shared_gate is not None),
            *_biases(_bare(twin.experts), gate, mlp),
        ]
    if not all(experts):
        twin, mlp = theirs[experts.index(False)], ours[experts.index(False)]
        rows += [
            ("intermediate_size", _rows(twin), mlp.linear_fc1.weight.shape[0] // (2 if _is_gated(twin) else 1)),
            ("mlp_bias", _first(twin).bias is not None, mlp.linear_fc1.bias is not None),
        ]
    return rows


def _expert_rows(experts: Any) -> list[int]:
    """Experts of transformers, and rows of the gate and up projections of each; some hold these transposed, with a bias."""
    bias = getattr(experts, "gate_up_proj_bias", None)
    return list((experts.gate_up_proj if bias is None else bias).shape[:2])


def _biases(experts: Any, gate: Any, mlp: Any) -> list[tuple[str, Any, Any]]:
    """Rows on biases of experts and of their router, and on gates that are clamped; none for experts without them."""
    how, bias = mlp.router.experts, getattr(experts, "gate_up_proj_bias", None)
    clamp = (float(experts.limit), float(experts.alpha)) if hasattr(experts, "limit") else None
    if bias is None and clamp is None and how.clamp is None and not how.biases:
        return []
    return [
        ("biases of experts", bias is not None, mlp.experts.linear_fc1.bias is not None),
        ("bias of the router", getattr(gate, "bias", None) is not None, mlp.router.bias is not None),
        ("swiglu_limit, swiglu_alpha", clamp, how.clamp),
    ]


def _first(mlp: Any) -> Any:
    """The first product of a dense MLP of transformers."""
    return next(getattr(mlp, name) for name in ("gate_proj", "gate_up_proj", "up_proj", "c_fc") if hasattr(mlp, name))


def _rows(mlp: Any) -> int:
    """Its width."""
    rows: int = _first(mlp).weight.shape[0]
    return rows // 2 if hasattr(mlp, "gate_up_proj") else rows


_SHARED = ("shared_expert", "shared_experts", "shared_mlp")  # what classes of transformers call it


def _choices(twin: Any, gate: Any, router: Any) -> list[tuple[str, Any, Any]]:
    """Rows on a choice by sigmoid, groups and bias; none for routers that know none of it."""
    how, places = router.experts, [gate, twin, getattr(gate, "moe_statics", gate)]
    bias = next((one.e_score_correction_bias for one in places if hasattr(one, "e_score_correction_bias")), None)
    groups = (
        (1, 1)
        if getattr(gate, "topk_method", "") == "greedy"
        else (getattr(gate, "num_group", 1), getattr(gate, "topk_group", 1))
    )
    rows: list[tuple[str, Any, Any]] = [
        ("routed_scaling_factor", float(getattr(gate, "routed_scaling_factor", 1.0)), float(how.factor)),
        ("n_group, topk_group", groups, (how.groups, how.kept)),
        ("e_score_correction_bias", bias is not None, router.expert_bias is not None),
    ]
    return rows if bias is not None or any(row[1] != row[2] for row in rows) else []


def _factors(config: Any, theirs: Any, ours: Any) -> list[tuple[str, Any, Any]]:
    """Rows on what is multiplied in: embeddings, results of each layer's halves, logits; none for a model without factors."""
    layers = {float(getattr(layer, "residual_multiplier", 1.0)) for layer in decoder_of(theirs).layers}
    mine = {float(getattr(layer, "residual_factor", 1.0)) for layer in ours.decoder.layers}
    embedding = float(getattr(decoder_of(theirs), "embedding_multiplier", 1.0))
    embedding *= float(getattr(theirs.get_input_embeddings(), "scalar_embed_scale", 1.0))
    logits = float(getattr(theirs, "logit_scale", 1.0)) / float(getattr(config, "logits_scaling", 1.0) or 1.0)
    logits = logits if labels_of(config) is None else 1.0
    rows: list[tuple[str, Any, Any]] = [
        ("embedding_multiplier", float(f"{embedding:.6g}"), float(f"{ours.embedding_factor:.6g}")),
        ("residual_multiplier", sorted(layers), sorted(mine)),
        ("logits_scaling", logits, ours.logits_factor),
    ]
    return [row for row in rows if row[1] not in (1.0, [1.0]) or row[1] != row[2]]


def _activation(mlp: Any) -> str:
    """An MLP's function of transformers, and whether it is gated."""
    own = _bare(getattr(mlp, "experts", mlp))
    # Experts with clamped gates have their function in their code; it has rows of its own.
    functions = [getattr(own, name) for name in ("act_fn", "activation_fn", "act") if hasattr(own, name)]
    function = functions[0] if functions else torch.nn.functional.silu
    return _gated(_name(function), _is_gated(own))


def _is_gated(mlp: Any) -> bool:
    return any(hasattr(mlp, name) for name in ("gate_proj", "gate_up_proj"))


def _gated(name: str, gated: bool) -> str:
    return name if gated else f"{name}, not gated"


def _bare(module: Any) -> Any:
    """A module of transformers, without what PEFT put around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _layers(layers: Any, has: Callable[[Any], bool]) -> str:
    """Which layers have something, in words."""
    found = [number for number, layer in enumerate(layers) if has(layer)]
    return "all" if len(found) == len(layers) else ", ".join(map(str, found)) or "none"


def _has_weights(module: torch.nn.Module | None) -> bool:
    """Where there is no norm Megatron-Core has a module without weights, in later versions none at all."""
    return module is not None and any(True for _ in module.parameters())


def _name(function: Any) -> str:
    name = (getattr(function, "__name__", "") or type(function).__name__).lower()
    return next((known for known, names in _FUNCTIONS.items() if name in names), name)


# Activation -> what classes of transformers and functions of ours are called.
_FUNCTIONS = {
    "silu": ("silu", "siluactivation", "swish"),
    "gelu_pytorch_tanh": ("gelutanh", "pytorchgelutanh", "gelu_tanh"),
    "relu2": ("relusquaredactivation", "squared_relu"),
}


def _scale(model: Any) -> float | list[float]:
    """The factor on the scores of all layers; several where they are not the same."""
    found = set()
    for layer in model.decoder.layers:
        if not hasattr(layer.self_attention, "core_attention"):
            continue
        own = getattr(layer.self_attention.core_attention, "softmax_scale", None)
        size = layer.self_attention.hidden_size_per_attention_head
        found.add(round(float(own) if own else 1 / math.sqrt(size), 9))
    return found.pop() if len(found) == 1 else sorted(found)


def _rope(config: PreTrainedConfig, theirs: Any, ours: Any, name: str) -> Finding:
    """Rotation frequencies and their scale, as both models hold them under a name."""
    table, rope = decoder_of(theirs).rotary_emb, ours.ropes[name]
    one = name in (MAIN, QUERIES, ALPHA)
    inverse, scale = (getattr(table, part if one else f"{name}_{part}") for part in ("inv_freq", "attention_scaling"))
    values = config.rope_parameters if one else config.rope_parameters[name]
    growth = (values["llama_4_scaling_beta"], values["original_max_position_embeddings"]) if name == QUERIES else None
    equal = (
        inverse.shape == rope.inverse.shape
        and bool(torch.allclose(inverse.double(), rope.inverse.double(), rtol=1e-6, atol=0))
        and math.isclose(float(scale), float(rope.scale), rel_tol=1e-6)
        and rope.growth == growth
    )
    shown = ", ".join(f"{key} {value}" for key, value in sorted((values or {}).items()))
    last = f"slowest {float(rope.inverse[-1]):.6g}, scale {float(rope.scale):.6g}" + _grows(rope.growth)
    wanted = f"slowest {float(inverse[-1]):.6g}, scale {float(scale):.6g}" + _grows(growth)
    return Finding(f"rope_parameters ({'' if name == MAIN else name + ': '}{shown})", wanted, last, equal)


def _grows(growth: tuple[float, int] | None) -> str:
    return "" if growth is None else f", queries grow by {growth[0]:g} beyond {growth[1]}"


def _window(config: PreTrainedConfig) -> list[Finding]:
    window = attention_window(config)
    if window is None:
        return []
    return [Finding("sliding_window", str(window), f"samples of at most {window} tokens", True)]
