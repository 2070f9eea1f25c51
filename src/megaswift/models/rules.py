"""How a family states its tensors: one rule for all layers (and experts), with names in which `{i}` is the layer and `{e}` the expert.

Megatron names are those that stand in a checkpoint (the spelling of TransformerEngine's fused modules, which the local modules
are saved under as well). `expanded` turns the rules of a family into the list of a model's parameters; what comes after
knows nothing of rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megaswift.models.kinds import Kind
from megaswift.models.parameters import (
    Arrangement,
    HFTensor,
    Parameter,
    Shape,
    fused,
    grouped,
    halves,
    rearranged,
    stacked,
    whole,
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one model, as its config names them.

    Args:
        more: what only some families have, by name (experts, for example).
        rotary: rows of a head that rotate; None: all.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    more: Mapping[str, int] = field(default_factory=dict)
    rotary: int | None = None

    def __getitem__(self, name: str) -> int:
        derived = {"q_rows": self.heads * self.head_dim, "kv_rows": self.kv_heads * self.head_dim}
        return derived[name] if name in derived else self.more[name] if name in self.more else int(getattr(self, name))


@dataclass(frozen=True)
class Rule:
    """A kind of tensor, for every layer (and expert) that has it.

    Args:
        megatron: name in Megatron-Core's model.
        hf: names of the Hugging Face tensors that it is made of.
        shapes: their shapes (of the part, where a tensor of the folder holds several experts).
        arrangement: how they make the Megatron tensor.
        padded: whether Megatron may hold more rows.
        layers: which kinds of layers have it; None: all.
        stacked: the folder holds the tensors of all experts as one; without experts, the tensor as the only one of several.
        transposed: the folder holds rows and columns exchanged.
        loaded: the name under which transformers holds it once loaded, where that is not the folder's: of all experts as one
            tensor, each as the Megatron tensor has it.
        trained: False for a buffer, which has no gradient.
        held: names of the same tensors in transformers' loaded model, where these are others (`models/whole.py`).
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: Callable[[Sizes], list[Shape]]
    arrangement: Callable[[Sizes], Arrangement]
    padded: bool = False
    layers: Callable[[Kind], bool] | None = None
    stacked: bool = False
    transposed: bool = False
    loaded: str | None = None
    trained: bool = True
    held: tuple[str, ...] = ()


def copy(megatron: str, hf: str, shape: tuple[str, ...], split: int | None = None) -> Rule:
    """One tensor, the same on both sides.

    Args:
        shape: names of sizes, for example ("hidden", "q_rows").
        split: axis that tensor parallelism cuts; None where every rank holds the whole.
    """
    return Rule(
        megatron, (hf,), lambda sizes: [tuple(sizes[name] for name in shape)], lambda sizes: whole(sizes[shape[0]], split)
    )


def in_layer(
    megatron: str, hf: str, *shape: str, split: int | None = None, layers: Callable[[Kind], bool] | None = None
) -> Rule:
    """The same for a tensor of every layer, with names inside it, or of those layers whose kind says so."""
    return replace(copy(f"decoder.layers.{{i}}.{megatron}", f"model.layers.{{i}}.{hf}", shape, split), layers=layers)


def norms_behind(attention: str, mlp: str) -> tuple[Rule, Rule]:
    """Norms behind attention and MLP, by the names of their modules in a Hugging Face layer."""
    return (
        in_layer("post_self_attn_layernorm.weight", f"{attention}.weight", "hidden"),
        in_layer("post_mlp_layernorm.weight", f"{mlp}.weight", "hidden"),
    )


def vocab(megatron: str, hf: str) -> Rule:
    """An embedding or output matrix: rows are tokens, and Megatron may hold padding rows at the end."""
    return Rule(megatron, (hf,), lambda sizes: [(sizes.vocab, sizes.hidden)], lambda sizes: whole(sizes.vocab, 0), padded=True)


def qkv(megatron: str, hf: tuple[str, str, str], bias: bool = False) -> Rule:
    """Query, key and value fused into one matrix (or bias), grouped by key/value head: [q .. q, k, v] for each."""

    def shapes(sizes: Sizes) -> list[Shape]:
        columns = () if bias else (sizes.hidden,)
        return [(sizes["q_rows"], *columns), (sizes["kv_rows"], *columns), (sizes["kv_rows"], *columns)]

    def arrangement(sizes: Sizes) -> Arrangement:
        return grouped(sizes.kv_heads, sizes["q_rows"] // sizes.kv_heads, sizes.head_dim, sizes.head_dim)

    return Rule(megatron, hf, shapes, arrangement)


def by_halves(rule: Rule) -> Rule:
    """A rule of `qkv` where Hugging Face rotates neighbouring rows of a head, not its halves: query and key are rearranged."""

    def arrangement(sizes: Sizes) -> Arrangement:
        return rearranged(rule.arrangement(sizes), halves(sizes.heads, sizes.head_dim, sizes.rotary), tensors=(0, 1))

    return replace(rule, arrangement=arrangement)


def qkv_bias(layers: Callable[[Kind], bool] | None = None) -> Rule:
    """The bias of query, key and value under its usual names, of those layers whose kind says so."""
    names = tuple(f"model.layers.{{i}}.self_attn.{part}_proj.bias" for part in "qkv")
    made = qkv("decoder.layers.{i}.self_attention.linear_qkv.bias", (names[0], names[1], names[2]), bias=True)
    return replace(made, layers=layers)


def as_one(rule: Rule, hf: str) -> Rule:
    """A rule of several tensors that the Hugging Face folder holds as one, one above the other."""

    def shapes(sizes: Sizes) -> list[Shape]:
        parts = rule.shapes(sizes)
        return [(sum(part[0] for part in parts), *parts[0][1:])]

    def arrangement(sizes: Sizes) -> Arrangement:
        return fused(rule.arrangement(sizes), [part[0] for part in rule.shapes(sizes)])

    return replace(rule, hf=(hf,), shapes=shapes, arrangement=arrangement)


def changed(rules: Iterable[Rule], other: Mapping[str, Rule | None]) -> tuple[Rule, ...]:
    """Rules of a family, some of them replaced by others, or left out (None).

    Args:
        other: end of a rule's Megatron name -> the rule in its place.

    Raises ValueError for a name that not exactly one rule has.
    """
    made = list(rules)
    for name, rule in other.items():
        (place,) = (n for n, one in enumerate(made) if one.megatron.endswith(name))
        made[place : place + 1] = [] if rule is None else [rule]
    return tuple(made)


def gate_up(megatron: str, hf: tuple[str, str], rows: str = "ffn") -> Rule:
    """Gate and up projections of a gated MLP, one above the other; tensor parallelism cuts inside each half."""
    return Rule(megatron, hf, lambda sizes: [(sizes[rows], sizes.hidden)] * 2, lambda sizes: stacked(sizes[rows], sizes[rows]))


def is_mixed(rules: Iterable[Rule], kinds: Sequence[Kind]) -> bool:
    """Whether some layers have tensors that others have not: in a checkpoint each layer has keys of its own then."""
    return any(rule.layers is not None and len({rule.layers(kind) for kind in kinds}) > 1 for rule in rules)


def expanded(rules: Iterable[Rule], sizes: Sizes, kinds: Sequence[Kind]) -> list[Parameter]:
    """The parameters of a model, in the order of the computation: embedding, layers one by one, the rest.

    Args:
        kinds: of the layers. Where all have the same tensors Megatron-Core stacks them in a checkpoint (see `is_mixed`).
    """
    rules = tuple(rules)
    uniform = not is_mixed(rules, kinds)
    layers: dict[int, list[Parameter]] = {}
    for rule in rules:
        if rule.layers is not None and not any(map(rule.layers, kinds)):
            continue  # a config without such layers names no sizes for them
        arrangement, shapes = rule.arrangement(sizes), rule.shapes(sizes)
        layered = "{i}" in rule.megatron
        outside = -1 if rule.megatron.startswith("embedding.") else sizes.layers
        for layer in range(sizes.layers) if layered else (outside,):
            if layered and rule.layers is not None and not rule.layers(kinds[layer]):
                continue
            made = _of_layer(rule, sizes, layer if layered else None, arrangement, shapes, uniform)
            layers.setdefault(layer, []).extend(made)
    return [parameter for layer in sorted(layers) for parameter in layers[layer]]


def _of_layer(
    rule: Rule, sizes: Sizes, layer: int | None, arrangement: Arrangement, shapes: list[Shape], uniform: bool
) -> list[Parameter]:
    """One parameter, or one for each expert."""
    experts = sizes["experts"] if "{e}" in rule.megatron else None
    # Megatron-Core's name for the one expert, and for all of them in a checkpoint.
    place, counts, key = [], [], rule.megatron.replace(".local_experts.{e}.", ".experts.").replace(".{e}", "")
    if layer is not None and uniform:
        place, counts, key = [layer], [sizes.layers], key.replace(".{i}", "")
    made = []
    for expert in range(experts) if experts else (None,):
        index = (expert or 0) if rule.stacked else None
        hf = tuple(
            HFTensor(
                name.format(i=layer, e=expert),
                shape,
                index,
                experts or 1,
                rule.transposed,
                held and held.format(i=layer, e=expert),
            )
            for name, shape, held in zip(rule.hf, shapes, rule.held or (None,) * len(rule.hf), strict=True)
        )
        own = [] if expert is None else [expert]
        made.append(
            Parameter(
                name=rule.megatron.format(i=layer, e=expert),
                key=key.format(i=layer),
                place=(*place, *own),
                counts=(*counts, *([experts] if experts else [])),
                shape=(arrangement.size, *shapes[0][1:]),
                hf=hf,
                arrangement=arrangement,
                padded=rule.padded,
                trained=rule.trained,
                loaded=None if rule.loaded is None else rule.loaded.format(i=layer),
            )
        )
    return made
