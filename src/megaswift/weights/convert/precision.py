"""Which precision each tensor of a model has: the one of most of its bytes, and by name the tensors that have another."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.errors import DataError, UserError
from megaswift.models import parameters_of
from megaswift.models.parameters import Parameter, hf_shapes
from megaswift.weights.convert.model import MegatronReader, raw
from megaswift.weights.torch_dist.reader import key_of
from megaswift.weights.torch_dtypes import FLAGS, OF_FLAG, TORCH_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.weights.hf.read import HFCheckpoint

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Precisions:
    """The precision of every Hugging Face tensor of a model.

    Args:
        main: of all tensors that `others` does not name.
        others: name -> precision.
    """

    main: torch.dtype
    others: Mapping[str, torch.dtype] = field(default_factory=dict)

    def of(self, name: str) -> torch.dtype:
        """The precision of a tensor."""
        return self.others.get(name, self.main)

    def widest(self, names: Iterable[str]) -> torch.dtype:
        """The narrowest precision that holds every value of some tensors."""
        return reduce(torch.promote_types, map(self.of, names))

    def stored(self, parameters: Iterable[Parameter]) -> dict[str, torch.dtype]:
        """Key of a Megatron checkpoint -> the precision that it is stored in: it holds all layers, and fused parts, exactly."""
        names: dict[str, list[str]] = {}
        for parameter in parameters:
            names.setdefault(parameter.key, []).extend(part.name for part in parameter.hf)
        return {key: self.widest(parts) for key, parts in names.items()}

    def record(self) -> dict[str, Any]:
        """What a manifest says; `other_dtypes` only where there are some."""
        others = {name: FLAGS[dtype] for name, dtype in sorted(self.others.items())}
        return {"dtype": FLAGS[self.main]} | ({"other_dtypes": others} if others else {})

    def __str__(self) -> str:
        """For messages: "bf16; fp32: model.norm.weight"."""
        parts = [f"{FLAGS[dtype]}: {grouped(names)}" for dtype, names in _by_value(self.others).items()]
        return "; ".join([FLAGS[self.main], *parts])


def chosen(had: Precisions, dtype: str | None, where: str) -> Precisions:
    """What tensors are converted to: the one precision that --dtype names, else each its own.

    Raises UserError where most bytes have a precision that no training has.
    """
    if dtype is not None:
        return Precisions(TORCH_DTYPES[dtype])
    if had.main not in TORCH_DTYPES.values():
        raise UserError(
            f"the weights are {had.main}, which is not a training precision.",
            where=where,
            fix="give --dtype bf16, fp16 or fp32",
        )
    return had


def _of_sizes(found: Mapping[str, tuple[torch.dtype, int]]) -> Precisions:
    """From name -> (dtype, bytes)."""
    totals: dict[torch.dtype, int] = {}
    for dtype, size in found.values():
        totals[dtype] = totals.get(dtype, 0) + size
    main = max(
        totals, key=lambda dtype: totals[dtype], default=torch.float32
    )  # of no tensor: their check names what is missing
    return Precisions(main, {name: dtype for name, (dtype, _) in found.items() if dtype != main})


def precisions_of_folder(source: HFCheckpoint, config: PreTrainedConfig) -> Precisions:
    """As the headers of a Hugging Face folder tell them. Tensors of a dtype that no weight has are `check_source`'s to name."""
    names = [name for name in hf_shapes(parameters_of(config)) if name in source.table]
    found = {name: (source.dtype(name), source.entry(name).nbytes) for name in names}
    had = _of_sizes(found)
    return Precisions(had.main, {name: dtype for name, dtype in had.others.items() if dtype in FLAGS})


def precisions_of_checkpoint(reader: MegatronReader, parameters: Iterable[Parameter]) -> Precisions:
    """As a Megatron checkpoint stores them. Raises DataError naming a tensor whose dtype no weight has."""
    found: dict[str, tuple[torch.dtype, int]] = {}
    for parameter in parameters:
        dtype = reader.dtype(parameter.key, parameter.place)
        if dtype not in FLAGS:
            raise DataError(
                f"{parameter.key} is {dtype}, which is no precision of weights.",
                where=str(reader.directory),
                fix="use a checkpoint in bf16, fp16 or fp32",
            )
        for part in parameter.hf:
            found[part.name] = (dtype, math.prod(part.stored_shape) * dtype.itemsize)
    return _of_sizes(found)


def other_dtypes(manifest: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """The tensors that are to have another precision than the rest, as a manifest records them; the source's own.

    Raises DataError for a record in another form.
    """
    found = manifest.get("other_dtypes") or {}
    if not isinstance(found, dict) or not all(value in OF_FLAG for value in map(str, found.values())):
        raise DataError("manifest.json names precisions that are not known (other_dtypes).", where="manifest.json")
    return {name: OF_FLAG[value] for name, value in found.items()}


def rounded(before: Precisions, after: Precisions, names: Iterable[str]) -> dict[str, str]:
    """Tensors whose precision cannot hold what the one before could: name -> "fp32 to bf16"."""
    changes = ((name, before.of(name), after.of(name)) for name in names)
    return {name: f"{FLAGS[old]} to {FLAGS[new]}" for name, old, new in changes if torch.promote_types(old, new) != new}


def rounded_text(found: Mapping[str, str], count: int) -> str:
    """Every rounded tensor in one line: "2 of 21 tensors are rounded, fp32 to bf16: model.norm.weight, ..."."""
    parts = [f"{change}: {'all' if len(names) == count else grouped(names)}" for change, names in _by_value(found).items()]
    return f"{len(found)} of {count} tensors are rounded, {'; '.join(parts)}"


def _by_value(items: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Value -> names."""
    found: dict[Any, list[str]] = {}
    for name, value in items.items():
        found.setdefault(value, []).append(name)
    return found


def grouped(names: Iterable[str]) -> str:
    """Names of tensors in short, none left out: "model.layers.0-3.input_layernorm.weight, model.norm.weight"."""
    layers: dict[str, list[int]] = {}
    for name in names:
        match = _LAYER.search(name)
        layers.setdefault(_LAYER.sub(".{}.", name, count=1), []).extend([int(match.group(1))] if match else [])
    return ", ".join(name.format(_ranges(numbers)) if numbers else name for name, numbers in layers.items())


def _ranges(numbers: list[int]) -> str:
    """ "0-3,7" for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


class MasterReader:
    """A checkpoint of a run whose weights are, at some places, read from the optimizer's fp32 master copy of them.

    Args:
        places: key and place of the weights that are wanted in more precision than they were trained in.
    """

    def __init__(self, reader: MegatronReader, places: set[tuple[str, tuple[int, ...]]]) -> None:
        self._reader, self._places = reader, places

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, key: str, place: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        """Raises DataError where the master copy, rounded, is not the weight that training used."""
        weight = self._reader.read(key, place, rows)
        if (key, place) not in self._places:
            return weight
        master = self._reader.read(key_of("param", key), place, rows)
        if raw(master.to(weight.dtype)) != raw(weight):
            raise DataError(
                "the fp32 master copy of a weight, rounded, is not the weight.",
                where=f"{self._reader.directory}: {key}" + (f", layer {place[0]}" if place else ""),
                fix="use another checkpoint; --dtype bf16 exports the weights as they were trained",
            )
        return master


def with_masters(
    reader: MegatronReader, parameters: Iterable[Parameter], trained: Precisions, wanted: Mapping[str, torch.dtype]
) -> tuple[MegatronReader, Precisions]:
    """A run's checkpoint with the precision that its source had for some tensors, and what each tensor then has.

    Args:
        trained: precisions of the weights in the checkpoint.
        wanted: Hugging Face name -> precision in the source. What is no wider than the training was stays as trained, and
            what has no master copy in the checkpoint (--save_only_model true) does, too.
    """
    others, places, more = dict(trained.others), set(), wider(wanted, trained)
    for parameter in parameters:
        wide = {part.name: more[part.name] for part in parameter.hf if part.name in more}
        if wide and _has_master(reader, parameter.key):
            others |= wide
            places.add((parameter.key, parameter.place))
    if not places:
        return reader, trained
    return MasterReader(reader, places), Precisions(trained.main, others)


def wider(wanted: Mapping[str, torch.dtype], trained: Precisions) -> dict[str, torch.dtype]:
    """Those of some precisions that hold all that training's do, and more."""
    pairs = ((name, dtype, trained.of(name)) for name, dtype in wanted.items())
    return {name: dtype for name, dtype, own in pairs if dtype != own and torch.promote_types(dtype, own) == dtype}


def _has_master(reader: MegatronReader, key: str) -> bool:
    return key_of("param", key) in reader.keys and reader.shape(key_of("param", key)) == reader.shape(key)
