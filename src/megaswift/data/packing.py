"""Packing of whole samples into rows of a fixed length."""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray | list[int], max_length: int) -> list[list[int]]:
    """Group samples so that the lengths of each group sum to at most `max_length`, in few groups.

    Each group starts with the longest sample left. Then, as long as something fits: the sample, or the pair of samples,
    that fills the room exactly; where there is none, the longest that fits. The result depends on the lengths alone.
    Sets of lengths are bits of big integers, so a step costs a few operations on max_length bits.

    Args:
        lengths: tokens of each sample, none above `max_length`.
        max_length: tokens that a group holds.

    Returns:
        Sample numbers of each group, each sorted; groups sorted by their first sample.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and int(sizes.max()) > max_length:
        raise ValueError(f"a sample of {int(sizes.max())} tokens does not fit into {max_length}")
    pool = _Pool(sizes, max_length)
    groups = []
    while pool.there:
        size = pool.there.bit_length() - 1
        group, room = [pool.take(size)], max_length - size
        while room and (size := pool.best(room)):
            group.append(pool.take(size))
            room -= size
        groups.append(sorted(group))
    return sorted(groups)


class _Pool:
    """The samples that are left, by length."""

    def __init__(self, sizes: np.ndarray, max_length: int) -> None:
        self.top = max_length
        self.samples: dict[int, list[int]] = {}
        for sample in range(len(sizes) - 1, -1, -1):  # lists are popped from their end: the first sample goes first
            self.samples.setdefault(int(sizes[sample]), []).append(sample)
        self.there = sum(1 << size for size in self.samples)  # bit s: a sample of s tokens is left
        self.mirrored = sum(1 << (max_length - size) for size in self.samples)  # bit top - s, the same read backwards

    def take(self, size: int) -> int:
        stack = self.samples[size]
        sample = stack.pop()
        if not stack:
            self.there ^= 1 << size
            self.mirrored ^= 1 << (self.top - size)
        return sample

    def best(self, room: int) -> int:
        """The length to add to a group with `room` tokens left; 0 when nothing fits."""
        fitting = self.there & ((2 << room) - 1)
        if fitting >> room:
            return room
        # Bit s of `pairs`: s and room - s are both left.
        pairs = fitting & (self.mirrored >> (self.top - room))
        while pairs:
            size = pairs.bit_length() - 1
            if size * 2 != room or len(self.samples[size]) > 1:
                return size
            pairs ^= 1 << size
        return max(fitting.bit_length() - 1, 0)
