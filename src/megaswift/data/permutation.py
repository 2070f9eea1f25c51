"""A permutation of any number of rows that holds no list of them: a Feistel network with cycle walking.

order = Permutation(rows, seed, part, epoch)
order(0), order(1), ...                          # each number below `rows` once
"""

from __future__ import annotations

import hashlib
import struct

ROUNDS = 6


class Permutation:
    """A bijection of the numbers below `size`, drawn from the key alone: O(1) memory, a few microseconds a number.

    Numbers are cut into two halves of bits, which a Feistel network mixes; what falls outside of `size` goes through it again,
    less than four times on average (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002: cycle walking).

    Args:
        size: at least 1.
        key: whole numbers from 0 on; other keys give other orders.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        text = struct.pack(f"<{len(key) + 1}Q", size, *key)
        words = hashlib.blake2b(text, digest_size=8 * ROUNDS).digest()
        self._keys = struct.unpack(f"<{ROUNDS}Q", words)

    def __call__(self, number: int) -> int:
        """Where the number goes."""
        if not 0 <= number < self.size:
            raise IndexError(f"{number} is not below {self.size}")
        number = self._mixed(number)
        while number >= self.size:
            number = self._mixed(number)
        return number

    def _mixed(self, number: int) -> int:
        left, right = number >> self._half, number & self._mask
        for key in self._keys:
            left, right = right, left ^ (_scrambled(right ^ key) & self._mask)
        return left << self._half | right


def _scrambled(value: int) -> int:
    """64 bits out of 64, each depending on all: the finalizer of splitmix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
