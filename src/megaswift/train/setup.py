"""What a rank needs before its first step: the trainer as the job's checkpoint has it, and the batches.

with process_groups.joined(plan.tp, plan.pp, args.seed, plan.cp) as rank:
    trainer, extra = restore_trainer(job, args)
    train, validation = open_batches(job, args, rank)
    result = trainer.step(to_device(train.step(0), rank.device))
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaswift.config.options import SftArguments
from megaswift.data.batches import Batches, EvalBatches, MicroBatch
from megaswift.data.store import TokenRows
from megaswift.megatron import process_groups
from megaswift.models import parameters_of
from megaswift.models.adapters import Lora
from megaswift.models.stages import stage_layers
from megaswift.run.job import Job
from megaswift.train.checkpoint.load import load_training_state, load_weights
from megaswift.train.objectives import SupervisedTokens
from megaswift.weights.convert.lora import load_adapter
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.folder_reader import FolderReader
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.load_hf import is_hf_folder, load_hf_weights
from megaswift.weights.load_new_rows import fill_new_rows
from megaswift.weights.torch_dist.reader import Reader

if TYPE_CHECKING:
    from megaswift.models.parameters import Parameter
    from megaswift.train.adapters import Adapter
    from megaswift.train.trainer import Trainer


def restore_trainer(job: Job, args: SftArguments) -> tuple[Trainer, dict[str, Any]]:
    """Model and optimizer with the weights, or the whole state, of the job's checkpoint; and what was saved beside it."""
    from megaswift.megatron.freeze import freeze
    from megaswift.megatron.model import ModelOptions, build
    from megaswift.train.trainer import Trainer

    plan = job.plan
    options = ModelOptions(
        tp=plan.tp,
        pp=plan.pp,
        cp=plan.cp,
        dtype=plan.dtype,
        padded_vocab=plan.padded_vocab,
        sequence_parallel=args.sequence_parallel,
        recompute=args.gradient_checkpointing,
        deterministic=args.deterministic,
        flash_attention=args.use_flash_attn,
        variable_lengths=plan.pp > 1,
        fp8=args.fp8,
        packed=job.adapter is not None and job.adapter.get("bits") is not None,
        offloaded_layers=plan.cpu_offloading_num_layers,
    )
    config = load_config(Path(job.model_dir))
    model = build(config, options)
    names = ("cuda_graphs", "overlap_grad_reduce", "overlap_param_gather", "recompute_modules")
    ways: dict[str, Any] = {name: getattr(args, name) for name in names}
    if job.first_step == 0 or job.base is not None:
        start = Path(job.base["path"] if job.base else job.checkpoint)
        (load_hf_weights if is_hf_folder(start) else load_weights)(model, start)
        if options.packed:
            _pack_weights(model, config, start, plan.pp)
        if job.rows_before is not None:
            fill_new_rows(model, start, Path(job.model_dir), job.rows_before, config.vocab_size)
    if job.adapter is not None:
        _adapter(job, args, config).attach(model)
    elif job.frozen:
        freeze(model, job.frozen, stage_layers(config, plan.pp))
    if job.first_step == 0:
        return Trainer(model, plan, SupervisedTokens(), **ways), {}
    trainer = Trainer(model, plan, SupervisedTokens(), **ways)
    return trainer, load_training_state(trainer, Path(job.checkpoint), layout={"tp": plan.tp, "pp": plan.pp, "dp": plan.dp})


def _pack_weights(model: Any, config: Any, start: Path, pp: int) -> None:
    """The weights of linear layers, read one by one and held in 4 bits."""
    from megatron.core import parallel_state

    from megaswift.megatron.packed_layers import fill

    source: Any = FolderReader(config, HFCheckpoint.open(start)) if is_hf_folder(start) else Reader(start)
    first = sum(stage_layers(config, pp)[: parallel_state.get_pipeline_model_parallel_rank()])

    def read(parameter: Parameter) -> torch.Tensor:
        value = source.read(parameter.key, parameter.place)
        source.release(parameter.key, parameter.place)
        return value

    fill(model, parameters_of(config), first, read)


def _adapter(job: Job, args: SftArguments, config: Any) -> Adapter:
    """What the run trains beside the model's frozen weights."""
    from megaswift.train.adapters import LoraAdapter

    assert job.adapter is not None
    begun = None if job.adapter_start is None else load_adapter(Path(job.adapter_start))
    return LoraAdapter(Lora.from_record(job.adapter), config, job.plan.pp, args.seed, begun)


def open_batches(job: Job, args: SftArguments, rank: process_groups.Rank) -> tuple[Batches, EvalBatches | None]:
    """The rank's training batches and validation batches. Raises DataError for tokens that the model has no row for."""
    common: dict[str, Any] = dict(
        micro_batch_size=args.batch_size,
        global_batch_size=job.plan.global_batch,
        dp_rank=rank.dp_rank,
        dp_size=rank.dp,
        pad_multiple=job.plan.pad_multiple,
        padding_free=args.padding_free,
        pad_id=job.pad_id,
    )
    data = [TokenRows.open(path) for path in (job.train_data, job.val_data) if path is not None]
    for rows in data:
        rows.require_within(load_config(Path(job.model_dir)).vocab_size, job.pad_id)
    train = Batches(data[0], seed=args.seed, shuffle=True, group_by_length=args.group_by_length, **common)
    return train, EvalBatches(data[1], **common) if job.val_data is not None else None


def to_device(group: list[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """Micro batches on the rank's device; borders of packed rows stay on the host, which reads them."""
    if device.type == "cpu":
        return group
    names = ("tokens", "position_ids", "origins")
    moved = [{name: getattr(batch, name) for name in names if getattr(batch, name) is not None} for batch in group]
    there = [{name: value.to(device, non_blocking=True) for name, value in values.items()} for values in moved]
    return [replace(batch, **values) for batch, values in zip(group, there, strict=True)]
