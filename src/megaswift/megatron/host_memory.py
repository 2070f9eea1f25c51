"""Memory of CPU runs: what one step frees stays with the process for the next one."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_LARGEST = 32 << 20  # bytes; the most that glibc takes as threshold on 64 bits


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep freed memory inside this context, and give it back at its end.

    glibc returns freed memory to the system as soon as 64 MB of it lie together, so every step would ask for its
    activations anew, one page fault for every 4 kB. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        libc.malloc_trim(0)
