"""What a rank needs before its first step: the trainer as the run's checkpoint has it, and the batches.

with process_groups.joined(run.parallel, run.seed) as rank:
    trainer, extra = restore_trainer(run)
    train, validation = open_batches(run, rank)
    result = trainer.step(to_device(train.step(0), rank.device))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaswift.data.batches import Batches, EvalBatches, MicroBatch
from megaswift.data.text_rows import open_rows
from megaswift.megatron import process_groups
from megaswift.models import parameters_of
from megaswift.models.adapters import Lora
from megaswift.run.memory import short_of
from megaswift.run.spec import Run
from megaswift.train.checkpoint.load import load_training_state, load_weights
from megaswift.train.head import begin_head
from megaswift.train.preference import objective_of
from megaswift.weights.convert.lora import load_adapter
from megaswift.weights.convert.lora_start import load_start
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.folder_reader import FolderReader
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.load_hf import is_hf_folder, load_hf_weights
from megaswift.weights.load_new_rows import fill_new_rows
from megaswift.weights.torch_dist.reader import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.megatron.model import ChatModel, Chunks
    from megaswift.models.parameters import Parameter
    from megaswift.train.adapters import Adapter
    from megaswift.train.trainer import Trainer


def restore_trainer(run: Run, loaded: Callable[[ChatModel | Chunks], None] | None = None) -> tuple[Trainer, dict[str, Any]]:
    """Model and optimizer with the weights, or the whole state, of the run's checkpoint; and what was saved beside it.

    Args:
        loaded: called with the model once the weights that training starts from, or those of an adapter's base, are in it,
            before there is an adapter or an optimizer. In full training that goes on, its weights are not read yet.
    """
    from megaswift.megatron.freeze import freeze
    from megaswift.megatron.model import build, chunks_of, recompute_parts
    from megaswift.train.trainer import Trainer

    config, start, method = load_config(Path(run.model.directory)), Path(run.model.checkpoint), run.method
    packed = method.adapter is not None and method.adapter.bits is not None
    model = build(config, run.parallel, run.precision, run.memory, run.routing, packed=packed)
    if run.schedule.first_step == 0 or method.base is not None:
        weights = Path(method.base["path"]) if method.base else start
        (load_hf_weights if is_hf_folder(weights) else load_weights)(model, weights, run.model.new_head)
        if run.model.new_head:
            begin_head(chunks_of(model), config, run.seed)
        if packed and method.adapter is not None:
            _pack_weights(model, config, weights, method.adapter)
        if run.model.rows_before is not None:
            fill_new_rows(model, start, Path(run.model.directory), run.model.rows_before, config.vocab_size)
    if loaded is not None:
        loaded(model)
    adapter = None if method.adapter is None else _adapter(run, method.adapter, config)
    for chunk in chunks_of(model):
        if adapter is not None:
            adapter.attach(chunk)
        elif method.frozen:
            freeze(chunk, method.frozen)
    trainer = Trainer(model, run, objective_of(run.objective))
    recompute_parts(model, _recomputed(run, config))
    if run.schedule.first_step == 0:
        return trainer, {}
    return trainer, load_training_state(trainer, start, layout=run.parallel.layout)


def _pack_weights(model: ChatModel | Chunks, config: PreTrainedConfig, start: Path, lora: Lora) -> None:
    """The weights of linear layers and experts, read one by one and held in few bits."""
    assert lora.bits is not None
    from megaswift.megatron.model import chunks_of
    from megaswift.megatron.packed_weights import fill

    source: Any = FolderReader(config, HFCheckpoint.open(start)) if is_hf_folder(start) else Reader(start)

    def read(parameter: Parameter) -> torch.Tensor:
        value = source.read(parameter.key, parameter.place)
        source.release(parameter.key, parameter.place)
        return value

    for chunk in chunks_of(model):
        fill(chunk, parameters_of(config), chunk.first_layer, read, lora.bits, lora.double)


def _adapter(run: Run, lora: Lora, config: PreTrainedConfig) -> Adapter:
    """What the run trains beside the model's frozen weights."""
    from megaswift.train.adapters import LoraAdapter

    start, read = run.method.adapter_start, load_start if lora.is_part_of_base else load_adapter
    begun = None if start is None else read(Path(start))
    return LoraAdapter(lora, config, run.seed, begun)


def _recomputed(run: Run, config: PreTrainedConfig) -> str:
    """Which parts of the layers are computed again, judged by the memory that is free now, weights and gradients in place."""
    if run.memory.recompute != "swiglu if short":
        return run.memory.recompute
    if run.parallel.device == "cpu":
        return "none"
    return "swiglu" if short_of(run, config, torch.cuda.mem_get_info()[0]) else "none"


def open_batches(run: Run, rank: process_groups.Rank) -> tuple[Batches, EvalBatches | None]:
    """The rank's training batches and validation batches. Raises DataError for tokens that the model has no row for."""
    common: dict[str, Any] = dict(
        micro_batch_size=run.batch.micro_batch_size,
        global_batch_size=run.batch.global_batch_size,
        dp_rank=rank.dp_rank,
        dp_size=rank.dp,
        pad_multiple=run.parallel.pad_multiple,
        padding_free=run.batch.padding_free,
        pad_id=run.data.pad_id,
    )
    data = [open_rows(path) for path in (run.data.train, run.data.val) if path is not None]
    for rows in data:
        rows.require_within(load_config(Path(run.model.directory)).vocab_size, run.data.pad_id)
    train = Batches(data[0], seed=run.seed, shuffle=True, group_by_length=run.batch.group_by_length, **common)
    return train, EvalBatches(data[1], **common) if run.data.val is not None else None


def to_device(group: list[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """Micro batches on the rank's device; borders of packed rows stay on the host, which reads them."""
    if device.type == "cpu":
        return group
    names = ("tokens", "position_ids", "origins", "desirable", "reference", "values")
    moved = [{name: getattr(batch, name) for name in names if getattr(batch, name) is not None} for batch in group]
    beside = [batch.mismatched for batch in group]
    if beside[0] is not None:
        with_beside = zip(group, to_device([batch for batch in beside if batch is not None], device), strict=True)
        group = [replace(batch, mismatched=own) for batch, own in with_beside]
    there = [{name: value.to(device, non_blocking=True) for name, value in values.items()} for values in moved]
    return [replace(batch, **values) for batch, values in zip(group, there, strict=True)]
