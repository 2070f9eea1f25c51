"""Save a training state: every rank writes its part, and the directory appears under its name only when it is whole.

The order is what makes it safe: a fresh temporary directory, each rank's file written, hashed and synced, the verdict of
all ranks agreed, then index and manifest, then one rename, then the tracker file. A crash at any point leaves the earlier
checkpoints as they were and nothing that a reader would accept.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megaswift.checkpoint import torch_dist
from megaswift.checkpoint.layout import TRACKER, iteration_directory
from megaswift.checkpoint.manifest import sync_directory, write_manifest
from megaswift.errors import DataError

# How Megatron-Core lays out optimizer state: in the shape of the weights, so that any tp, pp and dp can read it.
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False, "chained_optim_avoid_prefix": True}
SPARE_BYTES = 64 << 20  # room left on the disk for logs and manifests


class TrainingState(Protocol):
    """What a checkpoint is made of (engine.step.Trainer has it)."""

    bare_model: Any  # without the wrappers of data parallelism and mixed precision, whose names would get into the keys
    optimizer: Any
    scheduler: Any


def save(root: Path, iteration: int, state: TrainingState, *, only_model: bool, extra: dict[str, Any], manifest: dict[str, Any]) -> Path:
    """Save after `iteration` steps under `root`; called by all ranks, and all raise the same error.

    Args:
        only_model: leave out optimizer, schedule and random states.
        extra: small values for resuming (consumed rows, fingerprint of the data); JSON-ready.
        manifest: more entries of manifest.json.

    Returns:
        The finished directory.
    """
    target = iteration_directory(root, iteration)
    temporary = _agreed_directory(target)
    sharded, common = _split(state_dict(state, only_model), {"iteration": iteration, "checkpoint_version": 3.0, "megaswift": extra, "content_metadata": CONTENT})
    part = _Part()
    try:
        _write_part(temporary, sharded, part)
    except Exception as error:  # the verdict is agreed below: never raise on one rank alone
        part.error = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    parts = _gathered(part)
    _publish(temporary, target, parts, common, manifest | {"iteration": iteration, "optimizer": not only_model})
    return target


def state_dict(state: TrainingState, only_model: bool, is_loading: bool = False) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of a training state, under the names that a checkpoint has."""
    model = state.bare_model.sharded_state_dict(prefix="", metadata=dict(CONTENT))
    if only_model:
        return {"model": model}
    return {
        "model": model,
        "optimizer": state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(CONTENT)),
        "opt_param_scheduler": state.scheduler.state_dict(),
        "rng_state": _random_state(),
    }


def _random_state() -> Any:
    """Random states of this rank, one for each pipeline stage and tensor-parallel part."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = {"torch": torch.get_rng_state(), "device": torch.cuda.get_rng_state(), "tracker": dict(get_cuda_rng_tracker().get_states())}
    grid = (ps.get_pipeline_model_parallel_world_size(), ps.get_tensor_model_parallel_world_size())
    place = (ps.get_pipeline_model_parallel_rank(), ps.get_tensor_model_parallel_rank())
    return ShardedObject("rng_state", states, grid, place, replica_id=ps.get_data_parallel_rank())


def _split(state: dict[str, Any], common: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Sharded items that this rank writes, and the small values that go to common.pt."""
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedTensorFactory, apply_factories, is_main_replica

    apply_factories(state)
    sharded, rest = extract_matching_values(state, lambda value: isinstance(value, (ShardedBase, LocalNonpersistentObject)))
    items = [item for item in nested_values(sharded) if isinstance(item, ShardedBase) and not isinstance(item, ShardedTensorFactory)]
    return [item for item in items if is_main_replica(item.replica_id)], {**rest, **common}


class _Part:
    """What one rank wrote."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.files: dict[str, torch_dist.FileDigest] = {}
        self.table: dict[str, Any] = {}
        self.storage: dict[Any, Any] = {}


def _write_part(directory: Path, items: list[Any], part: _Part) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    chunks, objects = [], {}
    for item in items:
        if isinstance(item, ShardedObject):
            objects[item.unique_key] = item.data
            continue
        shape = (1,) * item.prepend_axis_num + tuple(item.local_shape)
        chunks.append(torch_dist.Chunk(item.key, tuple(item.global_shape), tuple(item.global_offset), shape, item.dtype, lambda data=item.data: data.detach().cpu()))
    if chunks or objects:
        name, digest, part.storage = torch_dist.write_file(directory, f"__{dist.get_rank()}_0.distcp", chunks, objects)
        part.files[name] = digest
        part.table = torch_dist.tensor_table(chunks) | torch_dist.object_table(objects)


def _publish(temporary: Path, target: Path, parts: list[_Part], common: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Rank 0 makes the directory whole and names it; every rank learns how that went."""
    problem = "; ".join(part.error for part in parts if part.error)
    if dist.get_rank() == 0:
        try:
            if problem:
                raise OSError(problem)
            files: dict[str, torch_dist.FileDigest] = {}
            for part in parts:
                files.update(part.files)
            files |= torch_dist.write_index(temporary, [part.table for part in parts], [part.storage for part in parts], common)
            write_manifest(temporary, manifest | {"kind": "megatron", "files": {name: vars(digest) for name, digest in files.items()}})
            temporary.rename(target)
            sync_directory(target.parent)
            write_tracker(target.parent, str(manifest["iteration"]))
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            problem = problem or f"rank 0: {error}"
    verdict = [problem]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0]:
        raise DataError(f"the checkpoint could not be saved: {verdict[0]}", where=str(target), fix="earlier checkpoints are as they were; free space or check the disk")


def write_tracker(root: Path, text: str) -> None:
    """Name the newest checkpoint in the tracker file, by temporary file and replace; it is a hint, files decide."""
    temporary = root / f".{TRACKER}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(root / TRACKER)
    sync_directory(root)


def require_space(directory: Path, needed: int, what: str) -> None:
    """Raise DataError unless the disk of `directory` has `needed` bytes free, and some to spare."""
    free = shutil.disk_usage(directory).free
    if free < needed + SPARE_BYTES:
        raise DataError(f"{what} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free.", where=str(directory), fix="free space, or choose another --output_dir")


def _agreed_directory(target: Path) -> Path:
    """A fresh temporary directory beside the target, the same on all ranks."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            if target.exists():
                shutil.rmtree(target)  # only an unfinished or older run of the same step can be here
            path = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
            path.mkdir(parents=True)
            answer = [str(path), None]
        except OSError as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise DataError(f"the checkpoint directory cannot be made: {answer[1]}", where=str(target), fix="check the permissions of --output_dir")
    return Path(answer[0])


def _gathered(part: _Part) -> list[_Part]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


def keep_newest(root: Path, limit: int | None) -> list[Path]:
    """Delete the oldest checkpoints beyond `limit`; each is invalidated by losing its manifest first."""
    from megaswift.checkpoint.layout import candidates, iteration_of
    from megaswift.checkpoint.manifest import MANIFEST

    removed: list[Path] = []
    if limit is None or dist.get_rank() != 0:
        return removed
    for path in [path for path in candidates(root) if iteration_of(path) > 0][limit:]:
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed
