"""What a LoRA adapter adds to a model, as parameters in the model's own list: for each Hugging Face module one A and one B.

A [r, in] and B [out, r] of a module (https://arxiv.org/abs/2106.09685) make W x + scale * B A x of W x, with
scale = alpha / r, or alpha / sqrt(r) where asked (https://arxiv.org/abs/2312.03732). Where Megatron-Core fuses modules
into one matrix their As lie one above the other, and their Bs in the rows of the fused matrix, by its own arrangement.
Everything that reads, writes or counts an adapter walks the same list as for a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from megaswift.errors import UserError, nearest
from megaswift.models.parameters import Arrangement, HFTensor, Parameter, Shape, stacked, whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.family import Family

PREFIX = "base_model.model."  # PEFT's, before the names of a model's tensors
ALL_LINEAR = "all-linear"
RANDOM = "random"
LORA_A, LORA_B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"
_WEIGHT = ".weight"


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
        """Whether tensor parallelism cuts the matrix by rows (outputs), or else by columns (inputs)."""
        return self.base.arrangement.split == 0

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
        targets: names of Hugging Face modules, whole.
        saved: names of Hugging Face modules that are trained themselves and saved whole beside the adapter.
        rslora: whether the scale is alpha / sqrt(r).
        init: how A begins (B is zero): "true" uniform as PEFT does, "gaussian" normal with deviation 1 / r; RANDOM for comparisons:
            B is not zero then, so that A has a gradient from the first step on.
        lr_ratio: the learning rate of every B, as a multiple of that of A (https://arxiv.org/abs/2402.12354); None: 1.
        dora: whether every adapted row of W + scale * B A has a length of its own that is trained (https://arxiv.org/abs/2402.09353).
        bits: in which the base's linear layers are held, 4 or None: as they are.
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

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

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
        for parameter in linear(base):
            tensors = tuple(n for n, part in enumerate(parameter.hf) if part.name.removesuffix(_WEIGHT) in wanted)
            if tensors:
                found.append(Site(parameter, tensors))
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
                found.append(replace(parameter, hf=tuple(replace(part, name=PREFIX + part.name) for part in parameter.hf)))
        return _keyed(found, [parameter for parameter in base if parameter.name.startswith("decoder.layers.")])

    def whole(self, base: Sequence[Parameter]) -> list[Parameter]:
        """The model's parameters that are trained themselves."""
        return [p for p in base if any(part.name.removesuffix(_WEIGHT) in self.saved for part in p.hf)]

    def of_site(self, site: Site) -> dict[str, Parameter]:
        """A, B and, where asked, the lengths of a matrix's rows; what is as wide or as high as a rank's part of it is cut with it."""
        base, count, inputs = site.base, len(site.tensors), site.base.shape[1]
        modules = [base.hf[number].name.removesuffix(_WEIGHT) for number in site.tensors]
        rows = [base.hf[number].shape[0] for number in site.tensors]
        order = base.arrangement.only(site.tensors)
        a_cut = replace(stacked(*[self.rank] * count), split=None) if site.is_column else whole(self.rank, 1)
        b_cut = order if site.is_column else whole(sum(rows))

        def half(name: str, shape: Shape, hf: Sequence[Shape], arrangement: Arrangement, end: str) -> Parameter:
            tensors = tuple(HFTensor(f"{PREFIX}{module}.{end}", one) for module, one in zip(modules, hf, strict=True))
            key = f"{base.key.removesuffix(_WEIGHT)}.{name}"
            full = f"{site.module}.{name}"
            return replace(base, name=full, key=key, shape=shape, hf=tensors, arrangement=arrangement, padded=False)

        found = {
            LORA_A: half(LORA_A, (count * self.rank, inputs), [(self.rank, inputs)] * count, a_cut, "lora_A.weight"),
            LORA_B: half(LORA_B, (order.size, self.rank), [(row, self.rank) for row in rows], b_cut, "lora_B.weight"),
        }
        if self.dora:
            found[MAGNITUDE] = half(MAGNITUDE, (order.size,), [(row,) for row in rows], b_cut, "lora_magnitude_vector")
        return found

    def peft_config(self, base: Sequence[Parameter], model: str, revision: str | None = None) -> dict[str, Any]:
        """adapter_config.json, in PEFT's words.

        Args:
            model: where the base is found, for people and programs that load the adapter alone.
        """
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model,
            "revision": revision,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": self.init if self.init != "true" else True,
            "target_modules": shortened(self.targets, [part.name.removesuffix(_WEIGHT) for p in linear(base) for part in p.hf]),
            "modules_to_save": shortened(self.saved, [part.name.removesuffix(_WEIGHT) for p in base for part in p.hf], "")
            or None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "inference_mode": True,
        }


def _keyed(parameters: list[Parameter], base: list[Parameter]) -> list[Parameter]:
    """One key a layer, unless every layer has the same tensors: as Megatron-Core stores layers that differ."""
    layers: dict[str, set[str]] = {}
    for parameter in parameters:
        if parameter.counts:
            layers.setdefault(parameter.name.split(".")[2], set()).add(parameter.key)
    count = len({parameter.name.split(".")[2] for parameter in base})
    if not layers or (len(layers) == count and len({frozenset(keys) for keys in layers.values()}) == 1):
        return parameters
    return [replace(p, key=p.name, place=p.place[1:], counts=p.counts[1:]) if p.counts else p for p in parameters]


def linear(base: Sequence[Parameter]) -> list[Parameter]:
    """The matrices of a model that can get an adapter: of linear layers inside its blocks, experts and routers left out."""
    return [
        p
        for p in base
        if len(p.shape) == 2
        and p.name.startswith("decoder.layers.")
        and p.name.endswith((".linear_qkv.weight", ".linear_proj.weight", ".linear_fc1.weight", ".linear_fc2.weight"))
        and ".experts." not in p.name
        and all(part.index is None and part.name.endswith(_WEIGHT) for part in p.hf)
    ]


def local_module(name: str, first: int, count: int) -> str | None:
    """A module's name on a pipeline stage of `count` layers from layer `first` on; None where another stage has its layer."""
    parts = name.split(".")
    layer = int(parts[2]) - first
    return ".".join([*parts[:2], str(layer), *parts[3:]]) if 0 <= layer < count else None


def target_modules(base: Sequence[Parameter], words: Sequence[str], where: str = "--target_modules") -> tuple[str, ...]:
    """The modules that words name: `all-linear`, the end of a module's name, or a regular expression of whole names.

    Raises UserError for a word that names none, with the nearest names.
    """
    known = [part.name.removesuffix(_WEIGHT) for parameter in linear(base) for part in parameter.hf]
    return _named(words, known, "linear layer inside the blocks", where, shorthand=ALL_LINEAR)


def saved_modules(
    base: Sequence[Parameter], words: Sequence[str], tied: bool, where: str = "--modules_to_save"
) -> tuple[str, ...]:
    """The modules that words name and that can be trained whole beside an adapter: norms, embedding and output layer.

    Raises UserError for others, with the nearest names.
    """
    matrices = {
        parameter.name for parameter in base if parameter.name.startswith("decoder.layers.") and len(parameter.shape) > 1
    }
    known = [p.removesuffix(_WEIGHT) for parameter in base if parameter.name not in matrices for p in parameter.labels]
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


def _named(words: Sequence[str], known: list[str], what: str, where: str, shorthand: str | None = None) -> tuple[str, ...]:
    chosen: set[str] = set()
    for word in words:
        matches = set(known) if word == shorthand else {name for name in known if name == word or name.endswith(f".{word}")}
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
    "ALL_LINEAR", "LORA_A", "LORA_B", "MAGNITUDE", "PREFIX", "RANDOM", "Lora", "Site", "linear", "local_module", "saved_modules", "shortened", "target_modules",
]  # fmt: skip
