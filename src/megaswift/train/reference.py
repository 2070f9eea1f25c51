"""What the reference says of every answer, once, before training: log-probabilities by forward passes alone.

The reference is the model as it is loaded, before an adapter is attached to it. It goes through the same ranks and the same
layout as training; no second model is ever held. What it said is kept in the run, and in the cache under a fingerprint of rows and
weights, so that neither a run that goes on nor another one over the same computes it again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megaswift.data.batches import EvalBatches, MicroBatch
from megaswift.data.store import TokenRows
from megaswift.errors import DataError
from megaswift.megatron.model import ChatModel, Chunks, chunks_of
from megaswift.store.cache import cache_root
from megaswift.store.manifest import MANIFEST, sha256_of
from megaswift.store.paths import REFERENCE_FILE
from megaswift.store.publish import appearing
from megaswift.terminal import duration, say
from megaswift.train.objectives import Loss, SequenceObjective
from megaswift.train.setup import to_device
from megaswift.train.trainer import forward_backward
from megaswift.weights.base import base_digest
from megaswift.weights.hf.config import load_config

if TYPE_CHECKING:
    from megaswift.run.spec import Run

_VERSION = 1  # of what the file holds
_WORDS = {"train": "training", "val": "validation"}


def attach(
    run: Run,
    run_dir: Path,
    stores: dict[str, TokenRows],
    device: torch.device,
    beat: Callable[[str], None],
    model: ChatModel | Chunks,
) -> None:
    """Give rows what the reference says of their answers; all ranks call it, the model's own weights loaded and nothing else.

    Args:
        stores: "train", and "val" where there is validation data.
        beat: told what goes on by all ranks at the same place, for the watchdog; it may raise on all of them.

    Raises DataError where a run that goes on has other rows, and its weights are not those of the reference any more.
    """
    first, file = dist.get_rank() == 0, run_dir / REFERENCE_FILE
    found: list[Any] = [_known(run, file, stores) if first else None]
    dist.broadcast_object_list(found, src=0)
    values = found[0]
    missing = {name: rows for name, rows in stores.items() if name not in values}
    if missing and run.schedule.first_step and run.method.base is None:
        raise DataError(
            f"the reference's log-probabilities of these {_WORDS[next(iter(missing))]} rows are not known, and this run has trained its weights.",
            where=str(file),
            fix="give the rows that the run began with, or begin a new run",
        )
    if missing:
        started = time.perf_counter()
        values |= {
            name: _computed(run, rows, device, partial(beat, f"the reference of the {_WORDS[name]} rows"), model)
            for name, rows in missing.items()
        }
        if first:
            count = sum(len(values[name]) for name in missing)
            say(f"reference: log-probabilities of {count:,} answers in {duration(time.perf_counter() - started)}")
    for name, rows in stores.items():
        if not np.isfinite(values[name]).all():
            bad = int(np.flatnonzero(~np.isfinite(values[name]))[0])
            raise DataError(
                "the reference gives an answer a log-probability that is not finite.",
                where=f"{_WORDS[name]} rows, answer {bad + 1}",
                fix="check the weights that training starts from (swift export --verify true)",
            )
        rows.reference = values[name]
    if first:
        _keep(run, file, stores, values, new=bool(missing))


def _computed(
    run: Run, rows: TokenRows, device: torch.device, beat: Callable[[], None], model: ChatModel | Chunks
) -> np.ndarray:
    """fp32 [places]: every row once, forward only, the data-parallel ranks sharing them."""
    dp, batch = parallel_state.get_data_parallel_world_size(), run.batch
    batches = EvalBatches(
        rows,
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=dp,
        pad_id=run.data.pad_id,
        padding_free=batch.padding_free,
        pad_multiple=run.parallel.pad_multiple,
    )
    values = torch.zeros(len(rows.sizes), dtype=torch.float64, device=device)

    def noted(log_probabilities: Tensor, tokens: Tensor, micro: MicroBatch) -> Loss:
        own = log_probabilities[tokens > 0].double()
        places = [np.arange(len(rows.sizes))[rows.places(row)][which] for row in micro.sample_ids]
        if places:
            values[torch.from_numpy(np.concatenate(places)).to(device)] = own
        nothing = torch.zeros((), device=device)
        return Loss(nothing, nothing, {})

    which = slice(None)  # of the samples of a row, those that a micro batch has
    chunks = chunks_of(model)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        for step in range(len(batches)):
            group, which = to_device(batches.step(step), device), slice(None)
            beside = [batch.mismatched for batch in group if batch.mismatched is not None]
            if beside:
                which = slice(1, None, 2)
                forward_backward(list(chunks), chunks[0].config, SequenceObjective(noted), beside, forward_only=True)
                which = slice(0, None, 2)
            forward_backward(list(chunks), chunks[0].config, SequenceObjective(noted), group, forward_only=True)
            beat()
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())  # each row was with one of them
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, last, group=parallel_state.get_pipeline_model_parallel_group())
    return values.float().cpu().numpy()


def _known(run: Run, file: Path, stores: dict[str, TokenRows]) -> dict[str, np.ndarray]:
    """What the run's own file, or the cache, has for these rows. A run that goes on has its own, of whatever it began from."""
    weights, values = None if run.schedule.first_step else weights_named(run), {}
    for name, rows in stores.items():
        found = kept(file, name, rows, weights)
        if found is None and weights is not None:
            found = kept(cached(weights, rows), "values", rows, weights)
        if found is not None:
            values[name] = found
    return values


def kept(path: Path, name: str, rows: TokenRows, weights: str | None) -> np.ndarray | None:
    """fp32 [places] of a file that is of these rows and of these weights, else None.

    Args:
        name: of the array in the file; weights: None: whatever they were.
    """
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        same_rows, same_weights = about["rows"].get(name) == rows.fingerprint, weights in (None, about["weights"])
        if about["version"] == _VERSION and same_rows and same_weights and file[name].shape == (len(rows.sizes),):
            return np.asarray(file[name], np.float32)
    return None


def _keep(run: Run, file: Path, stores: dict[str, TokenRows], values: dict[str, np.ndarray], new: bool) -> None:
    """Write the run's own file, and that of the cache for each part."""
    fingerprints = {name: rows.fingerprint for name, rows in stores.items()}
    known = run.schedule.first_step == 0 or run.method.base is not None
    weights = weights_named(run) if known else _began_from(file)
    write(file, weights, fingerprints, values)
    if not new or not known:
        return
    for name, rows in stores.items():
        with suppress(OSError):  # the run has its own
            place = cached(weights, rows)
            place.parent.mkdir(parents=True, exist_ok=True)
            write(place, weights, {"values": rows.fingerprint}, {"values": values[name]})


def write(path: Path, weights: str, rows: dict[str, str], values: dict[str, np.ndarray]) -> None:
    """Write a file that `kept` reads: an array for each name, with the fingerprint of its rows."""
    about = json.dumps({"version": _VERSION, "weights": weights, "rows": rows})
    with appearing(path, durable=False) as temporary, temporary.open("wb") as file:
        np.savez(file, about=np.array(about), **{name: values[name] for name in rows})  # type: ignore[arg-type]


def _began_from(file: Path) -> str:
    """The weights that a run's own file names, which a run that goes on keeps."""
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(file, allow_pickle=False) as values:
        return str(json.loads(str(values["about"]))["weights"])
    return ""


def cached(weights: str, rows: TokenRows) -> Path:
    """Where the cache has what these weights say of these rows."""
    digest = hashlib.sha256(json.dumps([_VERSION, weights, rows.fingerprint]).encode()).hexdigest()
    return cache_root() / "reference" / f"{digest[:32]}.npz"


def weights_named(run: Run) -> str:
    """A digest of the weights that a run begins from, as it computes with them: their values, and how they are held."""
    start, config = Path(run.model.checkpoint), load_config(Path(run.model.directory))
    if run.method.base is not None:
        values = str(run.method.base["digest"])
    else:
        try:
            values = base_digest(start, config)
        except DataError:  # trained Megatron weights: nothing recorded their tensors one by one, but all of their files
            values = sha256_of(start / MANIFEST)
    adapter = run.method.adapter
    held = [run.precision.dtype, run.precision.fp8, adapter.bits if adapter else None, adapter.double if adapter else None]
    text = json.dumps([values, held, run.model.rows_before, config.vocab_size])
    return hashlib.sha256(text.encode()).hexdigest()
