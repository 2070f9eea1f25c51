"""Reading Megatron-Core's torch_dist directories tensor by tensor, or box by box: no model, no process group, no GPU."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megaswift.errors import DataError
from megaswift.weights.torch_dist import zipped
from megaswift.weights.torch_dist.guard import load_index
from megaswift.weights.torch_dist.writer import FORMAT_FILE, INDEX_FILE

_HEADER = 4096  # bytes, about what stands in a chunk's archive before its values


class Reader:
    """A torch_dist directory, read key by key; tensors are views of the mapped files where they lie in one piece.

    Raises DataError for what is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            found = json.loads((directory / FORMAT_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError("this is no torch_dist checkpoint: metadata.json is missing.", where=str(directory)) from error
        except (ValueError, RecursionError) as error:
            raise DataError("metadata.json is not JSON.", where=str(directory / FORMAT_FILE)) from error
        if not isinstance(found, dict) or found.get("sharded_backend") != "torch_dist":
            raise DataError("the checkpoint's format is not torch_dist.", where=str(directory / FORMAT_FILE))
        index = load_index(directory / INDEX_FILE)
        self._tensors = {key: value for key, value in index.state_dict_metadata.items() if hasattr(value, "chunks")}
        self._storage = index.storage_data
        self._maps: dict[str, zipped.Mapped] = {}
        self._lock = threading.Lock()
        self._placed: dict[str, tuple[int, dict[tuple[int, ...], list[Any]]]] = {}

    @property
    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entry(key).size)

    def dtype(self, key: str, place: tuple[int, ...] = ()) -> torch.dtype:
        """The precision of a tensor; all its layers have the same one."""
        return self._entry(key).properties.dtype

    def read(self, key: str, place: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        """A whole global tensor, with `place` what lies there on the leading axes, with `rows` some rows of that."""
        offset, shape = self._box(key, place, rows)
        return self.read_box(key, offset, shape).reshape(shape[len(place) :])

    def prefetch(self, key: str, place: tuple[int, ...] = ()) -> None:
        """Ask the system to read a tensor in the background."""
        self.prefetch_box(key, *self._box(key, place))

    def release(self, key: str, place: tuple[int, ...] = ()) -> None:
        """Give back the memory through which a tensor was read."""
        self.release_box(key, *self._box(key, place))

    def _box(
        self, key: str, place: tuple[int, ...], rows: tuple[int, int] | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and shape of a whole tensor, or of what lies at a place, or of rows of it."""
        shape = self.shape(key)[len(place) :]
        offset = (0,) * len(shape)
        if shape and rows is not None:
            offset, shape = (rows[0], *offset[1:]), (rows[1] - rows[0], *shape[1:])
        return (*place, *offset), (*(1,) * len(place), *shape)

    def read_box(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A box of a global tensor: a view of the mapped file where one chunk holds it, put together where several do."""
        result: Tensor | None = None
        covered = 0
        for chunk, begin, end in self._overlapping(key, offset, shape):
            part = self._read_chunk(key, chunk)
            part = part[tuple(slice(a - c, b - c) for a, b, c in zip(begin, end, chunk.offsets))]
            if tuple(part.shape) == shape:
                return part
            if result is None:
                result = torch.empty(shape, dtype=part.dtype)
            result[tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offset))] = part
            covered += part.numel()
            del part
            path, start, length = self._extent(key, chunk, begin, end)
            self._mapped(path).release(start, length)  # it was copied
        if result is None or covered != result.numel():
            raise DataError(
                "chunks do not cover the tensor.", where=f"{self.directory}: {key}", fix="the checkpoint is incomplete"
            )
        return result

    def prefetch_box(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Ask the system to read a box in the background."""
        for chunk, begin, end in self._overlapping(key, offset, shape):
            path, start, length = self._extent(key, chunk, begin, end)
            self._mapped(path).prefetch(start, length)

    def release_box(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Give back the memory through which a box was read."""
        for chunk, begin, end in self._overlapping(key, offset, shape):
            path, start, length = self._extent(key, chunk, begin, end)
            self._mapped(path).release(start, length)

    def _overlapping(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> Iterator[tuple[Any, list[int], list[int]]]:
        """Chunks that hold values of a box, with the first and last global indices of what both have, axis by axis."""
        stop = [start + count for start, count in zip(offset, shape)]
        for chunk in self._near(key, offset, shape):
            if offset and not (chunk.offsets[0] < stop[0] and offset[0] < chunk.offsets[0] + chunk.sizes[0]):
                continue  # most chunks of stacked layers end here
            begin = [max(a, c) for a, c in zip(offset, chunk.offsets)]
            end = [min(b, c + n) for b, c, n in zip(stop, chunk.offsets, chunk.sizes)]
            if all(a < b for a, b in zip(begin, end)):
                yield chunk, begin, end

    def _near(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> list[Any]:
        """Chunks among which those of a box are: of its layer, and expert, alone where each chunk is of one."""
        chunks: list[Any] = self._entry(key).chunks
        if key not in self._placed:
            axes = next((n for n in (2, 1) if len(self.shape(key)) > n and all(set(c.sizes[:n]) == {1} for c in chunks)), 0)
            found: dict[tuple[int, ...], list[Any]] = {}
            for chunk in chunks:
                found.setdefault(tuple(chunk.offsets[:axes]), []).append(chunk)
            self._placed[key] = axes, found
        axes, found = self._placed[key]
        if axes and set(shape[:axes]) == {1}:
            return found.get(tuple(offset[:axes]), [])
        return chunks

    def _extent(self, key: str, chunk: Any, begin: list[int], end: list[int]) -> tuple[Path, int, int]:
        """Which bytes of which file hold a part of a chunk, from its first value to its last; roughly, for the system's sake."""
        path, start, length = self._place(key, chunk)
        first = last = 0
        for a, b, c, n in zip(begin, end, chunk.offsets, chunk.sizes):
            first, last = first * n + a - c, last * n + b - 1 - c
        width = self.dtype(key).itemsize
        first, last = min(first * width, length), min((last + 1) * width + _HEADER, length)
        return path, start + first, last - first

    def _entry(self, key: str) -> Any:
        if key not in self._tensors:
            raise DataError(
                f"the checkpoint has no tensor {key}.",
                where=str(self.directory),
                fix="it was made for another model, or it is incomplete",
            )
        return self._tensors[key]

    def _place(self, key: str, chunk: Any) -> tuple[Path, int, int]:
        info = self._storage.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise DataError("a chunk of the tensor is not stored.", where=f"{self.directory}: {key} at {tuple(chunk.offsets)}")
        return inside(self.directory, info.relative_path), int(info.offset), int(info.length)

    def _mapped(self, path: Path) -> zipped.Mapped:
        with self._lock:
            if path.name not in self._maps:
                try:
                    self._maps[path.name] = zipped.Mapped(path)
                except OSError as error:
                    raise DataError(f"cannot read a data file: {error.strerror}.", where=str(path)) from error
            return self._maps[path.name]

    def _read_chunk(self, key: str, chunk: Any) -> Tensor:
        path, start, length = self._place(key, chunk)
        value = zipped.load(self._mapped(path), start, length, f"{path}: {key}")
        if not isinstance(value, Tensor) or tuple(value.shape) != tuple(chunk.sizes):
            raise DataError("a stored chunk has another shape than the index says.", where=f"{path}: {key}")
        return value


def inside(directory: Path, name: str) -> Path:
    """The path of a file that an index names. Raises DataError for a name that leads out of the directory."""
    if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise DataError(f"the index names the file {name!r}, which is not inside the checkpoint.", where=str(directory))
    return directory / name


def key_of(state: str, weight: str) -> str:
    """Megatron-Core's name for the state of a weight."""
    return f"optimizer.state.{state}.{weight}"
