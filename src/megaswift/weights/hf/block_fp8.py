"""Weights that a Hugging Face folder holds in FP8 with one scale for each block (DeepSeek V3, MiniMax M2), read as bf16.

A value is its FP8 number times the scale of its block, in fp32, rounded to bf16 then: what transformers makes of such a folder
where it computes in bf16. Blocks are cut at a matrix's last rows and columns.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError, UserError
from megaswift.weights.hf.mxfp4 import is_mxfp4
from megaswift.weights.hf.read import HFCheckpoint

if TYPE_CHECKING:
    import torch

SCALE = "_scale_inv"  # what stands behind a weight's name in the name of its scales
FIELD = "quantization_config"
_FORMATS = ("e4m3", "float8_e4m3fn")  # names of one format


def blocks_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, of a config.json that says its weights are in FP8 this way; None for any other."""
    told = config.get(FIELD)
    if not isinstance(told, Mapping) or told.get("quant_method") != "fp8" or told.get("fmt", "e4m3") not in _FORMATS:
        return None
    size = told.get("weight_block_size")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return None
    return (size[0], size[1]) if told.get("activation_scheme", "dynamic") == "dynamic" else None


class BlockFp8Folder(HFCheckpoint):
    """A folder of FP8 weights as if it held them in bf16; their scales are no tensors of it.

    Args:
        original: the folder as it is.
        blocks: rows and columns of a block.

    Raises DataError for scales that do not fit their weight.
    """

    def __init__(self, original: HFCheckpoint, blocks: tuple[int, int]) -> None:
        self.original, self.blocks = original, blocks
        self._made: dict[str, torch.Tensor] = {}
        self._making = threading.Lock()
        self.scaled = {
            name for name, entry in original.table.items() if entry.dtype == "F8_E4M3" and name + SCALE in original.table
        }
        for name in self.scaled:
            self._require_fitting(name)
        table = {
            name: replace(entry, dtype="BF16") if name in self.scaled else entry
            for name, entry in original.table.items()
            if not (name.endswith(SCALE) and name.removesuffix(SCALE) in self.scaled)
        }
        super().__init__(original.path, {**original.config, FIELD: None}, table)

    def _require_fitting(self, name: str) -> None:
        weight, scale = self.original.entry(name), self.original.entry(name + SCALE)
        wanted = tuple(math.ceil(side / block) for side, block in zip(weight.shape, self.blocks))
        if len(weight.shape) != 2 or scale.shape != wanted or scale.dtype != "F32":
            raise DataError(
                f"{scale.name}: {list(scale.shape)} {scale.dtype} are no fp32 scales of blocks of {list(self.blocks)} of {list(weight.shape)}.",
                where=str(self.original.path),
                fix=f"fetch the model again, or its {FIELD} in config.json",
            )

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor; one in FP8 is made at its first use and kept until it is released."""
        if name not in self.scaled:
            return self.original.tensor(name)
        with self._making:
            if name not in self._made:
                self._made[name] = from_blocks(self.original.tensor(name), self.original.tensor(name + SCALE), self.blocks)
            return self._made[name]

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor's data ahead, in the background."""
        self.original.prefetch(name)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor."""
        with self._making:
            self._made.pop(name, None)
        self.original.release(name)

    @property
    def note(self) -> str:
        """What a user must know."""
        return (
            f"{len(self.scaled)} weights are FP8 with a scale for each block of {self.blocks[0]} x {self.blocks[1]}: they are read as bf16, "
            "and whatever is made of them is bf16, twice as large."
        )


def from_blocks(weight: torch.Tensor, scales: torch.Tensor, blocks: tuple[int, int]) -> torch.Tensor:
    """FP8 [n, k] and fp32 scales [n / rows, k / columns], rounded up, to bf16 [n, k]."""
    import torch

    rows, columns = blocks
    wide = weight.to(torch.float32)
    for number, scale in enumerate(scales):
        wide[number * rows : (number + 1) * rows] *= scale.repeat_interleave(columns)[: wide.shape[1]]
    return wide.to(torch.bfloat16)


def opened(source: HFCheckpoint) -> HFCheckpoint:
    """A folder, read as bf16 where its weights are in FP8. Raises UserError for any other quantisation."""
    if source.config.get(FIELD) is None or is_mxfp4(source.config):  # MXFP4 is read as bf16 already
        return source
    return BlockFp8Folder(source, required_blocks(source.config, str(source.path / "config.json")))


def required_blocks(config: Mapping[str, Any], where: str) -> tuple[int, int]:
    """As `blocks_of`. Raises UserError for weights that are quantised in another way."""
    blocks = blocks_of(config)
    if blocks is None:
        raise UserError(
            "the weights are quantized, and not in FP8 with fp32 scales of blocks, which would be read.",
            where=f"{where}: {FIELD}",
            fix="give the model in bf16, fp16 or fp32",
        )
    return blocks


__all__ = ["FIELD", "BlockFp8Folder", "blocks_of", "from_blocks", "opened", "required_blocks"]
