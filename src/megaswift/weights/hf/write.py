"""Write a Hugging Face model directory whole or not at all: hidden temporary directory, fsync, audit, rename.

Tensors stream one at a time a thread, whatever the size of the model, and SHA-256 sums are taken on the way.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError
from megaswift.store.files import Cancelled, FileRecord, write_small
from megaswift.store.publish import Workspace, publish, refuse_existing, remove_leftovers, workspace
from megaswift.weights.hf.folder import CONFIG, INDEX, read_config
from megaswift.weights.hf.mxfp4 import QUANTIZED
from megaswift.weights.hf.read import tensor_table, torch_dtype
from megaswift.weights.hf.shards import DEFAULT_SHARD_SIZE, PlannedTensor, Shard, ShardResult, plan_shards, write_shard

if TYPE_CHECKING:
    import torch

__all__ = ["FileRecord", "PlannedTensor", "WriteResult", "dtype_override", "remove_leftovers", "write_checkpoint"]


@dataclass
class WriteResult:
    """What was written.

    Args:
        path: the directory (the temporary one while `before_publish` runs).
        files: name -> size and SHA-256 of every file.
        tensors: name -> SHA-256 of the tensor's raw little-endian bytes.
        bytes: size of all files.
        seconds: time taken.
        resumed: shards that an interrupted call had written.
    """

    path: Path
    files: dict[str, FileRecord]
    tensors: dict[str, str]
    bytes: int
    seconds: float
    resumed: list[str] = field(default_factory=list)


def dtype_override(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, str]:
    """The `config_overrides` that name a new dtype, under the key that this config uses."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {key: str(dtype).removeprefix("torch.")}


def write_checkpoint(
    out: Path | str,
    tensors: Iterable[PlannedTensor],
    side_files: Sequence[Path] = (),
    config_overrides: Mapping[str, Any] | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    threads: int = 2,
    *,
    extra_files: Mapping[str, bytes] | None = None,
    before_publish: Callable[[WriteResult], None] | None = None,
    progress: Callable[[int], None] | None = None,
    plan: str | None = None,
    resume: bool = False,
    replace: bool = False,
) -> WriteResult:
    """Write a model directory; it appears under its name only when it is complete, audited and on the disk.

    Args:
        out: the directory to make; must not exist, unless it is replaced.
        tensors: what to write, in file order. Memory: the largest tensor times `threads`.
        side_files: copied byte for byte.
        config_overrides: fields of config.json to replace; without any it is copied byte for byte.
        max_shard_size: bytes of tensor data in one file.
        threads: shards written at the same time.
        extra_files: name -> content of more files, which win over side files of the same name.
        before_publish: may add files (a manifest) to `result.path` before the rename.
        progress: called with the number of bytes of each chunk that is written to a weight file, from any thread.
        plan: a text that names source and settings; complete shards are then recorded, so that a later call can resume.
        resume: keep the complete shards that a killed call with the same plan left.
        replace: take the place of what is there, once everything is complete.

    Raises UserError where `out` exists and is not to be replaced, or where the disk is too small, DataError where the audit finds a difference. After any
    exception nothing is left behind.
    """
    begin = time.perf_counter()
    target = Path(out).absolute()
    if not replace:
        refuse_existing(target)
    shards = plan_shards(tensors, max_shard_size)
    contents = _small_files(shards, side_files, config_overrides, extra_files or {})
    needed = sum(shard.nbytes for shard in shards) + _small_size(contents)
    key = None if plan is None else f"{plan} {hashlib.sha256(b''.join(shard.header for shard in shards)).hexdigest()}"
    with workspace(target, needed, plan=key, resume=resume) as work:
        temporary = work.path
        results = _write_shards(shards, work, threads, progress)
        work.drop_records()
        files = {shard.file: result.record for shard, result in zip(shards, results)}
        files |= {name: _write_small(temporary / name, content) for name, content in contents.items()}
        _audit(temporary, shards, len(contents))
        hashes = {name: value for result in results for name, value in result.tensors.items()}
        size = sum(record.size for record in files.values())
        result = WriteResult(temporary, files, hashes, size, time.perf_counter() - begin, sorted(work.resumed))
        if before_publish is not None:
            before_publish(result)
        publish(temporary, target, taken="replace" if replace else "refuse")
    result.path, result.seconds = target, time.perf_counter() - begin
    return result


def _small_files(
    shards: Sequence[Shard], side_files: Sequence[Path], overrides: Mapping[str, Any] | None, extra: Mapping[str, bytes]
) -> dict[str, bytes | Path]:
    """Every file but the shards: name -> content, or the file to copy."""
    contents: dict[str, bytes | Path] = {item.name: item for item in side_files}
    contents |= extra
    if overrides and CONFIG not in contents:
        raise ValueError(f"config_overrides without a {CONFIG}")
    source = contents.get(CONFIG, b"{}")
    config = json.loads(source.read_bytes() if isinstance(source, Path) else source)
    # What is written here is in no quantised form, whatever the folder was that it came from.
    quantized = QUANTIZED in config
    config.pop(QUANTIZED, None)
    if quantized or overrides:
        config |= dict(overrides or {})
        contents[CONFIG] = (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
    if len(shards) > 1:
        places = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        contents[INDEX] = (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
    for name in contents:
        if Path(name).name != name or name.endswith(".safetensors"):
            raise ValueError(f"{name!r} cannot be the name of a side file")
    return contents


def _small_size(contents: Mapping[str, bytes | Path]) -> int:
    return sum(item.stat().st_size if isinstance(item, Path) else len(item) for item in contents.values())


def _write_small(path: Path, content: bytes | Path) -> FileRecord:
    """Write and fsync one side file."""
    path.unlink(missing_ok=True)  # an interrupted conversion may have left it
    return write_small(path, content.read_bytes() if isinstance(content, Path) else content)


def _write_shards(
    shards: Sequence[Shard], work: Workspace, threads: int, progress: Callable[[int], None] | None
) -> list[ShardResult]:
    """Write all shards, `threads` at a time while others wait for the disk. The first failure stops the others and is raised."""
    cancel, turn = threading.Event(), threading.Semaphore(max(1, threads))

    def one(shard: Shard) -> ShardResult:
        if cancel.is_set():
            raise Cancelled
        done = work.finished(work.path, shard.file)
        if done is not None:
            return ShardResult(FileRecord(done["size"], done["sha256"]), done["tensors"])
        try:
            result = write_shard(shard, work.path / shard.file, cancel=cancel, progress=progress, turn=turn)
            work.record(shard.file, result.record, tensors=result.tensors)
            return result
        except BaseException:
            cancel.set()
            raise

    with ThreadPoolExecutor(max_workers=2 * max(1, threads), thread_name_prefix="shard") as pool:
        futures = [pool.submit(one, shard) for shard in shards]
        try:
            failures = [error for future in futures if (error := future.exception()) is not None]
        except BaseException:  # interrupted while waiting: the pool waits for its threads, so they must hear of it
            cancel.set()
            raise
    for error in failures:
        if not isinstance(error, Cancelled):
            raise error
    return [future.result() for future in futures]


def _audit(directory: Path, shards: Sequence[Shard], small: int) -> None:
    """Open what was written as a reader would, and compare it with the plan."""
    found = {name: (entry.shape, torch_dtype(entry.dtype)) for name, entry in tensor_table(directory).items()}
    planned = {tensor.name: (tuple(tensor.shape), tensor.dtype) for shard in shards for tensor in shard.tensors}
    wrong = sorted(name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name))
    if wrong:
        raise DataError(f"{len(wrong)} written tensors are not as planned, for example {wrong[0]!r}.", where=str(directory))
    if len(list(directory.iterdir())) != len(shards) + small:
        raise DataError("the number of written files is not as planned.", where=str(directory))
    if (directory / CONFIG).exists():
        read_config(directory)
