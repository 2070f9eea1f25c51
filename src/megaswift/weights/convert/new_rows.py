"""Weights seen with rows for new tokens, and the check that the old rows are what they were."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.errors import DataError
from megaswift.models import parameters_of
from megaswift.models.parameters import HFTensor, Parameter
from megaswift.weights.convert.model import MegatronReader, raw
from megaswift.weights.convert.precision import Precisions
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.load_new_rows import mean_row

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def tables_of(config: PreTrainedConfig) -> list[Parameter]:
    """A model's tables with a row for each token: the embedding, and the output layer where it is its own."""
    return [parameter for parameter in parameters_of(config) if parameter.padded]


class GrownFolder(HFCheckpoint):
    """A Hugging Face folder whose tables have more rows than are stored: each new one is the mean of the old.

    Args:
        original: the folder as it is.
        rows_before, rows_after: rows that are stored, and rows that are seen.
    """

    def __init__(self, original: HFCheckpoint, rows_before: int, rows_after: int) -> None:
        self.original, self.rows_before, self.rows_after = original, rows_before, rows_after
        self._grown: dict[str, Tensor] = {}
        self._growing = threading.Lock()
        names = ("model.embed_tokens.weight", "lm_head.weight")  # a tied model may hold a copy of the table
        table = {
            name: replace(entry, shape=(rows_after, *entry.shape[1:]))
            if name in names and entry.shape[:1] == (rows_before,)
            else entry
            for name, entry in original.table.items()
        }
        super().__init__(original.path, original.config | {"vocab_size": rows_after}, table)

    def tensor(self, name: str) -> Tensor:
        """A tensor; one that grows is made at its first use and kept until it is released."""
        if name not in self.table or self.entry(name).shape == self.original.entry(name).shape:
            return self.original.tensor(name)
        with self._growing:
            if name not in self._grown:
                self._grown[name] = _grown(self.original.tensor(name), self.rows_after)
            return self._grown[name]

    def part(self, part: HFTensor) -> Tensor:
        """The part of a tensor that a parameter is made of."""
        return super().part(part) if part.index is None else self.original.part(part)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor."""
        with self._growing:
            self._grown.pop(name, None)
        self.original.release(name)


class GrownReader:
    """Megatron weights whose tables have more rows than are stored; see GrownFolder."""

    def __init__(self, original: Any, config: PreTrainedConfig, rows_before: int, rows_after: int) -> None:
        self._original, self._rows = original, (rows_before, rows_after)
        self._keys = {parameter.key for parameter in tables_of(config)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, with the new rows."""
        shape = self._original.shape(key)
        return (self._rows[1], *shape[1:]) if key in self._keys else shape

    def read(self, key: str, place: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, with the new rows; vocabulary padding that is stored is left out."""
        if key not in self._keys:
            return self._original.read(key, place, rows)
        value = _grown(self._original.read(key, place)[: self._rows[0]], self._rows[1])
        return value if rows is None else value[slice(*rows)]


def _grown(old: Tensor, rows: int) -> Tensor:
    mean = mean_row(lambda first, last: old[first:last], len(old))
    return torch.cat([old, mean.expand(rows - len(old), -1)])


def require_old_rows(
    written: MegatronReader, source: Any, config: PreTrainedConfig, precisions: Precisions, rows_before: int
) -> None:
    """Raise DataError unless the old rows of every table are in the new checkpoint as they were, bit for bit.

    Args:
        written: the new checkpoint.
        source: the folder or the Megatron weights without new rows.
        precisions: of the new checkpoint, to which old values are rounded.
    """
    for parameter in tables_of(config):
        name = parameter.hf[0].name
        if isinstance(source, HFCheckpoint):
            old = source.tensor(name)
        else:
            old = source.read(parameter.key, rows=(0, rows_before))
        new = written.read(parameter.key, rows=(0, rows_before))
        if raw(old.to(precisions.of(name))) != raw(new):
            raise DataError(
                "a row of an old token is not the one in the source.",
                where=name,
                fix="convert again; if it stays, report it",
            )
