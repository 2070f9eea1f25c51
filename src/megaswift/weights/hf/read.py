"""Read a Hugging Face checkpoint strictly and lazily: headers are checked at once, data stays in the mapped files.

Nothing is read twice, nothing is copied: `tensor` gives a view of the mapped file. A tensor that is missing, extra,
misshapen or of a foreign dtype is an error by name, never a random initial value.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError, UserError
from megaswift.models import families
from megaswift.store.files import forget_pages, read_in_background
from megaswift.weights.dtypes import WEIGHTS
from megaswift.weights.hf.folder import INDEX, read_config, side_files, weight_files, weight_map
from megaswift.weights.hf.header import TensorEntry, read_header
from megaswift.weights.hf.json_files import inside
from megaswift.weights.hf.mxfp4 import BLOCKS, SCALES, dequantised, is_mxfp4, seen
from megaswift.weights.hf.pickled import read_pickle
from megaswift.weights.hf.stacked_experts import apart

if TYPE_CHECKING:
    import torch

    from megaswift.models.parameters import HFTensor

_SHOWN = 10  # names in an error message
UNTIED = (
    "config.json says tie_word_embeddings false, or leaves it out: where the model's output layer is its embedding (nothing else is "
    "missing), that field may be what is wrong, and must be true; else fetch the model again"
)
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name, for example "BF16"."""
    from megaswift.weights.torch_dtypes import OF_HEADER

    return OF_HEADER[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    from megaswift.weights.torch_dtypes import HEADERS

    return HEADERS[dtype]


def tensor_table(path: Path, allow_pickle: bool = False) -> dict[str, TensorEntry]:
    """Every tensor of a model directory by name, after checking all headers against the index. Raises DataError."""
    table: dict[str, TensorEntry] = {}
    for file in weight_files(path, allow_pickle):
        read = read_pickle if file.suffix == ".bin" else read_header
        for entry in read(inside(path, file)):
            if entry.name in table:
                raise DataError(
                    f"tensor {entry.name!r} is in two files: {table[entry.name].file.name} and {file.name}.", where=str(path)
                )
            table[entry.name] = entry
    named = weight_map(path)
    if named is not None:
        _check_index(path, named, table)
    if not table:
        raise DataError("the weight files hold no tensor.", where=str(path))
    return table


def _check_index(path: Path, named: Mapping[str, str], table: Mapping[str, TensorEntry]) -> None:
    """The index and the headers must tell the same."""
    absent = [f"{name} (in {file})" for name, file in named.items() if name not in table]
    unlisted = [f"{name} (in {entry.file.name})" for name, entry in table.items() if name not in named]
    moved = [
        f"{name} (index: {file}, found in {table[name].file.name})"
        for name, file in named.items()
        if name in table and table[name].file.name != file
    ]
    parts = [
        _listing("named by the index but in no file", absent),
        _listing("in a file but not in the index", unlisted),
        _listing("in another file than the index says", moved),
    ]
    if any(parts):
        raise DataError(
            f"{INDEX} and the weight files disagree:{''.join(parts)}", where=str(path / INDEX), fix="fetch the model again"
        )


def _listing(title: str, names: list[str]) -> str:
    """A few names under a title, for an error message; empty for no names."""
    if not names:
        return ""
    more = f"\n    ... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"\n  {len(names)} {title}:\n    " + "\n    ".join(names[:_SHOWN]) + more


def nonfinite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds NaN or infinity. One pass, no copy, no memory (aminmax hands NaN on)."""
    import math

    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return False
    if tensor.element_size() == 1:  # torch cannot compare fp8
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)
    return not (math.isfinite(low.item()) and math.isfinite(high.item()))


@dataclass
class HFCheckpoint:
    """An open model directory. Make one with `HFCheckpoint.open`; safe to use from several threads."""

    path: Path
    config: dict[str, Any]
    table: dict[str, TensorEntry]
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, path: Path | str, allow_pickle: bool = False) -> HFCheckpoint:
        """Check config, index and every header of a model directory.

        Args:
            allow_pickle: take pytorch_model.bin files where there are no safetensors; only their tensors are read.

        Raises UserError for a directory without a sound config.json, DataError for damaged or contradicting files.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise UserError(f"model directory {str(directory)!r} {'is a file' if directory.exists() else 'does not exist'}.")
        config, table = read_config(directory), tensor_table(directory, allow_pickle)
        if is_mxfp4(config) and any(name.endswith(BLOCKS) for name in table):
            return Mxfp4Folder(directory, config, table)
        family = families().get(str(config.get("model_type")))
        if family is not None and family.stacked_experts:
            table = apart(table)
        return cls(directory, config, table)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self.table)

    @property
    def total_bytes(self) -> int:
        """Size of all tensor data in bytes."""
        return sum(entry.nbytes for entry in self.table.values())

    @property
    def largest_bytes(self) -> int:
        """Size of the largest tensor in bytes."""
        return max(entry.nbytes for entry in self.table.values())

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies. Raises DataError for a name that is not there."""
        if name not in self.table:
            raise DataError(f"tensor {name!r} is missing.", where=str(self.path))
        return self.table[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """torch dtype of a tensor."""
        return torch_dtype(self.entry(name).dtype)

    def file_of(self, name: str) -> Path:
        """The weight file that holds a tensor."""
        return self.entry(name).file

    @property
    def note(self) -> str | None:
        """What a user must know of how its weights are read; None: they are read as they are."""
        return None

    def side_files(self) -> list[Path]:
        """The files that travel with the model unchanged: config, tokenizer, chat template, licence."""
        return side_files(self.path)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as a view of the mapped file. Treat it as read-only (a write would stay in this process)."""
        import torch

        entry = self.entry(name)
        dtype = torch_dtype(entry.dtype)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        mapped = self._map(entry.file)
        count = entry.nbytes // dtype.itemsize
        if entry.start % dtype.itemsize:  # legal in the format, though no common writer does it
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.nbytes, offset=entry.start)
            return raw.clone().view(dtype).reshape(entry.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.start).reshape(entry.shape)

    def part(self, part: HFTensor) -> torch.Tensor:
        """The part of a tensor that a parameter is made of."""
        return part.of(self.tensor(part.name))

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, as a view; other rows are not read."""
        return self.tensor(name)[start:stop]

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor's data ahead, in the background."""
        entry = self.entry(name)
        read_in_background(entry.file, entry.start, entry.nbytes)

    def release(self, name: str) -> None:
        """Give back the memory through which a tensor was read. Views of it stay valid; they are read again when used."""
        entry = self.entry(name)
        if entry.nbytes:
            forget_pages(self._map(entry.file), entry.start, entry.stop)

    def nonfinite(self, names: Iterable[str] | None = None) -> list[str]:
        """Names of the tensors that hold NaN or infinity. Reads each once and releases it."""
        bad = []
        for name in self.names if names is None else names:
            if nonfinite(self.tensor(name)):
                bad.append(name)
            self.release(name)
        return bad

    def check_names(self, expected: Mapping[str, tuple[int, ...]], ignorable: Iterable[str] = ()) -> None:
        """Compare the tensors with what the model must have. Raises DataError listing every kind of difference.

        Args:
            expected: name -> shape, complete.
            ignorable: names (or patterns with *) of extra tensors that may be there, such as old rotary buffers.
        """
        patterns = tuple(ignorable)
        missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in self.table]
        extra = [name for name in self.table if name not in expected and not any(fnmatchcase(name, mark) for mark in patterns)]
        misshapen = [
            f"{name}: expected {list(shape)}, found {list(self.table[name].shape)}"
            for name, shape in expected.items()
            if name in self.table and self.table[name].shape != tuple(shape)
        ]
        foreign = [
            f"{name}: {self.table[name].dtype}"
            for name in expected
            if name in self.table and self.table[name].dtype not in WEIGHTS
        ]
        parts = [
            _listing("missing", missing),
            _listing("that this model does not have", extra),
            _listing("of another shape", misshapen),
            _listing(f"of a dtype that cannot be trained (known: {', '.join(WEIGHTS)})", foreign),
        ]
        if any(parts):
            fix = "fetch the model again; quantised models are not supported"
            if [name.split()[0] for name in missing] == ["lm_head.weight"]:
                fix = UNTIED
            elif "lm_head.weight" in self.table and missing and missing[0].startswith("model.embed_tokens.weight "):
                fix = (
                    "a tied model's one table must stand there as model.embed_tokens.weight: save it again with save_pretrained"
                )
            raise DataError(f"the tensors do not fit config.json:{''.join(parts)}", where=str(self.path), fix=fix)

    def _map(self, file: Path) -> mmap.mmap:
        """The mapping of a weight file, made at its first use."""
        with self._lock:
            if file not in self._maps:
                with file.open("rb") as handle:
                    # Copy on write: torch wants a writable buffer, and the file must never change. Without reserving
                    # memory for copies that are never made, else a file larger than the memory could not be mapped.
                    flags = mmap.MAP_PRIVATE | _NO_RESERVE
                    self._maps[file] = mmap.mmap(handle.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            return self._maps[file]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)


class Mxfp4Folder(HFCheckpoint):
    """A folder whose experts are in MXFP4, seen as if they were in bf16: dequantised when they are read, and not kept."""

    def __init__(self, path: Path, config: dict[str, Any], table: dict[str, TensorEntry]) -> None:
        super().__init__(path, config, seen(path, table))
        self._raw = HFCheckpoint(path, config, table, self._maps, self._lock)

    @property
    def note(self) -> str:
        return "the experts are in MXFP4: they are read as bf16, to the bit as transformers reads them, and written as bf16"

    def file_of(self, name: str) -> Path:
        """The weight file that holds a tensor; of one in MXFP4 its blocks."""
        return self._raw.file_of(self._stored(name)[0])

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor; of one in MXFP4 its values in bf16, made anew at each call."""
        names = self._stored(name)
        if len(names) == 1:
            return super().tensor(name)
        return dequantised(*map(self._raw.tensor, names)).transpose(-1, -2).contiguous()

    def part(self, part: HFTensor) -> torch.Tensor:
        """The part of a tensor that a parameter is made of; no other part is dequantised."""
        names = self._stored(part.name)
        if len(names) == 1 or part.index is None:
            return super().part(part)
        values = dequantised(*(self._raw.tensor(name)[part.index] for name in names))
        return values if part.transposed else values.transpose(-1, -2)

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor's data ahead, in the background."""
        for stored in self._stored(name):
            self._raw.prefetch(stored)

    def release(self, name: str) -> None:
        """Give back the memory through which a tensor was read."""
        for stored in self._stored(name):
            self._raw.release(stored)

    def _stored(self, name: str) -> list[str]:
        """Names of the tensors that one is stored as."""
        return [name + BLOCKS, name + SCALES] if name + BLOCKS in self._raw.table else [name]
