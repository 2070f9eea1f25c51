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
from megaswift.models.family import NEUTRAL_FIELDS, is_tied
from megaswift.models.kinds import MAIN

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
    layer, twin = ours.decoder.layers[0], theirs.model.layers[0]
    attention, settings = layer.self_attention, ours.config
    shape = theirs.get_input_embeddings().weight.shape
    rows: list[tuple[str, Any, Any]] = [
        ("num_hidden_layers", len(theirs.model.layers), len(ours.decoder.layers)),
        ("hidden_size", shape[1], ours.embedding.word_embeddings.weight.shape[1]),
        (
            "num_attention_heads",
            twin.self_attn.q_proj.weight.shape[0] // twin.self_attn.head_dim,
            attention.num_attention_heads_per_partition,
        ),
        (
            "num_key_value_heads",
            twin.self_attn.k_proj.weight.shape[0] // twin.self_attn.head_dim,
            attention.num_query_groups_per_partition,
        ),
        ("head_dim", twin.self_attn.head_dim, attention.hidden_size_per_attention_head),
        *_mlps([_mlp(one) for one in theirs.model.layers], [one.mlp for one in ours.decoder.layers]),
        *_factors(config, theirs, ours),
        ("vocab_size", shape[0], ours.true_vocab),
        ("rms_norm_eps", _epsilons(theirs, "variance_epsilon"), _epsilons(ours, "eps")),
        ("hidden_act", _activation(_mlp(twin)), _name(settings.activation_func) if settings.gated_linear_unit else "not gated"),
        ("attention_bias (q, k, v)", twin.self_attn.q_proj.bias is not None, attention.linear_qkv.bias is not None),
        ("attention_bias (o)", twin.self_attn.o_proj.bias is not None, attention.linear_proj.bias is not None),
        (
            "q/k norm",
            _layers(theirs.model.layers, lambda one: hasattr(one.self_attn, "q_norm")),
            _layers(ours.decoder.layers, lambda one: _has_weights(one.self_attention.q_layernorm)),
        ),
        (
            "layers that rotate",
            _layers(theirs.model.layers, lambda one: bool(getattr(one.self_attn, "use_rope", True))),
            _layers(ours.decoder.layers, lambda one: one.self_attention.core_attention.rotation is not None),
        ),
        ("attention scale", round(float(twin.self_attn.scaling), 9), _scale(ours)),
        ("tie_word_embeddings", is_tied(config), bool(ours.share_embeddings_and_output_weights)),
        ("attention_dropout", float(getattr(config, "attention_dropout", 0.0) or 0.0), float(settings.attention_dropout)),
    ]
    found = [Finding(name, str(left), str(right), left == right) for name, left, right in rows]
    return found + [_rope(config, theirs, ours)] + _window(config)


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


def _epsilons(model: torch.nn.Module, attribute: str) -> list[float]:
    return sorted(
        {
            float(getattr(module, attribute))
            for module in model.modules()
            if "Norm" in type(module).__name__ and hasattr(module, attribute)
        }
    )


def _mlp(layer: Any) -> Any:
    """The MLP of a layer of transformers."""
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def _mlps(theirs: list[Any], ours: list[Any]) -> list[tuple[str, Any, Any]]:
    """Rows on the MLPs: which layers have experts, how many, how large, how they are chosen; sizes and biases of dense ones."""
    rows: list[tuple[str, Any, Any]] = []
    experts = [hasattr(mlp, "experts") for mlp in theirs]
    if any(experts):
        twin, mlp = theirs[experts.index(True)], ours[experts.index(True)]
        gate, router = getattr(twin, "gate", None) or twin.router, mlp.router.experts
        shared = getattr(twin, "shared_expert", None) or getattr(twin, "shared_experts", None)
        shared_gate = getattr(twin, "shared_expert_gate", None)
        rows += [
            (
                "layers with experts",
                _layers(theirs, lambda one: hasattr(one, "experts")),
                _layers(ours, lambda one: hasattr(one, "experts")),
            ),
            ("experts, rows of one", list(twin.experts.gate_up_proj.shape[:2]), list(mlp.experts.linear_fc1.weight.shape[:2])),
            ("num_experts_per_tok", int(gate.top_k), router.chosen),
            ("norm_topk_prob", bool(getattr(gate, "norm_topk_prob", True)), router.renormalise),
            *_choices(gate, mlp.router),
            (
                "shared expert",
                None if shared is None else shared.gate_proj.weight.shape[0],
                None if mlp.shared_experts is None else mlp.shared_experts.linear_fc1.weight.shape[0] // 2,
            ),
            ("gate of the shared expert", shared_gate is not None, mlp.shared_gate is not None),
        ]
    if not all(experts):
        twin, mlp = theirs[experts.index(False)], ours[experts.index(False)]
        rows += [
            ("intermediate_size", twin.gate_proj.weight.shape[0], mlp.linear_fc1.weight.shape[0] // 2),
            ("mlp_bias", twin.gate_proj.bias is not None, mlp.linear_fc1.bias is not None),
        ]
    return rows


def _choices(gate: Any, router: Any) -> list[tuple[str, Any, Any]]:
    """Rows on a choice by sigmoid, groups and bias; none for routers that know none of it."""
    how, bias = router.experts, getattr(gate, "e_score_correction_bias", None)
    rows: list[tuple[str, Any, Any]] = [
        ("routed_scaling_factor", float(getattr(gate, "routed_scaling_factor", 1.0)), float(how.factor)),
        ("n_group, topk_group", (getattr(gate, "num_group", 1), getattr(gate, "topk_group", 1)), (how.groups, how.kept)),
        ("e_score_correction_bias", bias is not None, router.expert_bias is not None),
    ]
    return rows if bias is not None or any(row[1] != row[2] for row in rows) else []


def _factors(config: Any, theirs: Any, ours: Any) -> list[tuple[str, Any, Any]]:
    """Rows on what is multiplied in: embeddings, results of each layer's halves, logits; none for a model without factors."""
    layers = {float(getattr(layer, "residual_multiplier", 1.0)) for layer in theirs.model.layers}
    mine = {float(getattr(layer, "residual_factor", 1.0)) for layer in ours.decoder.layers}
    rows: list[tuple[str, Any, Any]] = [
        ("embedding_multiplier", float(getattr(theirs.model, "embedding_multiplier", 1.0)), ours.embedding_factor),
        ("residual_multiplier", sorted(layers), sorted(mine)),
        ("logits_scaling", 1 / float(getattr(config, "logits_scaling", 1.0) or 1.0), ours.logits_factor),
    ]
    return [row for row in rows if row[1] not in (1.0, [1.0]) or row[1] != row[2]]


def _activation(mlp: Any) -> str:
    return _name(getattr(mlp, "experts", mlp).act_fn)


def _layers(layers: Any, has: Callable[[Any], bool]) -> str:
    """Which layers have something, in words."""
    found = [number for number, layer in enumerate(layers) if has(layer)]
    return "all" if len(found) == len(layers) else ", ".join(map(str, found)) or "none"


def _has_weights(module: torch.nn.Module | None) -> bool:
    """Where there is no norm Megatron-Core has a module without weights, in later versions none at all."""
    return module is not None and any(True for _ in module.parameters())


def _name(function: Any) -> str:
    name = (getattr(function, "__name__", "") or type(function).__name__).lower()
    return "silu" if name in ("silu", "siluactivation", "swish") else name


def _scale(model: Any) -> float | list[float]:
    """The factor on the scores of all layers; several where they are not the same."""
    found = set()
    for layer in model.decoder.layers:
        own = getattr(layer.self_attention.core_attention, "softmax_scale", None)
        size = layer.self_attention.hidden_size_per_attention_head
        found.add(round(float(own) if own else 1 / math.sqrt(size), 9))
    return found.pop() if len(found) == 1 else sorted(found)


def _rope(config: PreTrainedConfig, theirs: Any, ours: Any) -> Finding:
    """Rotation frequencies and their scale, as both models hold them."""
    table, rope = theirs.model.rotary_emb, ours.ropes[MAIN]
    equal = (
        table.inv_freq.shape == rope.inverse.shape
        and bool(torch.allclose(table.inv_freq.double(), rope.inverse.double(), rtol=1e-6, atol=0))
        and math.isclose(float(table.attention_scaling), float(rope.scale), rel_tol=1e-6)
    )
    shown = ", ".join(f"{name} {value}" for name, value in sorted((config.rope_parameters or {}).items()))
    last = f"slowest {float(rope.inverse[-1]):.6g}, scale {float(rope.scale):.6g}"
    wanted = f"slowest {float(table.inv_freq[-1]):.6g}, scale {float(table.attention_scaling):.6g}"
    return Finding(f"rope_parameters ({shown})", wanted, last, equal)


def _window(config: PreTrainedConfig) -> list[Finding]:
    window = attention_window(config)
    if window is None:
        return []
    return [Finding("sliding_window", str(window), f"samples of at most {window} tokens", True)]
