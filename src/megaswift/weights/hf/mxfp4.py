"""MXFP4, in which gpt-oss is published: a folder's blocks and scales seen as tensors in bf16, with the values of transformers' dequantisation.

A tensor X [e, in, out] stands there as X_blocks, uint8 [e, out, in / 32, 16], two values of four bits in each byte, the lower half
first, and X_scales, uint8 [e, out, in / 32], exponents of two from -127 on (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError
from megaswift.weights.hf.header import TensorEntry

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

QUANTIZED = "quantization_config"
BLOCKS, SCALES = "_blocks", "_scales"
# The sixteen values of E2M1, by their four bits.
_VALUES = tuple(sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that weights are in MXFP4."""
    how = config.get(QUANTIZED)
    return isinstance(how, dict) and how.get("quant_method") == "mxfp4"


def seen(path: Path, table: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a folder with one in bf16 in place of each pair of blocks and scales.

    Raises DataError for blocks without scales, and for shapes that do not fit each other.
    """
    found: dict[str, TensorEntry] = {}
    for name, entry in table.items():
        plain = name.removesuffix(BLOCKS)
        if plain == name:
            if not (name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in table):
                found[name] = entry
            continue
        scales = table.get(plain + SCALES)
        if scales is None or entry.shape[:-1] != scales.shape or {entry.dtype, scales.dtype} != {"U8"} or len(entry.shape) < 3:
            raise DataError(
                f"{name} and {plain + SCALES} are not blocks and scales of one tensor in MXFP4.",
                where=str(path),
                fix="fetch the model again",
            )
        *lead, rows, groups, half = entry.shape
        shape = (*lead, groups * half * 2, rows)
        found[plain] = replace(entry, name=plain, dtype="BF16", shape=shape, start=0, stop=4 * entry.nbytes)
    return found


def dequantised(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [..., out, groups, 16] and [..., out, groups] to bf16 [..., out, groups * 32]."""
    import torch

    table = torch.tensor(_VALUES, dtype=torch.bfloat16)
    values = torch.stack((table[(blocks & 0x0F).int()], table[(blocks >> 4).int()]), dim=-1).flatten(-2)
    return torch.ldexp(values, (scales.int() - 127).unsqueeze(-1)).to(torch.bfloat16).flatten(-2)


__all__ = ["BLOCKS", "QUANTIZED", "SCALES", "dequantised", "is_mxfp4", "seen"]
