"""Which checkpoints of a run stay, and how the others go: hidden by one rename first, deleted after that."""

from __future__ import annotations

import contextlib
import math
import re
import secrets
import shutil
from pathlib import Path

from megaswift.errors import DataError
from megaswift.store.faults import fault_point
from megaswift.store.files import sync
from megaswift.store.manifest import quick_check, read_manifest
from megaswift.store.paths import candidates, hf_copy_of, iteration_of

_DEBRIS = re.compile(r"iter_\d{7,}\.tmp-[0-9a-f]+|\.iter_\d{7,}-hf\.tmp-[0-9a-f]+|trash-.+")


def to_keep(root: Path, limit: int, saved: int) -> list[Path]:
    """The checkpoints that stay: the newest `limit` whole ones up to step `saved`, the best by validation loss among them.

    The newest and the best stay even where they are two and `limit` is one.
    """
    whole = [path for path in candidates(root) if 0 < iteration_of(path) <= saved and quick_check(path) is None]
    best = best_of(whole)
    if best is None or best in whole[:limit]:
        return whole[:limit]
    return [*whole[: max(limit - 1, 1)], best]


def best_of(checkpoints: list[Path]) -> Path | None:
    """The one with the lowest validation loss; the newer of two equal ones, None where no loss is known."""
    losses = []
    for path in checkpoints:
        with contextlib.suppress(DataError):
            loss = read_manifest(path).get("eval_loss")
            if isinstance(loss, (int, float)) and math.isfinite(loss):
                losses.append((float(loss), -iteration_of(path), path))
    return min(losses)[2] if losses else None


def delete_beyond(root: Path, limit: int | None, saved: int) -> list[Path]:
    """Delete the checkpoints that do not stay, once `limit` whole ones are there; called by one process. Returns what is gone.

    Args:
        saved: step of the checkpoint that was just written, which is known to be good. Those of later steps were passed over when
            the run was taken up (damaged, or weights alone): none of them counts, and the run will write them anew.

    Only checkpoints older than a whole newer one are deleted, so the only good one never is.
    """
    if limit is None:
        return []
    kept, removed = to_keep(root, limit, saved), []
    for path in candidates(root):
        if len(kept) >= limit and path not in kept and 0 < iteration_of(path) < iteration_of(kept[0]):
            fault_point("keep.before_trash")
            discard(path)
            removed.append(path)
    return removed


def discard(path: Path) -> None:
    """Take a directory out of sight by one rename, then delete it; what cannot be deleted now goes at the next start.

    The Hugging Face copy of a checkpoint goes with it.
    """
    if hf_copy_of(path).is_dir():
        discard(hf_copy_of(path))
    trash = path.with_name(f"trash-{path.name}-{secrets.token_hex(4)}")
    path.rename(trash)
    sync(path.parent)
    fault_point("keep.trashed")
    shutil.rmtree(trash, ignore_errors=True)


def clean(root: Path) -> list[str]:
    """Delete what killed runs left in a run directory; nobody else may be using it. Returns the names."""
    gone = []
    for path in root.iterdir() if root.is_dir() else ():
        if path.is_dir() and not path.is_symlink() and _DEBRIS.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
            gone.append(path.name)
    return sorted(gone)
