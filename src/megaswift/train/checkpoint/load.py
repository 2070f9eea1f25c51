"""Load a checkpoint into a training state of any layout, weights by Megatron-Core's own resharding load with guarded reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megaswift.errors import DataError
from megaswift.megatron import compat
from megaswift.models.head import SCORE
from megaswift.store.faults import fault_point
from megaswift.store.manifest import read_manifest
from megaswift.train.checkpoint import optimizer_state
from megaswift.train.checkpoint.save import CONTENT, TrainingState, state_dict
from megaswift.weights.torch_dist.reader import Reader

_OPTIONS = (
    "max_lr",
    "min_lr",
    "betas",
    "eps",
    "weight_decay",
    "wd_mult",
    "lr_mult",
    "default_config",
)  # of a parameter group: never from a checkpoint


def load_weights(model: Any, directory: Path, new_head: bool = False) -> None:
    """Fill a model (of this rank's layout) from a torch_dist directory. Raises DataError where they do not fit.

    Args:
        new_head: the model's head of scores, which the directory has not, is left as it is.
    """
    wanted = model.sharded_state_dict(prefix="", metadata=None)
    heads = [name for name in wanted if new_head and name.endswith(SCORE)]
    for name in heads:
        wanted.pop(name)
    loaded = _load({"model": wanted}, directory)
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state") and name not in heads]
    if missing or unexpected:
        raise DataError(
            f"the checkpoint does not fit the model. Missing: {missing[:5]}. Not expected: {list(unexpected)[:5]}.",
            where=str(directory),
        )


def load_training_state(state: TrainingState, directory: Path, *, layout: dict[str, int]) -> dict[str, Any]:
    """Restore model, optimizer, schedule and, at the same layout, random states; returns the `extra` values of the save.

    Args:
        layout: tp, pp and dp of this run.
    """
    manifest = read_manifest(directory)
    if not manifest.get("optimizer"):
        raise DataError(
            "the checkpoint has no optimizer state.",
            where=str(directory),
            fix="it was saved with --save_only_model true: give it as --resume_from_checkpoint of a new run",
        )
    wanted = state_dict(state, only_model=False)
    same_layout = manifest.get("layout") == layout
    if not same_layout:
        wanted.pop("rng_state")  # there is one for each old rank; no random number is drawn while training
    loaded = _load(wanted, directory)
    fault_point("load.weights_read")
    state.bare_model.load_state_dict(loaded["model"], strict=False)
    _restore_optimizer(state, loaded)
    model = state.bare_model.sharded_state_dict(prefix="", metadata=dict(CONTENT))  # the load took the one above to pieces
    optimizer_state.load(state.optimizer, model, Reader(directory))
    if same_layout:
        _restore_random_state(loaded["rng_state"])
    return loaded["megaswift"]


def _restore_optimizer(state: TrainingState, loaded: dict[str, Any]) -> None:
    """Steps and the place in the schedule; rates and decay are those of this run's options."""
    ours = [{name: group[name] for name in _OPTIONS if name in group} for group in state.optimizer.param_groups]
    compat.let_groups_be_found(loaded["optimizer"], state.optimizer)
    state.optimizer.load_state_dict(loaded["optimizer"])
    for group, options in zip(state.optimizer.param_groups, ours):
        group.update(options)
    # A longer run than planned has another schedule: its shape comes from the options, its place from the checkpoint.
    state.scheduler.use_checkpoint_opt_param_scheduler, state.scheduler.override_opt_param_scheduler = False, True
    state.scheduler.load_state_dict(loaded["opt_param_scheduler"])


def _load(wanted: dict[str, Any], directory: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        fault_point("load.start")
        loaded = dist_checkpointing.load(wanted, str(directory))
        fault_point("load.done")
        return loaded
    except DataError:
        raise
    except CheckpointException as error:  # what each rank met; this class is no Exception
        rank, (problem, _) = min(error.failures.items())
        raise (problem if isinstance(problem, DataError) else _unreadable(f"rank {rank}: {problem}", directory)) from error
    except Exception as error:  # Megatron-Core and torch raise many kinds for a checkpoint that does not fit
        raise _unreadable(str(error), directory) from error


def _unreadable(problem: str, directory: Path) -> DataError:
    return DataError(
        f"the checkpoint cannot be loaded: {problem}", where=str(directory), fix="check it with its model's config.json"
    )


def _restore_random_state(states: dict[str, Any]) -> None:
    """What a device's generator had goes back to one of its kind only: a GPU's has 16 bytes, a CPU's 5056."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(states["torch"])
    saved = states.get("device_type") or ("cuda" if states["device"].numel() == 16 else "cpu")  # not in checkpoints of before
    if saved != ("cuda" if torch.cuda.is_available() else "cpu"):
        return
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])
