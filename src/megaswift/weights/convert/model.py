"""A model's tensors in a Megatron checkpoint: how they are read, checked and hashed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megaswift.errors import DataError
from megaswift.models.family import OUTPUT_LAYER
from megaswift.models.parameters import Parameter, by_key
from megaswift.weights.hf.read import UNTIED, nonfinite

_OPTIMIZER = "optimizer."
TIED = "the weights have an output layer of their own: tie_word_embeddings in config.json must be false"


class MegatronReader(Protocol):
    """Weights in Megatron's layout by key (reader.Reader, classic.ClassicReader).

    `place` is where a tensor lies on the leading axes (layer, expert) of what is stored under its key.
    """

    @property
    def directory(self) -> Path: ...

    @property
    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str, place: tuple[int, ...] = ()) -> torch.dtype: ...

    def read(self, key: str, place: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor: ...

    def prefetch(self, key: str, place: tuple[int, ...] = ()) -> None: ...

    def release(self, key: str, place: tuple[int, ...] = ()) -> None: ...


def read_hf(reader: MegatronReader, parameter: Parameter) -> list[Tensor]:
    """The Hugging Face tensors of a parameter, from a Megatron checkpoint."""
    runs = [parameter.arrangement.run(number) for number in range(len(parameter.hf))]
    if len(runs) > 1 and all(runs):  # each is read where it lies
        return [reader.read(parameter.key, parameter.place, run) for run in runs]
    return parameter.arrangement.unpack(reader.read(parameter.key, parameter.place))


def read_part(reader: MegatronReader, parameter: Parameter, number: int) -> Tensor | None:
    """One of the Hugging Face tensors of a parameter, where it can be read without the others; else None."""
    run = parameter.arrangement.run(number)
    return None if run is None else reader.read(parameter.key, parameter.place, run)


def check_megatron(reader: MegatronReader, parameters: list[Parameter]) -> None:
    """Raise DataError unless the checkpoint holds exactly a model's tensors, vocabulary padding allowed."""
    wanted = by_key(parameters)
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
    for key, parameter in wanted.items():
        shape, expected = reader.shape(key), parameter.global_shape
        padded = parameter.padded and shape[0] >= expected[0] and shape[1:] == expected[1:]
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
