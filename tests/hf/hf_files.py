"""Model directories for the tests of megaswift.weights.hf: sound ones, and files with any fault that a test asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16, "torch_dtype": "float32"}


def raw_shard(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of exactly this header and data, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def f32(start: int, stop: int, shape: Any = None) -> dict[str, Any]:
    """A header entry of fp32 data between two offsets."""
    return {"dtype": "F32", "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def make_folder(
    path: Path,
    files: dict[str, dict[str, torch.Tensor]] | None = None,
    index: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """A model directory from {file name: {tensor name: tensor}}; more than one file, or `index`, gives an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if files is None:
        files = {"model.safetensors": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}}
    for name, tensors in files.items():
        save_file(tensors, path / name, metadata={"format": "pt"})
    if index is None and len(files) > 1:
        index = {tensor: name for name, tensors in files.items() for tensor in tensors}
    if index is not None:
        write_index(path, index)
    return path


def write_index(path: Path, index: Any) -> None:
    """An index file with this weight_map."""
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def two_shards(path: Path) -> Path:
    """A sound model directory in two shards: a and b in the first, c in the second."""
    first = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
    return make_folder(
        path, {f"model-0000{n}-of-00002.safetensors": part for n, part in ((1, first), (2, {"c": torch.zeros(2, 2)}))}
    )
