"""Plan safetensors shards and write one of them: header first, then tensor by tensor, hashed while it streams.

A shard's bytes depend on its plan alone, so an interrupted conversion can keep the shards that are complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.store.files import FileRecord, HashedFile, reading_ahead
from megaswift.weights.hf.folder import WEIGHTS
from megaswift.weights.hf.read import dtype_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written, known by size before its data exists.

    Args:
        name: Hugging Face name.
        dtype: dtype in the file.
        shape: shape in the file.
        produce: makes the tensor when its turn comes; must return this dtype and shape, on any device.
        prepare: called some tensors ahead, for example to start reading the source.
        release: called once the tensor is written, for example to give back mapped pages.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], torch.Tensor]
    prepare: Callable[[], None] | None = None
    release: Callable[[], None] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One weight file: its name, its tensors in file order, and its ready header."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class ShardResult:
    """What was written: the file, and the SHA-256 of each tensor's bytes by name."""

    record: FileRecord
    tensors: dict[str, str]


DEFAULT_SHARD_SIZE = 5 * 10**9  # bytes


def plan_shards(tensors: Iterable[PlannedTensor], max_shard_size: int, stem: str = Path(WEIGHTS).stem) -> list[Shard]:
    """Cut the tensors, in the order given, into files of at most `max_shard_size` bytes of data.

    A tensor that is larger has a file of its own. File names follow the hub's habit: model.safetensors, or
    model-00001-of-0000N.safetensors; `stem` stands in the place of "model". Raises ValueError for a name that comes twice and for no tensors.
    """
    groups: list[list[PlannedTensor]] = []
    seen: set[str] = set()
    filled = 0
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"tensor {tensor.name!r} is planned twice")
        seen.add(tensor.name)
        if not groups or filled + tensor.nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if not groups:
        raise ValueError("no tensors to write")
    count = len(groups)
    several = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    files = [f"{stem}.safetensors"] if count == 1 else several
    return [_shard(file, group) for file, group in zip(files, groups)]


def _shard(file: str, group: Sequence[PlannedTensor]) -> Shard:
    """Order the tensors so that each is aligned to its item size, and make the header."""
    ordered = sorted(group, key=lambda tensor: -tensor.dtype.itemsize)  # stable: the order given is kept within a dtype
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        offsets = [position, position + tensor.nbytes]
        entries[tensor.name] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return Shard(file, tuple(ordered), len(text).to_bytes(8, "little") + text)


def write_shard(
    shard: Shard,
    path: Path,
    *,
    cancel: threading.Event | None = None,
    progress: Callable[[int], None] | None = None,
    turn: AbstractContextManager[Any] | None = None,
) -> ShardResult:
    """Write one shard to `path`, which must not exist, and fsync it.

    Holds one tensor at a time. Args: `cancel` stops it between chunks (raises Cancelled); `progress` is called with the
    number of bytes of each chunk; `turn` is held while data is made and written, not while the disk is waited for, so that
    another shard can go on meanwhile. Raises OSError from the disk, ValueError where `produce` breaks its promise.
    """
    with HashedFile(path, cancel, progress, expected=shard.nbytes) as output:
        hashes: dict[str, str] = {}
        with turn or nullcontext():
            output.write(shard.header)
            for tensor in reading_ahead(shard.tensors):
                own = hashlib.sha256()
                output.write(_bytes(tensor, tensor.produce()), also=own)
                hashes[tensor.name] = own.hexdigest()
                if tensor.release is not None:
                    tensor.release()
        return ShardResult(output.finish(), hashes)


def _bytes(planned: PlannedTensor, tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy where it is contiguous on the CPU."""
    import torch

    if tensor.dtype != planned.dtype or tuple(tensor.shape) != tuple(planned.shape):
        raise ValueError(
            f"tensor {planned.name!r} was planned as {planned.dtype} {list(planned.shape)}, "
            f"but came as {tensor.dtype} {list(tensor.shape)}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
