"""A model as the rules see it, and its tensors in a Megatron checkpoint: names, shapes, and how to read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megaswift.errors import DataError
from megaswift.families import family_of
from megaswift.families.base import OUTPUT_LAYER, Family, is_tied, sizes_of
from megaswift.families.rules import GateUp, Rule, Sizes
from megaswift.hf.read import UNTIED, nonfinite

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {value: name for name, value in DTYPES.items()}
_OPTIMIZER = "optimizer."
TIED = "the weights have an output layer of their own: tie_word_embeddings in config.json must be false"


class MegatronReader(Protocol):
    """Weights in Megatron's layout, whole tensors by name (reader.Reader, classic.ClassicReader)."""

    @property
    def directory(self) -> Path: ...

    @property
    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str, layer: int | None = None) -> torch.dtype: ...

    def read(self, key: str, layer: int | None = None, rows: tuple[int, int] | None = None) -> Tensor: ...

    def prefetch(self, key: str, layer: int | None = None) -> None: ...

    def release(self, key: str, layer: int | None = None) -> None: ...


def checkpoint_key(rule: Rule) -> str:
    """The rule's name in a torch_dist checkpoint, where layers are stacked."""
    return rule.megatron.replace(".{i}", "")


class Model:
    """A model as the rules see it: family, sizes, tied or not."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.family: Family = family_of(config.model_type)
        self.sizes: Sizes = sizes_of(config)
        self.tied = is_tied(config)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every Hugging Face tensor."""
        return self.family.expected(self.sizes, self.tied)

    def each(self) -> Iterator[tuple[Rule, int]]:
        """Every rule with every layer, in the order of the computation: embedding, layers one by one, the rest."""
        pairs = list(self.family.each(self.sizes, self.tied))
        return iter(sorted(pairs, key=lambda pair: pair[1] if self.layered(pair[0]) else self._outside(pair[0])))

    def _outside(self, rule: Rule) -> int:
        return -1 if rule.megatron.startswith("embedding.") else self.sizes.layers

    def layered(self, rule: Rule) -> bool:
        return "{i}" in rule.megatron

    def place(self, rule: Rule, layer: int) -> int | None:
        """The layer axis of a rule's tensor: its index, or None where the tensor has no such axis."""
        return layer if self.layered(rule) else None

    def global_shape(self, rule: Rule) -> tuple[int, ...]:
        shape = rule.megatron_shape(self.sizes)
        return (self.sizes.layers, *shape) if self.layered(rule) else shape

    def names(self, rule: Rule, layer: int) -> list[str]:
        """Hugging Face names of a rule's tensors."""
        return [name.format(i=layer) for name in rule.hf]

    def read_hf(self, reader: MegatronReader, rule: Rule, layer: int) -> list[Tensor]:
        """The Hugging Face tensors of a rule, from a Megatron checkpoint."""
        if isinstance(rule, GateUp):  # each half is read where it lies
            return [self.read_part(reader, rule, layer, number) for number in range(len(rule.hf))]
        return rule.unpack(reader.read(checkpoint_key(rule), self.place(rule, layer)), self.sizes)

    def read_part(self, reader: MegatronReader, rule: Rule, layer: int, number: int) -> Tensor:
        """One of the Hugging Face tensors of a rule; only what it takes is read where the rule puts parts one above the other."""
        if isinstance(rule, GateUp):
            rows = (number * self.sizes.ffn, (number + 1) * self.sizes.ffn)
            return reader.read(checkpoint_key(rule), self.place(rule, layer), rows)
        return self.read_hf(reader, rule, layer)[number]


def check_megatron(reader: MegatronReader, model: Model) -> None:
    """Raise DataError unless the checkpoint holds exactly the model's tensors, vocabulary padding allowed."""
    wanted = {checkpoint_key(rule): rule for rule in model.family.rules_for(model.tied)}
    found = {key for key in reader.keys if not key.startswith(_OPTIMIZER)}
    missing, extra = sorted(set(wanted) - found), sorted(found - set(wanted))
    if missing or extra:
        fix = "convert it with the config.json that it was made with"
        if (missing, extra) == ([OUTPUT_LAYER], []):
            fix = UNTIED
        elif (missing, extra) == ([], [OUTPUT_LAYER]):
            fix = TIED
        raise DataError(
            "the checkpoint does not fit the model's config."
            + (f" Missing: {', '.join(missing[:10])}." if missing else "")
            + (f" Not expected: {', '.join(extra[:10])}." if extra else ""),
            where=str(reader.directory),
            fix=fix,
        )
    for key, rule in wanted.items():
        shape, expected = reader.shape(key), model.global_shape(rule)
        padded = (
            rule.hf_shapes(model.sizes)[0][0] == model.sizes.vocab and shape[0] >= expected[0] and shape[1:] == expected[1:]
        )
        if shape != expected and not padded:
            raise DataError(f"{key} has shape {shape}, {expected} expected.", where=str(reader.directory))


class FiniteCheck:
    """Refuses NaN and infinite values by the tensor's name; where they are allowed it notes the names in `found`."""

    def __init__(self, allowed: bool = False) -> None:
        self.allowed = allowed
        self.found: set[str] = set()

    def __call__(self, name: str, value: Tensor) -> None:
        """Raises DataError for NaN or infinite values that are not allowed; safe to call from several threads."""
        if not nonfinite(value):
            return
        if not self.allowed:
            raise DataError(
                f"tensor {name} has NaN or infinite values.",
                where=name,
                fix="use another checkpoint; --allow_nonfinite true converts it as it is",
            )
        self.found.add(name)


def raw(value: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, without a copy where it is contiguous."""
    flat = value.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def digest(value: Tensor) -> str:
    """SHA-256 of a tensor's raw bytes in row-major order."""
    return hashlib.sha256(raw(value)).hexdigest()
