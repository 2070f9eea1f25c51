"""Weights into a torch_dist directory, tensor by tensor: from a Hugging Face folder, or from another Megatron checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.models import parameters_of
from megaswift.models.parameters import HFTensor, Parameter, Shape
from megaswift.weights.convert.model import FiniteCheck, MegatronReader, check_megatron, digest, raw, read_hf
from megaswift.weights.convert.precision import Precisions
from megaswift.weights.hf.config import check_source
from megaswift.weights.torch_dist import writer
from megaswift.weights.torch_dist.writer import Chunk

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.store.publish import Workspace
    from megaswift.weights.hf.read import HFCheckpoint

_CHUNK_BYTES = 256 << 20  # larger tensors are stored in blocks of rows, so that a rank reads only what it needs


@dataclass
class Conversion:
    """What a conversion did."""

    files: dict[str, writer.FileDigest] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)  # Hugging Face name -> SHA-256 of its values as written
    parameters: int = 0
    nonfinite: set[str] = field(default_factory=set)  # tensors with NaN or infinite values, where these were allowed


def hf_to_megatron(
    source: HFCheckpoint,
    config: PreTrainedConfig,
    directory: Path,
    precisions: Precisions,
    threads: int = 2,
    work: Workspace | None = None,
    allow_nonfinite: bool = False,
) -> Conversion:
    """Write the weights of a Hugging Face folder as a torch_dist checkpoint.

    Args:
        directory: empty, but for files that `work` knows as complete.
        precisions: of the Hugging Face tensors; values are cast to them on the way. Tensors that share a Megatron tensor
            (q, k and v; all layers of a stack) are stored in one that holds each of them exactly.
        allow_nonfinite: note tensors with NaN or infinite values in the result and go on.

    Raises DataError for a missing, extra or misshapen tensor, and for NaN or infinite weights.
    """
    check_source(source, config)
    parameters = parameters_of(config)
    finite = FiniteCheck(allow_nonfinite)
    result = Conversion(nonfinite=finite.found)
    cut = _FromFolder(source, precisions, precisions.stored(parameters), result.tensors, finite)
    groups = [(cut.position(parameter), cut.chunks(parameter)) for parameter in parameters]
    groups.sort(key=lambda group: group[0])  # reading follows the source files
    return _write(parameters, [chunk for _, group in groups for chunk in group], directory, threads, work, result)


def megatron_to_megatron(
    reader: MegatronReader,
    config: PreTrainedConfig,
    directory: Path,
    precisions: Precisions,
    threads: int = 2,
    work: Workspace | None = None,
    allow_nonfinite: bool = False,
) -> Conversion:
    """Write the weights of a Megatron checkpoint of any layout that has a reader as a torch_dist checkpoint."""
    parameters = parameters_of(config)
    check_megatron(reader, parameters)
    finite = FiniteCheck(allow_nonfinite)
    result = Conversion(nonfinite=finite.found)
    stored = precisions.stored(parameters)
    chunks = []
    for parameter in parameters:
        produce = partial(_reread, reader, parameter, precisions, result.tensors, finite)
        size = (*(1 for _ in parameter.place), *parameter.shape)
        dtype, labels = stored[parameter.key], tuple(parameter.labels)
        chunks.append(Chunk(parameter.key, parameter.global_shape, parameter.offset, size, dtype, produce, labels))
    return _write(parameters, chunks, directory, threads, work, result)


def _reread(
    reader: MegatronReader, parameter: Parameter, precisions: Precisions, notes: dict[str, str], finite: FiniteCheck
) -> Tensor:
    return _woven(parameter, read_hf(reader, parameter), precisions, notes, finite)


def _woven(
    parameter: Parameter, parts: list[Tensor], precisions: Precisions, notes: dict[str, str], finite: FiniteCheck
) -> Tensor:
    """The Megatron tensor of a parameter's Hugging Face tensors, each judged and hashed in its own precision."""
    names = [part.name for part in parameter.hf]
    parts = [part.to(precisions.of(name)) for name, part in zip(names, parts)]
    for label, part in zip(parameter.labels, parts):
        finite(label, part)
        notes[label] = digest(part)
    wide = precisions.widest(names)
    return parameter.arrangement.pack([part.to(wide) for part in parts])


def _write(
    parameters: list[Parameter], chunks: list[Chunk], directory: Path, threads: int, work: Workspace | None, result: Conversion
) -> Conversion:
    objects = [name for parameter in parameters for name in _extra_states(parameter)]
    common = {"iteration": 0, "checkpoint_version": 3.0, "num_floating_point_operations_so_far": 0}
    result.files = writer.write(directory, chunks, objects, common, threads, work=work, notes=result.tensors)
    result.parameters = sum(parameter.size for parameter in parameters)
    return result


@dataclass
class _FromFolder:
    """Cuts the tensors of a Hugging Face folder into chunks of a Megatron checkpoint."""

    source: HFCheckpoint
    precisions: Precisions
    stored: dict[str, torch.dtype]
    notes: dict[str, str]
    finite: FiniteCheck

    def position(self, parameter: Parameter) -> tuple[str, int]:
        """Where the first of a parameter's tensors lies."""
        entry = self.source.entry(parameter.hf[0].name)
        return entry.file.name, entry.start

    def chunks(self, parameter: Parameter) -> list[Chunk]:
        """Parts that stand one above the other as they are, what must be woven together in one piece."""
        runs = [parameter.arrangement.run(number) for number in range(len(parameter.hf))]
        firsts = [run[0] for run in runs if run is not None]
        if len(parameter.shape) == 2 and len(firsts) == len(runs):
            return [chunk for part, first in zip(parameter.hf, firsts) for chunk in self._blocks(parameter, part, first)]
        return [
            self._chunk(parameter, (0,) * len(parameter.shape), parameter.shape, parameter.hf, partial(self._packed, parameter))
        ]

    def _packed(self, parameter: Parameter) -> Tensor:
        parts = [self.source.part(part) for part in parameter.hf]
        return _woven(parameter, parts, self.precisions, self.notes, self.finite)

    def _blocks(self, parameter: Parameter, part: HFTensor, first_row: int) -> list[Chunk]:
        """A tensor that is copied, in blocks of rows; its digest is complete with the last block."""
        count, columns = part.shape
        dtype = self.precisions.of(part.name)
        rows = max(1, _CHUNK_BYTES // (columns * self.stored[parameter.key].itemsize))
        running: Any = hashlib.sha256()

        def produce(start: int, stop: int) -> Tensor:
            block = self.source.part(part)[start:stop].to(dtype).contiguous()
            self.finite(part.label, block)
            running.update(raw(block))
            if stop == count:
                self.notes[part.label] = running.hexdigest()
            return block

        made = []
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            offset, shape = (first_row + start, 0), (stop - start, columns)
            made.append(self._chunk(parameter, offset, shape, (part,), partial(produce, start, stop), stop == count))
        return made

    def _chunk(
        self, parameter: Parameter, offset: Shape, shape: Shape, parts: tuple[HFTensor, ...], produce: Callable[[], Tensor],
        last: bool = True,
    ) -> Chunk:  # fmt: skip
        names = [part.name for part in parts]

        def prepare() -> None:
            for name in names:
                self.source.prefetch(name)

        def release() -> None:
            for name in names if last else ():
                self.source.release(name)

        key, place, size = parameter.key, (*parameter.place, *offset), (*(1 for _ in parameter.place), *shape)
        labels = tuple(part.label for part in parts)
        return Chunk(key, parameter.global_shape, place, size, self.stored[key], produce, labels, prepare, release)


def _extra_states(parameter: Parameter) -> list[str]:
    """Names of the empty byte items that Megatron-Core keeps beside each linear layer's weight; routers and experts have none here."""
    if not parameter.key.endswith(".weight") or len(parameter.shape) != 2 or parameter.key.startswith("embedding."):
        return []
    if parameter.key.endswith(".router.weight") or ".experts.experts." in parameter.key:
        return []
    base = parameter.key.removesuffix("weight")
    shard = f"{parameter.place[0]}_{parameter.counts[0]}" if parameter.place else "0_1"
    return [f"{base}_extra_state/shard_{shard}"]
