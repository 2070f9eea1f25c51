"""Which model was asked: hashes of a folder's weights, as stored and as asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megaswift.weights.hf.read import dtype_name, tensor_table, torch_dtype

if TYPE_CHECKING:
    import torch

    from megaswift.weights.hf.header import TensorEntry

_PIECE = 1 << 22  # bytes read at once; a multiple of every element's size


@dataclass(frozen=True)
class WeightsHashes:
    """SHA-256 of a folder's weights by name, precision, shape and bytes; how they are cut into files does not matter.

    Attributes:
        path: the folder.
        precision: the one in which all of its numbers are stored, as in file headers, for example "BF16"; None for a mixture.
        stored: as they stand in the files.
        asked: rounded to the precision that questions are asked in. fp32 weights and their conversion to bf16 are the same model
            there.
    """

    path: Path
    precision: str | None
    stored: str
    asked: str


def weights_hashes(path: Path, dtype: torch.dtype) -> WeightsHashes:
    """Read all weights of a folder once, in pieces of a few MiB."""
    stored, asked = hashlib.sha256(), hashlib.sha256()
    table = tensor_table(path)
    precisions = {entry.dtype for entry in table.values() if torch_dtype(entry.dtype).is_floating_point}
    for name in sorted(table):
        entry = table[name]
        own = torch_dtype(entry.dtype)
        other = dtype if own.is_floating_point and own != dtype else None
        files, rounded = _bytes_hashes(entry, own, other)
        stored.update(f"{name} {entry.dtype} {tuple(entry.shape)} {files}".encode())
        asked.update(f"{name} {dtype_name(other) if other else entry.dtype} {tuple(entry.shape)} {rounded}".encode())
    precision = precisions.pop() if len(precisions) == 1 else None
    return WeightsHashes(path, precision, stored.hexdigest(), asked.hexdigest())


def is_rounded(one: WeightsHashes, other: WeightsHashes) -> bool:
    """Whether the weights of `one` are those of `other`, rounded to the precision of `one`. Reads those of `other`."""
    if one.precision is None or one.precision == other.precision:
        return False
    return weights_hashes(other.path, torch_dtype(one.precision)).asked == one.stored


def _bytes_hashes(entry: TensorEntry, own: torch.dtype, other: torch.dtype | None) -> tuple[str, str]:
    """Hash of a tensor's bytes, and of its bytes in another precision (the same hash if there is none)."""
    import torch

    plain, rounded = hashlib.sha256(), hashlib.sha256()
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        left = entry.nbytes
        while left:
            piece = bytearray(file.read(min(left, _PIECE)))
            if not piece:
                break
            plain.update(piece)
            if other is not None:
                rounded.update(torch.frombuffer(piece, dtype=own).to(other).view(torch.uint8).numpy().data)
            left -= len(piece)
    return plain.hexdigest(), (plain if other is None else rounded).hexdigest()
