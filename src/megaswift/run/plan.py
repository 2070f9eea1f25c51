"""plan.json: a run in numbers, for people and for pictures. Ranks read run.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.models.family import padded_vocab
from megaswift.models.stages import stage_layers
from megaswift.run.memory import MemoryEstimate, parameter_count, trained_count
from megaswift.run.spec import Run
from megaswift.run.table import filled_rows, megatron_arguments
from megaswift.store.publish import put

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PLAN_FILE = "plan.json"


def plan_of(run: Run, config: PreTrainedConfig, memory: MemoryEstimate) -> dict[str, Any]:
    """What plan.json says."""
    parallel, batch = run.parallel, run.batch
    return {
        "model_type": run.model.model_type,
        "dtype": run.precision.dtype,
        "world_size": parallel.world_size,
        "tp": parallel.tp,
        "pp": parallel.pp,
        "vpp": parallel.vpp,
        "dp": parallel.dp,
        "cp": parallel.cp,
        "ep": parallel.ep,
        "etp": parallel.etp,
        "padded_vocab": padded_vocab(config.vocab_size, parallel.tp),
        "max_length": batch.max_length,
        "pad_multiple": parallel.pad_multiple,
        "micro_batches": batch.micro_batches,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "train_rows": run.data.train_rows,
        "val_rows": run.data.val_rows,
        "decay_steps": run.schedule.decay_iters,
        "wsd_decay_steps": run.schedule.wsd_decay_iters,
        "moments": run.optimizer.state_dtype,
        "rank_bytes": memory.device,
        "checkpoint_bytes": run.saving.checkpoint_bytes,
        "megatron": megatron_arguments(run),
        "table": filled_rows(run),
        "optimizer_cpu_offload": run.memory.optimizer_on_host,
        "cpu_offloading_num_layers": run.memory.offloaded_layers,
        "host_bytes": memory.host,
        "working_bytes": memory.working,
        "outside_bytes": memory.outside,
        "peak_bytes": memory.peak,
        "stages": list(stage_layers(config, parallel.pp, parallel.vpp)),
        "parameters": parameter_count(config),
        "objective": asdict(run.objective),
        "trainable": trained_count(run.method.adapter, run.method.frozen, config),
    }


def write_plan(path: Path, run: Run, config: PreTrainedConfig, memory: MemoryEstimate) -> None:
    """Write plan.json."""
    text = json.dumps(plan_of(run, config, memory), indent=2, ensure_ascii=False)
    put(path, text + "\n")
