"""What families with experts share: the rules of router and experts, sizes, and the config fields that say how tokens are routed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from megaswift.errors import UserError
from megaswift.models.kinds import EXPERTS, Experts, Kind
from megaswift.models.rules import Rule, copy, gate_up

_MLP = "decoder.layers.{i}.mlp."
_NORM = "decoder.layers.{i}.pre_mlp_layernorm.weight"

# Fields that say how tokens are routed, and what transformers adds to a loss that it computes itself.
ROUTING_FIELDS = frozenset(
    "num_experts num_local_experts num_experts_per_tok norm_topk_prob moe_intermediate_size output_router_logits "
    "router_aux_loss_coef".split()
)


def has_experts(kind: Kind) -> bool:
    """Whether a layer's MLP is made of experts."""
    return kind.experts is not None


def is_dense(kind: Kind) -> bool:
    """Whether a layer's MLP is one that every token goes through."""
    return kind.experts is None


def expert_sizes(kinds: Sequence[Kind]) -> dict[str, int]:
    """Sizes of the experts by the names that rules use; {} without any. All layers that have experts have the same."""
    found = {kind.experts for kind in kinds if kind.experts is not None}
    if not found:
        return {}
    (experts,) = found
    return {"experts": experts.count, "expert_ffn": experts.ffn, "shared_ffn": experts.shared_ffn, "one": 1}


def expert_rules(
    router: str,
    gate: str,
    up: str,
    down: str,
    *,
    norm: str,
    loaded: str,
    loaded_router: str | None = None,
    bias: str | None = None,
    loaded_bias: str | None = None,
) -> tuple[Rule, ...]:
    """The tensors of a layer of experts: the norm before them, the router, and each expert's matrices.

    Args:
        router, gate, up, down, norm: names in a Hugging Face folder, with `{e}` for the expert.
        loaded: where transformers holds all experts once loaded, as `gate_up_proj` and `down_proj`.
        loaded_router: where it holds the router's weight, if not under the folder's name.
        bias: the bias by which experts are chosen, where there is one; loaded_bias: as loaded_router, of it.
    """
    one = _MLP + "experts.local_experts.{e}."
    rules: tuple[Rule, ...] = (
        copy(_NORM, norm, ("hidden",)),
        replace(copy(_MLP + "router.weight", router, ("experts", "hidden")), loaded=loaded_router),
        replace(gate_up(one + "linear_fc1.weight", (gate, up), "expert_ffn"), loaded=loaded + "gate_up_proj"),
        replace(
            copy(one + "linear_fc2.weight", down, ("hidden", "expert_ffn"), split=1), loaded=loaded + "down_proj"
        ),
    )  # fmt: skip
    if bias is not None:
        rules += (replace(copy(_MLP + "router.expert_bias", bias, ("experts",)), trained=False, loaded=loaded_bias),)
    return only(rules, has_experts)


def usual_expert_rules(bias: str | None = None, loaded_bias: str | None = None) -> tuple[Rule, ...]:
    """The tensors of a layer of experts under the names that most families give them; both arguments as for `expert_rules`."""
    layer = "model.layers.{i}."
    expert = layer + "mlp.experts.{e}."
    return expert_rules(
        layer + "mlp.gate.weight",
        expert + "gate_proj.weight",
        expert + "up_proj.weight",
        expert + "down_proj.weight",
        norm=layer + "post_attention_layernorm.weight",
        loaded=layer + "mlp.experts.",
        bias=bias,
        loaded_bias=loaded_bias,
    )


def shared_rules(gate: str, up: str, down: str, token_gate: str | None = None) -> tuple[Rule, ...]:
    """The tensors of an expert that every token goes to, and of the gate by which each weighs it."""
    shared = _MLP + "shared_experts."
    rules: tuple[Rule, ...] = (
        gate_up(shared + "linear_fc1.weight", (gate, up), "shared_ffn"),
        copy(shared + "linear_fc2.weight", down, ("hidden", "shared_ffn"), split=1),
    )
    if token_gate is not None:
        rules += (copy(shared + "gate_weight", token_gate, ("one", "hidden")),)
    return only(rules, has_experts)


def only(rules: Iterable[Rule], layers: Any) -> tuple[Rule, ...]:
    """Rules that hold for layers of some kinds alone."""
    return tuple(replace(rule, layers=layers) for rule in rules)


def without_mlp(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """A family's rules of everything but the MLPs, or experts, and the norms before them."""
    return tuple(rule for rule in rules if not any(part in rule.megatron for part in (".mlp.", ".pre_mlp_layernorm.")))


def dense_mlp(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """A dense family's rules of the MLPs, for those layers of a family with experts that have none."""
    return only((rule for rule in rules if ".mlp." in rule.megatron), is_dense)


def kind_with(experts: Experts, **more: Any) -> Kind:
    """A layer of experts. Raises UserError where there are fewer than a token goes to."""
    if not 1 <= experts.chosen <= experts.count:
        raise UserError(
            f"num_experts_per_tok = {experts.chosen} is not between 1 and the {experts.count} experts.",
            where="config.json: num_experts_per_tok",
            fix="fetch config.json again",
        )
    return Kind(mlp=EXPERTS, experts=experts, **more)


def grouped_sigmoid_experts(config: Any) -> Experts:
    """The experts of DeepSeek V3's kind: chosen by the sigmoid of each and a bias, within the best groups, beside shared ones."""
    return Experts(
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        score="sigmoid",
        renormalise=bool(config.norm_topk_prob),
        factor=float(config.routed_scaling_factor),
        groups=config.n_group,
        kept=config.topk_group,
        bias=True,
        shared_ffn=config.moe_intermediate_size * config.n_shared_experts,
    )


def only_value(config: Any, field: str, value: Any) -> None:
    """Raise UserError where a config has a field that transformers does not ask for, and it says something else than it computes."""
    found = getattr(config, field, None)
    if found not in (None, value):
        raise UserError(
            f"{field} = {found!r} is not supported (only {value!r}, which is what transformers computes).",
            where=f"config.json: {field}",
            fix="train this model elsewhere; nothing was converted",
        )


def every_step(config: Any, layer: int) -> bool:
    """Whether a layer has experts by decoder_sparse_step and mlp_only_layers, as the Qwen families mean them."""
    step = config.decoder_sparse_step
    if type(step) is not int or step < 1:
        raise UserError(
            f"decoder_sparse_step = {step!r} is not a number of layers.",
            where="config.json: decoder_sparse_step",
            fix="fetch config.json again",
        )
    return layer not in (config.mlp_only_layers or ()) and config.num_experts > 0 and (layer + 1) % step == 0
