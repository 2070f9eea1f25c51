"""Reading of torch_dist files that runs no code from them.

The format keeps its index (`.metadata`) as a pickle and small objects as pickles inside the data files; PyTorch reads
both without restriction. Here the index may only name the classes it is made of, and objects are read with
`weights_only=True`.
"""

from __future__ import annotations

import importlib
import io
import pickle
import re
from pathlib import Path
from typing import Any

from megaswift.errors import DataError
from megaswift.weights.dtypes import NAMES
from megaswift.weights.hf.unpickle import GuardedUnpickler
from megaswift.weights.torch_dist.zipped import Placeholder

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}
# Megatron-Core keeps the plan of a save beside the table, for its next save; nobody who reads needs it.
_INERT = ("torch.distributed.checkpoint.planner", "megatron.core.dist_checkpointing.strategies.torch")


class _IndexUnpickler(GuardedUnpickler):
    def known(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and name in NAMES):
            return getattr(importlib.import_module(module), name)
        if module in _INERT:
            return Placeholder
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which no checkpoint index needs")


def load_index(path: Path) -> Any:
    """The `.metadata` object of a torch_dist directory. Raises DataError for anything but a plain index."""
    try:
        index = _IndexUnpickler(path.read_bytes()).load()
    except FileNotFoundError as error:
        raise DataError(
            "the checkpoint has no .metadata file.", where=str(path), fix="it is incomplete; use another one"
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"the checkpoint index is damaged or not safe to read: {error}", where=str(path), fix="use another checkpoint"
        ) from error
    if not hasattr(index, "state_dict_metadata") or not hasattr(index, "storage_data"):
        raise DataError("the checkpoint index has no table of tensors.", where=str(path), fix="use another checkpoint")
    for item in index.storage_data.values():
        name = getattr(item, "relative_path", None)
        if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise DataError(
                f"the index names the file {name!r}, which is not inside the checkpoint.",
                where=str(path),
                fix="use another checkpoint",
            )
    return index


def load_object(data: bytes, where: str) -> Any:
    """An object saved inside a data file, read without running code."""
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # torch's own text advises to switch the guard off
        what = f"it names {named.group(1)}" if named else type(error).__name__
        raise DataError(
            f"an object in the checkpoint is damaged or not safe to read: {what}.", where=where, fix="use another checkpoint"
        ) from error
