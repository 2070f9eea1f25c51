"""What a LoRA adapter adds to a model, as parameters in the model's own list: for each Hugging Face module one A and one B.

A [r, in] and B [out, r] of a module (https://arxiv.org/abs/2106.09685) make W x + scale * B A x of W x, with
scale = alpha / r, or alpha / sqrt(r) where asked (https://arxiv.org/abs/2312.03732). Where Megatron-Core fuses modules
into one matrix their As lie one above the other, and their Bs in the rows of the fused matrix, by its own arrangement.
Everything that reads, writes or counts an adapter walks the same list as for a model. Each expert has an A and a B of its
own for each of its matrices: the form in which PEFT had them before transformers stacked experts, which it still reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from megaswift.errors import UserError, nearest
from megaswift.models.head import SCORE
from megaswift.models.parameters import Arrangement, HFTensor, Parameter, Shape, stacked, whole
from megaswift.models.whole import is_within

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.family import Family

PREFIX = "base_model.model."  # PEFT's, before the names of a model's tensors
ALL_LINEAR, ALL_EXPERTS, ALL_ROUTERS = "all-linear", "all-experts", "all-router"
ALL_EMBEDDINGS, EMBEDDINGS = "all-embedding", ("embed_tokens", "wte", "word_embeddings")
RANDOM = "random"
LORA_A, LORA_B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"
STACKED_GATES = "experts.gate_up_proj"  # how PEFT is told of gate and up of all experts of a layer
_WEIGHT = ".weight"
_LAYERS = "decoder.layers."
_LAYER = re.compile(r"decoder\.layers\.\d+\.")
_EXPERT = re.compile(r"\.experts\.local_experts\.\d+\.")
# Modules of ours that are linear layers: of attention and MLPs, of latent attention, of linear attention.
_LINEAR = re.compile(r"\.(linear_(qkv|proj|fc1|fc2|q_proj|(q|kv)_(down|up)_proj)|in_proj(_ba)?|out_proj)\.weight$")


@dataclass(frozen=True)
class Site:
    """A matrix of the engine that gets an adapter.

    Args:
        base: the matrix.
        tensors: which of its Hugging Face tensors are meant.
    """

    base: Parameter
    tensors: tuple[int, ...]

    @property
    def is_column(self) -> bool:
        """Whether tensor parallelism cuts the matrix by rows (outputs), if at all; else it does by columns (inputs)."""
        return self.base.arrangement.split != 1

    @property
    def is_expert(self) -> bool:
        """Whether it is of an expert among which tokens are routed."""
        return is_expert(self.base)

    @property
    def is_router(self) -> bool:
        """Whether it is what tokens are routed by."""
        return is_router(self.base)

    @property
    def module(self) -> str:
        """Name of the engine's module."""
        return self.base.name.removesuffix(_WEIGHT)


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter before it has any values; equal on all ranks, and what adapters of a run are rebuilt from.

    Args:
        rank, alpha: r and alpha.
        dropout: share of a module's inputs that its A does not see in a training step.
        targets: names of Hugging Face modules, whole; of experts each.
        saved: names of Hugging Face modules that are trained themselves and saved whole beside the adapter.
        rslora: whether the scale is alpha / sqrt(r).
        init: how A begins (B is zero): "true" uniform as PEFT does, "gaussian" normal with deviation 1 / r; RANDOM for comparisons:
            B is not zero then, so that A has a gradient from the first step on. Or how both begin as a part of the base:
            "pissa", "pissa_niter_N", "olora" (`weights.convert.lora_start`).
        lr_ratio: the learning rate of every B, as a multiple of that of A (https://arxiv.org/abs/2402.12354); None: 1.
        dora: whether every adapted row of W + scale * B A has a length of its own that is trained (https://arxiv.org/abs/2402.09353).
        bits: in which the base's linear layers and experts are held, 4 or 8, or None: as they are.
        double: whether the scales of 4 bits are held in 8 bits.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    saved: tuple[str, ...] = ()
    rslora: bool = False
    init: str = "true"
    lr_ratio: float | None = None
    bits: int | None = None
    dora: bool = False
    double: bool = False

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def is_part_of_base(self) -> bool:
        """Whether it begins as a part of the base, which is taken out of the base's weights in memory."""
        return self.init.startswith(("pissa", "olora"))

    def record(self) -> dict[str, Any]:
        """JSON-ready; `from_record` reads it."""
        return asdict(self)

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> Lora:
        """Of what `record` made."""
        lists = {name: tuple(values[name]) for name in ("targets", "saved")}
        return cls(**{**values, **lists})

    def sites(self, base: Sequence[Parameter]) -> list[Site]:
        """The matrices of a model that get an adapter, in the order of its list."""
        wanted, found = set(self.targets), []
        for parameter in adaptable(base):
            tensors = tuple(n for n, part in enumerate(parameter.hf) if part.in_model.removesuffix(_WEIGHT) in wanted)
            if tensors:
                found.append(Site(parameter, tensors))
        return found

    def left_out(self, base: Sequence[Parameter]) -> dict[str, str]:
        """What stays as it is in layers of experts, though it could have an adapter: word for target_modules -> name."""
        every, sites = adaptable(base), self.sites(base)
        found = {}
        if any(map(is_expert, every)) and not any(site.is_expert for site in sites):
            found[ALL_EXPERTS] = "routed experts"
        if any(map(is_router, every)) and not any(site.is_router for site in sites):
            found[ALL_ROUTERS] = "routers"
        return found

    def parameters(self, family: Family, config: PreTrainedConfig) -> list[Parameter]:
        """All that is trained and saved: A and B of each site, and the whole tensors of `saved`, in the model's order."""
        base = family.parameters(config)
        sites = {site.base.name: site for site in self.sites(base)}
        kept = {parameter.name for parameter in self.whole(base)}
        found: list[Parameter] = []
        for parameter in base:
            if parameter.name in sites:
                found += self.of_site(sites[parameter.name]).values()
            if parameter.name in kept:
                found.append(
                    replace(parameter, hf=tuple(replace(part, name=PREFIX + part.in_model, held=None) for part in parameter.hf))
                )
        return _keyed(found, [parameter for parameter in base if parameter.name.startswith("decoder.layers.")])

    def whole(self, base: Sequence[Parameter]) -> list[Parameter]:
        """The model's parameters that are trained themselves."""
        return [p for p in base if any(part.in_model.removesuffix(_WEIGHT) in self.saved for part in p.hf)]

    def of_site(self, site: Site) -> dict[str, Parameter]:
        """A, B and, where asked, the lengths of a matrix's rows; what is as wide or as high as a rank's part of it is cut with it."""
        base, count, inputs = site.base, len(site.tensors), site.base.shape[1]
        modules = [base.hf[number].in_model.removesuffix(_WEIGHT) for number in site.tensors]
        rows = [base.hf[number].shape[0] for number in site.tensors]
        order = base.arrangement.only(site.tensors)
        a_cut = (
            replace(stacked(*[self.rank] * count), split=None) if site.is_column else whole(self.rank, base.arrangement.split)
        )
        b_cut = order if site.is_column else whole(sum(rows))

        def half(name: str, shape: Shape, hf: Sequence[Shape], arrangement: Arrangement, end: str) -> Parameter:
            tensors = tuple(HFTensor(f"{PREFIX}{module}.{end}", one) for module, one in zip(modules, hf, strict=True))
            key = f"{base.key.removesuffix(_WEIGHT)}.{name}"
            full = f"{site.module}.{name}"
            return replace(
                base, name=full, key=key, shape=shape, hf=tensors, arrangement=arrangement, padded=False, loaded=None
            )

        found = {
            LORA_A: half(LORA_A, (count * self.rank, inputs), [(self.rank, inputs)] * count, a_cut, "lora_A.weight"),
            LORA_B: half(LORA_B, (order.size, self.rank), [(row, self.rank) for row in rows], b_cut, "lora_B.weight"),
        }
        if self.dora:
            found[MAGNITUDE] = half(MAGNITUDE, (order.size,), [(row,) for row in rows], b_cut, "lora_magnitude_vector")
        return found

    def peft_config(self, base: Sequence[Parameter], model: str, revision: str | None = None) -> dict[str, Any]:
        """adapter_config.json, in PEFT's words.

        Of a model with experts PEFT 0.21 takes `gate_proj` and the like for its routed experts alone, so that whatever is no
        attention is named as a parameter (`target_parameters`); those have no dropout there. Gate and up of an expert, one
        tensor in transformers, have one A of twice the rank there, and a B in which the other's half is zero.

        Args:
            model: where the base is found, for people and programs that load the adapter alone.
        """
        modules, parameters = self._words(base)
        double = any(site.is_expert and site.is_column for site in self.sites(base))
        plain = self.scale * self.rank if double else self.alpha  # the scale must not follow from twice the rank
        return {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS" if any(parameter.name == SCORE for parameter in base) else "CAUSAL_LM",
            "base_model_name_or_path": model,
            "revision": revision,
            "r": self.rank,
            "lora_alpha": _number(plain),
            "lora_dropout": 0.0 if parameters else self.dropout,
            "use_rslora": self.rslora and not double,
            "use_dora": self.dora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": self.init if self.init != "true" else True,
            "target_modules": modules,
            **({"target_parameters": parameters} if parameters else {}),
            "modules_to_save": self._saved_words(base) or None,
            "rank_pattern": {STACKED_GATES: 2 * self.rank} if double else {},
            "alpha_pattern": {STACKED_GATES: _number(2 * plain)} if double else {},
            "inference_mode": True,
        }

    def _saved_words(self, base: Sequence[Parameter]) -> list[str]:
        """How PEFT is told of the modules that are saved whole."""
        if is_within(base):
            return list(self.saved)
        return shortened(self.saved, [part.in_model.removesuffix(_WEIGHT) for p in base for part in p.hf], "")

    def _words(self, base: Sequence[Parameter]) -> tuple[list[str], list[str]]:
        """How PEFT is told of the modules that have adapters, and of the parameters."""
        mixed = any(is_router(parameter) for parameter in base)
        modules: list[str] = []
        parameters: list[str] = []
        for site in self.sites(base):
            names = [site.base.hf[number].in_model for number in site.tensors]
            if site.base.loaded is not None:
                names = [site.base.loaded]
            if mixed and ".mlp." in site.base.name:
                parameters += names
            else:
                modules += [name.removesuffix(_WEIGHT) for name in names]
        if is_within(base):  # the end of a name means modules of the towers, too
            return modules, list(dict.fromkeys(parameters))
        known = [part.in_model.removesuffix(_WEIGHT) for p in linear(base) for part in p.hf]
        held = [name for p in base for name in ([p.loaded] if p.loaded else p.labels)]
        return shortened(modules, known), _without_layers(list(dict.fromkeys(parameters)), held)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _keyed(parameters: list[Parameter], base: list[Parameter]) -> list[Parameter]:
    """One key a layer, unless every layer has the same tensors: as Megatron-Core stores layers that differ."""
    layers: dict[str, set[str]] = {}
    for parameter in parameters:
        if _is_stacked(parameter):
            layers.setdefault(parameter.name.split(".")[2], set()).add(parameter.key)
    count = len({parameter.name.split(".")[2] for parameter in base})
    if not layers or (len(layers) == count and len({frozenset(keys) for keys in layers.values()}) == 1):
        return parameters
    return [
        replace(p, key=_EXPERT.sub(".experts.experts.", p.name), place=p.place[1:], counts=p.counts[1:])
        if _is_stacked(p)
        else p
        for p in parameters
    ]


def _is_stacked(parameter: Parameter) -> bool:
    """Whether a checkpoint has it in one tensor with those of other layers."""
    return parameter.name.startswith(_LAYERS) and not _LAYER.match(parameter.key)


def linear(base: Sequence[Parameter]) -> list[Parameter]:
    """The matrices of linear layers inside a model's blocks that every token goes through: experts and routers left out."""
    return [
        p
        for p in base
        if len(p.shape) == 2
        and p.name.startswith(_LAYERS)
        and _LINEAR.search(p.name)
        and not is_expert(p)
        and all(part.index is None and part.name.endswith(_WEIGHT) for part in p.hf)
    ]


def packable(base: Sequence[Parameter]) -> list[Parameter]:
    """The matrices of a model that can be held in few bits while adapters are trained: of linear layers and of experts."""
    dense = {parameter.name for parameter in linear(base)}
    return [p for p in base if p.name in dense or (is_expert(p) and len(p.shape) == 2)]


def is_expert(parameter: Parameter) -> bool:
    """Whether a parameter, of a model or of an adapter, belongs to one of the experts among which tokens are routed."""
    return _EXPERT.search(parameter.name) is not None


def is_router(parameter: Parameter) -> bool:
    """Whether it is a matrix by which tokens are routed."""
    return parameter.name.endswith(".mlp.router.weight")


def adaptable(base: Sequence[Parameter]) -> list[Parameter]:
    """The matrices of a model that can get an adapter, in its order.

    Of experts and routers those of folders that hold each expert's matrices apart: PEFT finds no others.
    """
    dense = {parameter.name for parameter in linear(base)}
    apart = all(part.index is None for parameter in base if parameter.trained for part in parameter.hf)
    return [p for p in base if p.name in dense or (apart and (is_expert(p) or is_router(p)))]


def local_module(name: str, first: int, count: int) -> str | None:
    """A module's name on a pipeline stage of `count` layers from layer `first` on; None where another stage has its layer."""
    parts = name.split(".")
    layer = int(parts[2]) - first
    return ".".join([*parts[:2], str(layer), *parts[3:]]) if 0 <= layer < count else None


def target_modules(base: Sequence[Parameter], words: Sequence[str], where: str = "--target_modules") -> tuple[str, ...]:
    """The modules that words name.

    `all-linear` are the linear layers that every token goes through, `all-experts` the matrices of the experts among which
    tokens are routed, `all-router` what they are routed by. Other words are the end of a module's name, or a regular
    expression of whole names.

    Raises UserError for a word that names none, with the nearest names, for embeddings, and for a part of the experts of a layer.
    """
    for word in words:
        if word == ALL_EMBEDDINGS or word.rsplit(".", 1)[-1] in EMBEDDINGS:
            raise UserError(
                f"{word!r} is an embedding, of which no adapters are made here: half of the models use it as their output layer, too, and what reads an adapter of it differs in whether that one has it.",
                where=where,
                fix="leave it out; a model whose output layer is a matrix of its own may train it whole beside the adapter (--modules_to_save embed_tokens)",
            )
    every = adaptable(base)
    lists = {ALL_LINEAR: linear(base), ALL_EXPERTS: list(filter(is_expert, every)), ALL_ROUTERS: list(filter(is_router, every))}
    shorthands = {word: {name for p in own for name in _modules(p)} for word, own in lists.items()}
    for word in words:
        if word in shorthands and not shorthands[word]:
            mixed = any(is_router(parameter) for parameter in base)
            why = "its folder holds all experts of a layer in one tensor" if mixed else "it has no experts"
            raise UserError(f"{word!r} names nothing of this model: {why}.", where=where, fix="use all-linear")
    known = [name for parameter in every for name in _modules(parameter)]
    found = _named(words, known, "linear layer inside the blocks", where, shorthands)
    _require_whole_experts(every, set(found), where)
    return found


def _modules(parameter: Parameter) -> list[str]:
    return [part.in_model.removesuffix(_WEIGHT) for part in parameter.hf]


def _require_whole_experts(adaptable: Sequence[Parameter], chosen: set[str], where: str) -> None:
    """Raise UserError where some matrices in the experts of a layer would have an adapter and others none."""
    layers: dict[str, list[bool]] = {}
    for parameter in filter(is_expert, adaptable):
        layers.setdefault(parameter.name.split(".")[2], []).extend(name in chosen for name in _modules(parameter))
    for layer, meant in layers.items():
        if any(meant) and not all(meant):
            raise UserError(
                f"{sum(meant)} of the {len(meant)} matrices in the experts of layer {layer} are named. In transformers gate and up of "
                "all of them are one tensor, and PEFT loads an adapter of that only beside one of all their other matrices.",
                where=where,
                fix=f"name gate, up and down of all experts of a layer; {ALL_EXPERTS} names those of all layers",
            )


def saved_modules(
    base: Sequence[Parameter], words: Sequence[str], tied: bool, where: str = "--modules_to_save"
) -> tuple[str, ...]:
    """The modules that words name and that can be trained whole beside an adapter: norms, embedding and output layer.

    Raises UserError for others, with the nearest names.
    """
    matrices = {
        parameter.name for parameter in base if parameter.name.startswith("decoder.layers.") and len(parameter.shape) > 1
    }
    own = [parameter for parameter in base if parameter.trained and parameter.name not in matrices]
    named = [part.held or part.label for parameter in own for part in parameter.hf]
    known = [name.removesuffix(_WEIGHT) for name in named]
    known = [name for name in known if not name.endswith(".bias")]
    found = _named(words, known, "norm, embedding or output layer", where)
    shared = [name for name in found if name.endswith(("embed_tokens", "lm_head"))]
    if tied and shared:
        raise UserError(
            f"{shared[0]} is one matrix with the {'output layer' if 'embed' in shared[0] else 'embedding'} of this model, and PEFT "
            "would train a copy that only one of the two uses.",
            where=where,
            fix="leave it out, or train the whole model: --sft_type full",
        )
    return found


def _named(
    words: Sequence[str], known: list[str], what: str, where: str, shorthands: Mapping[str, set[str]] | None = None
) -> tuple[str, ...]:
    chosen: set[str] = set()
    whole = set(known)
    for word in words:
        if word in whole and "." in word:  # an adapter of all experts names thousands
            chosen.add(word)
            continue
        matches = (shorthands or {}).get(word) or {name for name in known if name == word or name.endswith(f".{word}")}
        if not matches and re.search(r"[^\w.]", word):
            try:
                matches = {name for name in known if re.fullmatch(word, name)}
            except re.error as error:
                raise UserError(f"{word!r} is no regular expression: {error}.", where=where) from error
        if not matches:
            ends = sorted({name.rsplit(".", 1)[-1] for name in known})
            raise UserError(
                f"{word!r} names no {what} of this model.",
                where=where,
                fix=f"nearest: {nearest(word, ends)}; there are {', '.join(ends)}, or a regular expression of whole names like {known[0]}",
            )
        chosen |= matches
    return tuple(name for name in dict.fromkeys(known) if name in chosen)


def _without_layers(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names of parameters in layers, without the layer where they mean the same in all of them."""

    def end(name: str) -> str:
        return name.split(".", 3)[-1]

    ends = {end(name) for name in names}
    return sorted(ends) if {name for name in known if end(name) in ends} == set(names) else list(names)


def shortened(names: Sequence[str], known: Sequence[str], mark: str = ".") -> list[str]:
    """Ends of names that mean these of all known ones and no other; the whole names where there are no such ends.

    Args:
        mark: what must stand before the end of a name. PEFT asks for a dot in target_modules, and for nothing in
            modules_to_save, where `norm` is every layer's q_norm, too.
    """
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {name for name in known if any(name == end or name.endswith(mark + end) for end in ends)}
    return ends if meant == set(names) else list(names)


__all__ = [
    "ALL_EXPERTS", "ALL_LINEAR", "ALL_ROUTERS", "LORA_A", "LORA_B", "MAGNITUDE", "PREFIX", "RANDOM", "STACKED_GATES", "Lora", "Site",
    "adaptable", "is_expert", "is_router", "linear", "local_module", "saved_modules", "shortened", "target_modules",
]  # fmt: skip
