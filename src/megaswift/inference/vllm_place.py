"""One name for every model folder, so that vLLM finds what it compiled for other weights of the same form.

vLLM keeps compiled code under a hash of everything that decides about it, and of the model's path, which does not: every
new checkpoint of a run would be compiled again, a minute or more, to the same code. So vLLM is given the name "model" and a
working directory in which that is a link to the folder. Which directory it is depends on the folder, so that processes
with different models do not meet.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from megaswift.store.cache import cache_root

NAME = "model"


def place_of(path: Path) -> Path | None:
    """A directory whose entry NAME is a link to the folder; None where the cache cannot be written."""
    target = path.resolve()
    place = cache_root().resolve() / "vllm" / hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
    try:
        place.mkdir(parents=True, exist_ok=True)
        _forget_deleted(place.parent)
        with contextlib.suppress(FileExistsError):
            (place / NAME).symlink_to(target)
    except OSError:
        return None
    return place


@contextlib.contextmanager
def under_one_name(path: Path) -> Iterator[str]:
    """The name for vLLM; the working directory is the one in which it is valid until the block ends.

    Processes that begin in the block keep that directory; what this one keeps of the name afterwards means nothing any more.
    """
    place = place_of(path)
    if place is None:
        yield str(path)
        return
    before = Path.cwd()
    os.chdir(place)
    try:
        yield NAME
    finally:
        os.chdir(before)


def _forget_deleted(places: Path) -> None:
    """Remove the directories of folders that are not there any more."""
    for place in places.iterdir():
        link = place / NAME
        if link.is_symlink() and not link.exists():
            with contextlib.suppress(OSError):
                link.unlink()
                place.rmdir()
