"""Adapters that begin as a part of the base: PiSSA and OLoRA. The first product is taken out of the base's weights in memory.

PiSSA (https://arxiv.org/abs/2404.02948): the largest singular values and vectors of a matrix, their roots in either half.
OLoRA (https://arxiv.org/abs/2406.01775): the first columns of Q and rows of R of its QR decomposition. Both as PEFT 0.21
makes them. What is found is kept as an adapter in PEFT's form beside the run: it says again what was taken out.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaswift.errors import DataError
from megaswift.models import parameters_of
from megaswift.models.adapters import LORA_A, LORA_B, PREFIX, Lora
from megaswift.store.files import write_small
from megaswift.store.manifest import quick_check, write_manifest
from megaswift.store.publish import publish, workspace
from megaswift.weights.convert.lora import WEIGHTS, load_adapter
from megaswift.weights.convert.model import read_hf
from megaswift.weights.hf.folder_reader import FolderReader
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.load_hf import is_hf_folder
from megaswift.weights.torch_dist.reader import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_STEPS = re.compile(r"pissa_niter_(\d+)")


def halves_of(weight: Tensor, lora: Lora, seed: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], fp32, of a matrix [out, in]; scale * B A is what is taken out of it.

    Args:
        seed: of the random vectors that the quick form of PiSSA begins from.
    """
    weight, rank, steps = weight.float(), lora.rank, _STEPS.fullmatch(lora.init)
    if lora.init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if steps is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, values, turned = torch.svd_lowrank(weight, rank, niter=int(steps.group(1)))
        right = turned.t()
    roots = (values / lora.scale).sqrt()
    return (roots[:, None] * right).contiguous(), (left * roots).contiguous()


def make_start(lora: Lora, config: PreTrainedConfig, weights: Path, seed: int, target: Path) -> None:
    """Write the first values of an adapter that begins as a part of the base.

    Args:
        weights: of the base, a Hugging Face folder or a Megatron checkpoint.
        target: the directory; it appears when it is whole. One that is there is kept.
    """
    from safetensors.torch import save

    if target.is_dir():
        return
    base = parameters_of(config)
    reader = FolderReader(config, HFCheckpoint.open(weights)) if is_hf_folder(weights) else Reader(weights)
    found: dict[str, Tensor] = {}
    for site in lora.sites(base):
        parts = read_hf(reader, site.base)
        for number in site.tensors:
            name = site.base.hf[number].in_model.removesuffix(".weight")
            a, b = halves_of(parts[number], lora, zlib.crc32(f"{seed} {name}".encode()))
            found |= {f"{PREFIX}{name}.{LORA_A}.weight": a, f"{PREFIX}{name}.{LORA_B}.weight": b}
        reader.release(site.base.key, site.base.place)
    content = save(found, metadata={"format": "pt"})
    with workspace(target, len(content)) as work:
        record = write_small(work.path / WEIGHTS, content)
        files = {WEIGHTS: {"size": record.size, "sha256": record.sha256}}
        write_manifest(work.path, {"kind": "initial adapter", "adapter": lora.record(), "files": files})
        publish(work.path, target)


def load_start(directory: Path) -> dict[str, Tensor]:
    """PEFT's name -> value of what `make_start` wrote. Raises DataError where it is damaged or not there."""
    problem = quick_check(directory) if directory.is_dir() else "it is not there"
    if problem is not None:
        raise DataError(
            f"the values that this run's adapter began from, and that its base lacks, cannot be read: {problem}.",
            where=str(directory),
            fix="bring the directory back; the adapter means nothing without it",
        )
    return load_adapter(directory)


def as_plain(lora: Lora, values: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> tuple[Lora, dict[str, Tensor]]:
    """The same as an adapter of twice the rank for the base as it was: B A - B0 A0 = [B, -B0] [A; A0].

    Args:
        values: PEFT's name -> value; those that are no halves stay.
        start: the values that it began from, under the same names.

    Returns the description, whose scale is the same, and the values.
    """
    made = dict(values)
    for name, first in start.items():
        first = first.to(values[name].dtype)
        joined = (values[name], first) if f".{LORA_A}." in name else (values[name], -first)
        made[name] = torch.cat(joined, 0 if f".{LORA_A}." in name else 1).contiguous()
    return replace(lora, rank=2 * lora.rank, alpha=lora.scale * 2 * lora.rank, rslora=False, init="true"), made


__all__ = ["as_plain", "halves_of", "load_start", "make_start"]
