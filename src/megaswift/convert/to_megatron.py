"""Weights into a torch_dist directory, tensor by tensor: from a Hugging Face folder, or from another Megatron checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.checkpoint import torch_dist
from megaswift.checkpoint.torch_dist import Chunk
from megaswift.convert.model import FiniteCheck, MegatronReader, Model, check_megatron, checkpoint_key, digest, raw
from megaswift.convert.precision import Precisions
from megaswift.families.rules import Copy, GateUp, Rule
from megaswift.hf.names import check_source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.hf.publish import Workspace
    from megaswift.hf.read import HFCheckpoint

_CHUNK_BYTES = 256 << 20  # larger tensors are stored in blocks of rows, so that a rank reads only what it needs


@dataclass
class Conversion:
    """What a conversion did."""

    files: dict[str, torch_dist.FileDigest] = field(default_factory=dict)
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
    model = Model(config)
    finite = FiniteCheck(allow_nonfinite)
    result = Conversion(nonfinite=finite.found)
    cut = _FromFolder(source, model, precisions, precisions.stored(model), result.tensors, finite)
    groups = [(cut.position(rule, layer), cut.chunks(rule, layer)) for rule, layer in model.each()]
    groups.sort(key=lambda group: group[0])  # reading follows the source files
    return _write(model, [chunk for _, group in groups for chunk in group], directory, threads, work, result)


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
    model = Model(config)
    check_megatron(reader, model)
    finite = FiniteCheck(allow_nonfinite)
    result = Conversion(nonfinite=finite.found)
    stored = precisions.stored(model)
    chunks = []
    for rule, layer in model.each():
        lead, lead_shape = _lead(model, rule, layer)
        shape = rule.megatron_shape(model.sizes)
        key, dtype = checkpoint_key(rule), stored[checkpoint_key(rule)]
        produce = _reread(reader, model, rule, layer, precisions, result.tensors, finite)
        names = tuple(model.names(rule, layer))
        offset, size = (*lead, *(0 for _ in shape)), (*lead_shape, *shape)
        chunks.append(Chunk(key, model.global_shape(rule), offset, size, dtype, produce, names))
    return _write(model, chunks, directory, threads, work, result)


def _reread(
    reader: MegatronReader, model: Model, rule: Rule, layer: int, precisions: Precisions, notes: dict[str, str], finite: FiniteCheck
) -> Callable[[], Tensor]:  # fmt: skip
    def produce() -> Tensor:
        return _woven(rule, model, model.names(rule, layer), model.read_hf(reader, rule, layer), precisions, notes, finite)

    return produce


def _woven(
    rule: Rule, model: Model, names: list[str], parts: list[Tensor], precisions: Precisions, notes: dict[str, str],
    finite: FiniteCheck,
) -> Tensor:  # fmt: skip
    """The Megatron tensor of a rule's Hugging Face tensors, each judged and hashed in its own precision."""
    parts = [part.to(precisions.of(name)) for name, part in zip(names, parts)]
    for name, part in zip(names, parts):
        finite(name, part)
        notes[name] = digest(part)
    wide = precisions.widest(names)
    return rule.pack([part.to(wide) for part in parts], model.sizes)


def _write(
    model: Model, chunks: list[Chunk], directory: Path, threads: int, work: Workspace | None, result: Conversion
) -> Conversion:
    objects = [name for rule, layer in model.each() for name in _extra_states(model, rule, layer)]
    common = {"iteration": 0, "checkpoint_version": 3.0, "num_floating_point_operations_so_far": 0}
    result.files = torch_dist.write(directory, chunks, objects, common, threads, work=work, notes=result.tensors)
    result.parameters = sum(torch.Size(rule.megatron_shape(model.sizes)).numel() for rule, _ in model.each())
    return result


def _lead(model: Model, rule: Rule, layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and size on the axis of layers, where there is one."""
    return ((layer,), (1,)) if model.layered(rule) else ((), ())


@dataclass
class _FromFolder:
    """Cuts the tensors of a Hugging Face folder into chunks of a Megatron checkpoint."""

    source: HFCheckpoint
    model: Model
    precisions: Precisions
    stored: dict[str, torch.dtype]
    notes: dict[str, str]
    finite: FiniteCheck

    def position(self, rule: Rule, layer: int) -> tuple[str, int]:
        """Where the first of a rule's tensors lies."""
        entry = self.source.entry(self.model.names(rule, layer)[0])
        return entry.file.name, entry.start

    def chunks(self, rule: Rule, layer: int) -> list[Chunk]:
        """A rule's tensor: parts that stand one above the other as they are, what must be woven together in one piece."""
        names = self.model.names(rule, layer)
        shape = rule.megatron_shape(self.model.sizes)
        if isinstance(rule, (Copy, GateUp)) and len(shape) == 2:
            made, row = [], 0
            for name, part in zip(names, rule.hf_shapes(self.model.sizes)):
                made += self._blocks(rule, layer, name, row, part[0])
                row += part[0]
            return made
        return [self._chunk(rule, layer, (0,) * len(shape), shape, tuple(names), lambda: self._packed(rule, names))]

    def _packed(self, rule: Rule, names: list[str]) -> Tensor:
        parts = [self.source.tensor(name) for name in names]
        return _woven(rule, self.model, names, parts, self.precisions, self.notes, self.finite)

    def _blocks(self, rule: Rule, layer: int, name: str, first_row: int, count: int) -> list[Chunk]:
        """A tensor that is copied, in blocks of rows; its digest is complete with the last block."""
        columns = rule.megatron_shape(self.model.sizes)[1]
        dtype = self.precisions.of(name)
        rows = max(1, _CHUNK_BYTES // (columns * self.stored[checkpoint_key(rule)].itemsize))
        running: Any = hashlib.sha256()

        def produce(start: int, stop: int) -> Tensor:
            part = self.source.tensor(name)[start:stop].to(dtype).contiguous()
            self.finite(name, part)
            running.update(raw(part))
            if stop == count:
                self.notes[name] = running.hexdigest()
            return part

        made = []
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            block = lambda start=start, stop=stop: produce(start, stop)  # noqa: E731
            made.append(
                self._chunk(rule, layer, (first_row + start, 0), (stop - start, columns), (name,), block, stop == count)
            )
        return made

    def _chunk(
        self, rule: Rule, layer: int, offset: tuple[int, ...], shape: tuple[int, ...], names: tuple[str, ...],
        produce: Callable[[], Tensor], last: bool = True,
    ) -> Chunk:  # fmt: skip
        lead, lead_shape = _lead(self.model, rule, layer)

        def prepare() -> None:
            for name in names:
                self.source.prefetch(name)

        def release() -> None:
            for name in names if last else ():
                self.source.release(name)

        key, place, size = checkpoint_key(rule), (*lead, *offset), (*lead_shape, *shape)
        return Chunk(key, self.model.global_shape(rule), place, size, self.stored[key], produce, names, prepare, release)


def _extra_states(model: Model, rule: Rule, layer: int) -> list[str]:
    """Names of the empty byte items that Megatron-Core keeps beside each linear layer's weight."""
    if (
        not rule.megatron.endswith(".weight")
        or len(rule.megatron_shape(model.sizes)) != 2
        or rule.megatron.startswith("embedding.")
    ):
        return []
    base = checkpoint_key(rule).removesuffix("weight")
    place = f"{layer}_{model.sizes.layers}" if model.layered(rule) else "0_1"
    return [f"{base}_extra_state/shard_{place}"]
