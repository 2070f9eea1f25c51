"""Save a training state: every rank writes its part, and the directory appears under its name only when it is whole.

The order is what makes it safe: a fresh temporary directory, each rank's file written, hashed and synced, the verdict of
all ranks agreed, then index and manifest, then one rename, then the tracker file. A crash at any point leaves the earlier
checkpoints as they were and nothing that a reader would accept. With `background` the files are written by a thread from
a copy in host memory, while training goes on; the rest happens at a later step boundary, on all ranks at once.
"""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megaswift.errors import DataError, is_full
from megaswift.store.faults import fault_point
from megaswift.store.manifest import write_manifest
from megaswift.store.paths import TRACKER, iteration_directory
from megaswift.store.publish import publish, put, temporary_beside
from megaswift.store.retention import discard
from megaswift.train.checkpoint import optimizer_state
from megaswift.train.checkpoint.optimizer_state import STATES, Box, Shard
from megaswift.weights.torch_dist import writer

# Optimizer state lies in the shape of the weights, so that any tp, pp and dp can read it; this is Megatron-Core's word for it.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
SPARE_BYTES = 64 << 20  # room left on the disk for logs and manifests


class TrainingState(Protocol):
    """What a checkpoint is made of (engine.step.Trainer has it)."""

    bare_model: Any  # without the wrappers of data parallelism and mixed precision, whose names would get into the keys
    optimizer: Any
    scheduler: Any

    @property
    def some_layers(self) -> str | None:
        """Tensors whose names begin so are saved of some layers alone, of those that are trained; None: all are whole."""

    def settle_weights(self) -> None:
        """Wait until this rank has all new weights; all ranks call it at once."""


def save(
    root: Path,
    iteration: int,
    state: TrainingState,
    *,
    only_model: bool,
    extra: dict[str, Any],
    manifest: dict[str, Any],
    needed: int = 0,
) -> Path:
    """Save after `iteration` steps under `root`; called by all ranks, and all raise the same error.

    Args:
        only_model: leave out optimizer, schedule and random states.
        extra: small values for resuming (consumed rows, fingerprint of the data); JSON-ready.
        manifest: more entries of manifest.json.
        needed: bytes of a checkpoint; with less free space nothing is written.

    Returns:
        The finished directory.
    """
    return Saving(root, iteration, state, only_model=only_model, extra=extra, manifest=manifest, needed=needed).finish()


class Saving:
    """A checkpoint on its way: made by all ranks at once, ended by `finish`, which all ranks call at once.

    Args are those of `save`; with `background` a thread writes this rank's file from a copy in host memory.
    """

    def __init__(
        self,
        root: Path,
        iteration: int,
        state: TrainingState,
        *,
        only_model: bool,
        extra: dict[str, Any],
        manifest: dict[str, Any],
        needed: int = 0,
        background: bool = False,
    ) -> None:
        self.target, self.iteration = iteration_directory(root, iteration), iteration
        self.manifest = manifest | {"iteration": iteration, "optimizer": not only_model}
        self.temporary = _agreed_directory(self.target, needed)
        state.settle_weights()  # a collective: before anything can fail on one rank alone
        self.part, self.some_layers = _Part(), state.some_layers
        self.common: dict[str, Any] = {}
        self.thread: threading.Thread | None = None
        try:
            fault_point("save.directory")
            whole = state_dict(state, only_model)
            shards = [] if only_model else list(optimizer_state.shards(state.optimizer, whole["model"]))
            sharded, self.common = _split(
                whole, {"iteration": iteration, "checkpoint_version": 3.0, "megaswift": extra, "content_metadata": CONTENT}
            )
            chunks, objects = _contents(sharded, copy=background)
            chunks += _optimizer_chunks(shards, copy=background)
            if background and torch.cuda.is_available():
                torch.cuda.synchronize()  # the copies are whole before the next step changes what they were made of
            fault_point("save.collected")
        except Exception as error:  # the verdict is agreed in `finish`: never raise on one rank alone
            self.part.fail(error)
            return
        if background:
            self.thread = threading.Thread(target=self._write, args=(chunks, objects), name="checkpoint", daemon=True)
            self.thread.start()
        else:
            self._write(chunks, objects)

    @property
    def written(self) -> bool:
        """Whether this rank's file is there, or failed."""
        return self.thread is None or not self.thread.is_alive()

    def finish(self) -> Path:
        """Wait for this rank's file, agree, publish. Returns the directory; all ranks raise the same DataError."""
        if self.thread is not None:
            self.thread.join()
        _publish(self.temporary, self.target, _gathered(self.part), self.common, self.manifest, self.some_layers)
        fault_point("save.published")
        return self.target

    def _write(self, chunks: list[writer.Chunk], objects: dict[str, Any]) -> None:
        try:
            _write_part(self.temporary, chunks, objects, self.part)
            fault_point("save.part_written")
        except Exception as error:
            self.part.fail(error)


def state_dict(state: TrainingState, only_model: bool) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of a training state, under the names that a checkpoint has.

    The optimizer's tensors are not in it: `optimizer_state.shards` has them.
    """
    model = state.bare_model.sharded_state_dict(prefix="", metadata=dict(CONTENT))
    if only_model:
        return {"model": model}
    return {
        "model": model,
        "optimizer": optimizer_state.small_state(state.optimizer),
        "opt_param_scheduler": state.scheduler.state_dict(),
        "rng_state": _random_state(),
    }


def _random_state() -> Any:
    """Random states of this rank, one for each pipeline stage and tensor-parallel part."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = {
        "device_type": "cuda" if torch.cuda.is_available() else "cpu",
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    grid = (ps.get_pipeline_model_parallel_world_size(), ps.get_tensor_model_parallel_world_size())
    place = (ps.get_pipeline_model_parallel_rank(), ps.get_tensor_model_parallel_rank())
    return ShardedObject("rng_state", states, grid, place, replica_id=ps.get_data_parallel_rank(with_context_parallel=True))


def _split(state: dict[str, Any], common: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Sharded items that this rank writes, and the small values that go to common.pt."""
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
    from megatron.core.dist_checkpointing.mapping import (
        LocalNonpersistentObject,
        ShardedBase,
        ShardedTensorFactory,
        apply_factories,
        is_main_replica,
    )

    apply_factories(state)
    sharded, rest = extract_matching_values(state, lambda value: isinstance(value, (ShardedBase, LocalNonpersistentObject)))
    items = [
        item for item in nested_values(sharded) if isinstance(item, ShardedBase) and not isinstance(item, ShardedTensorFactory)
    ]
    return [item for item in items if is_main_replica(item.replica_id)], {**rest, **common}


class _Part:
    """What one rank wrote."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.files: dict[str, writer.FileDigest] = {}
        self.table: dict[str, Any] = {}
        self.storage: dict[Any, Any] = {}

    def fail(self, error: BaseException) -> None:
        self.error = f"rank {dist.get_rank()}: {_reason(error)}"


def _reason(error: BaseException) -> str:
    """What went wrong; torch's own message hides a full disk, which stands in the chain of errors behind it."""
    if isinstance(error, DataError):
        return error.what.rstrip(".")
    found: BaseException | None = error
    while found is not None:
        if is_full(found):
            return "the disk is full"
        found = found.__cause__ or found.__context__
    return f"{error.strerror or error}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _contents(items: list[Any], copy: bool) -> tuple[list[writer.Chunk], dict[str, Any]]:
    """Tensors and small objects that this rank writes; `copy`: as they are now, whatever training does next."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    chunks, objects = [], {}
    for item in items:
        if isinstance(item, ShardedObject):
            objects[item.unique_key] = item.data
            continue
        shape = (1,) * item.prepend_axis_num + tuple(item.local_shape)
        data = _host_copy(item.data.detach()) if copy else item.data.detach()
        chunks.append(writer.Chunk(item.key, tuple(item.global_shape), tuple(item.global_offset), shape, item.dtype, data.cpu))
    return chunks, objects


def _optimizer_chunks(shards: list[Shard], copy: bool) -> list[writer.Chunk]:
    """Master weights and moments that this rank writes; `copy` as in `_contents`, else they are read when they are written."""
    chunks = []
    for shard in shards:
        boxes = [box for box in shard.boxes if box.is_main]
        kept = {state: _host_copy(value) for state, value in shard.read().items()} if copy and boxes else None
        for box in boxes:
            for state in STATES:
                chunks.append(
                    writer.Chunk(
                        optimizer_state.key_of(state, box.key), box.global_shape, box.offset, box.shape, torch.float32,
                        partial(_values, shard, kept, state, box),
                    )
                )  # fmt: skip
    return chunks


def _values(shard: Shard, kept: dict[str, torch.Tensor] | None, state: str, box: Box) -> torch.Tensor:
    return (kept or shard.read())[state][box.first : box.last].cpu()


def _host_copy(value: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; from a GPU through page-locked memory, without waiting for it."""
    if value.device.type == "cpu":
        return value.clone()
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


def _write_part(directory: Path, chunks: list[writer.Chunk], objects: dict[str, Any], part: _Part) -> None:
    if not chunks and not objects:
        return
    name = f"__{dist.get_rank()}_0.distcp"
    try:
        fault_point("save.writing")
        name, digest, part.storage = writer.write_file(directory, name, chunks, objects)
    except Exception as error:
        raise DataError(f"{_reason(error)} ({directory / name})") from error
    part.files[name] = digest
    part.table = writer.tensor_table(chunks) | writer.object_table(objects)


def _publish(
    temporary: Path,
    target: Path,
    parts: list[_Part],
    common: dict[str, Any],
    manifest: dict[str, Any],
    some_layers: str | None = None,
) -> None:
    """Rank 0 makes the directory whole and names it; every rank learns how that went."""
    problem = "; ".join(part.error for part in parts if part.error)
    if dist.get_rank() == 0:
        try:
            if problem:
                raise OSError(problem)
            _complete(temporary, target, parts, common, manifest, some_layers)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            problem = problem or f"rank 0: {_reason(error)} ({temporary})"
    verdict = [problem]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0]:
        raise DataError(
            f"the checkpoint could not be saved: {verdict[0]}",
            where=str(target),
            fix="earlier checkpoints are as they were; free space or check the disk",
        )


def _complete(
    temporary: Path,
    target: Path,
    parts: list[_Part],
    common: dict[str, Any],
    manifest: dict[str, Any],
    some_layers: str | None = None,
) -> None:
    """Index, manifest, name, tracker: in this order."""
    files: dict[str, writer.FileDigest] = {}
    for part in parts:
        files.update(part.files)
    fault_point("save.before_index")
    tables, storage = [part.table for part in parts], [part.storage for part in parts]
    files |= writer.write_index(temporary, tables, storage, common, some_layers)
    fault_point("save.before_manifest")
    write_manifest(temporary, manifest | {"kind": "megatron", "files": {name: vars(digest) for name, digest in files.items()}})
    fault_point("save.before_rename")
    if target.exists():
        discard(target)  # only a damaged one of an earlier run can have this step's name
    publish(temporary, target, synced=True)
    fault_point("save.renamed")
    put(target.parent / TRACKER, str(manifest["iteration"]))  # names the newest checkpoint; a hint, files decide


def require_space(directory: Path, needed: int, what: str) -> None:
    """Raise DataError unless the disk of `directory` has `needed` bytes free, and some to spare."""
    free = shutil.disk_usage(directory).free
    if free < needed + SPARE_BYTES:
        raise DataError(
            f"{what} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free.",
            where=str(directory),
            fix="free space, or choose another --output_dir",
        )


def _agreed_directory(target: Path, needed: int) -> Path:
    """A fresh temporary directory beside the target, the same on all ranks; refused where the disk is too full."""
    answer: list[Any] = [None, None]
    try:
        fault_point("save.start")
    except OSError as error:
        answer = [
            None,
            DataError(
                f"the checkpoint directory cannot be made: rank {dist.get_rank()}: {_reason(error)}.",
                where=str(target),
                fix="check --output_dir",
            ),
        ]
    if dist.get_rank() == 0 and answer[1] is None:
        answer = _fresh_directory(target, needed)
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, answer)
    problems = [problem for _, problem in answers if problem is not None]
    if problems:
        if dist.get_rank() == 0 and answer[0]:
            shutil.rmtree(answer[0], ignore_errors=True)
        raise problems[0]
    return Path(answers[0][0])


def _fresh_directory(target: Path, needed: int) -> list[Any]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if needed:
            require_space(target.parent, needed, "one checkpoint")
        path = temporary_beside(target, hidden=False)
        path.mkdir()
        return [str(path), None]
    except DataError as error:
        return [None, error]
    except OSError as error:
        return [
            None,
            DataError(
                f"the checkpoint directory cannot be made: {_reason(error)}.",
                where=str(target),
                fix="check the permissions of --output_dir",
            ),
        ]


def _gathered(part: _Part) -> list[_Part]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts
