"""Tokenized rows on disk: written once by the launcher, memory-mapped by every rank.

A directory holds ids.bin (int32), kept.bin (uint8: 1 where there is loss), weights.bin (fp32 weights in the loss; only where
some differ from 1), offsets.npy (where each sample starts), order.npy (the sample at
each place, repeats included), bounds.npy (which places form one row; more than one when packed), desirable.npy (of preferences:
whether each sample is a good answer), values.npy (of samples that are scored: what their scores are compared with) and index.json.
"""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.data.tokens import Encoded
from megaswift.errors import DataError

IGNORED = -100  # label of a token without loss


class RowWriter:
    """Appends samples to a new directory."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.path = path
        self._files = [open(path / name, "wb") for name in ("ids.bin", "kept.bin")]  # noqa: SIM115 (closed by finish)
        self._sizes = array("i")
        self._supervised = array("i")
        self._hash = hashlib.sha256()
        self._weights: Any = None  # the file of weights, once a sample brings some
        self._weights_hash = hashlib.sha256()
        self._largest = -1
        self._desirable: list[bool] | None = None
        self._values: list[list[float]] | None = None

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each sample so far."""
        return np.array(self._sizes, np.int32)

    @property
    def supervised(self) -> np.ndarray:
        """Tokens with loss of each sample so far."""
        return np.array(self._supervised, np.int32)

    def add(
        self,
        ids: np.ndarray,
        kept: np.ndarray,
        sizes: list[int],
        weights: np.ndarray | None = None,
        desirable: list[bool] | None = None,
        values: list[list[float]] | None = None,
    ) -> None:
        """Append samples given end to end: int32 ids, bool kept, the size of each, and fp32 weights where they are not all 1.

        Args:
            desirable: of preferences, whether each sample is a good answer.
            values: of samples that are scored, what the scores of each are compared with.
        """
        if values is not None:
            self._values = self._values or []
            self._values += values
        if desirable is not None:
            self._desirable = self._desirable or []
            self._desirable += desirable
        if weights is not None and self._weights is None:
            self._weights = open(self.path / "weights.bin", "wb")  # noqa: SIM115 (closed by finish)
            for size in self._sizes:
                self._add_weights(np.ones(size, np.float32))
        if self._weights is not None:
            self._add_weights(np.ones(len(ids), np.float32) if weights is None else weights)
        for handle, data in zip(self._files, (ids.astype("<i4").tobytes(), kept.astype(np.uint8).tobytes()), strict=True):
            handle.write(data)
            self._hash.update(data)
        self._sizes.extend(sizes)
        self._largest = max(self._largest, int(ids.max(initial=-1)))
        starts = np.cumsum([0, *sizes[:-1]])
        self._supervised.extend(np.add.reduceat(kept, starts, dtype=np.int32).tolist() if sizes else ())

    def _add_weights(self, weights: np.ndarray) -> None:
        data = weights.astype("<f4").tobytes()
        self._weights.write(data)
        self._weights_hash.update(data)

    def abandon(self) -> None:
        """Close the files of a directory that is given up; a full disk takes not even what is still in their buffers."""
        for handle in (*self._files, *([] if self._weights is None else [self._weights])):
            with suppress(OSError):
                handle.close()

    def finish(self, order: np.ndarray, bounds: np.ndarray | None, answers: int = 1, mismatched: bool = False) -> str:
        """Write the tables and the index; returns the fingerprint. Row r holds the places bounds[r] to bounds[r + 1].

        Args:
            answers: places of one example, which stand side by side in one row: 2 for pairs.
            mismatched: of the two, the second is the question with the answer to another one.
        """
        for handle in self._files:
            handle.close()
        if self._weights is not None:
            self._weights.close()
            self._hash.update(self._weights_hash.digest())
        if bounds is None:
            bounds = np.arange(0, len(order) + 1, answers)
        offsets = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)]).astype(np.int64)
        tables = {"offsets": offsets, "order": order.astype(np.int64), "bounds": bounds.astype(np.int64)}
        if self._desirable is not None:
            tables["desirable"] = np.array(self._desirable, bool)
        if self._values is not None:
            tables["values"] = np.array(self._values, np.float32)
        for name, table in tables.items():
            whole = io.BytesIO()  # of a full disk, saving into the file itself tells neither kind nor place
            np.save(whole, table)
            (self.path / f"{name}.npy").write_bytes(whole.getbuffer())
            self._hash.update(table.tobytes())
        index: dict[str, Any] = {
            "format": 1,
            "samples": len(self._sizes),
            "rows": len(bounds) - 1,
            "fingerprint": self._hash.hexdigest()[:32],
            "largest_id": self._largest,
        }
        if self._weights is not None:
            index["weights"] = True
        if self._desirable is not None:
            index |= {"answers": answers, "mismatched": mismatched}
        if self._values is not None:
            index["values"] = True
        (self.path / "index.json").write_text(json.dumps(index), encoding="utf-8")
        return str(index["fingerprint"])


class TokenRows:
    """Rows of token ids and labels, read through a memory map; made by `open`.

    Attributes:
        lengths: int32 array, tokens of each row.
        fingerprint: text that is the same exactly when the rows, their order and their packing are the same.
        largest_id: the largest token id of all rows.
        answers: samples of one example, side by side in one row: 2 for pairs of a chosen and a rejected answer.
        mismatched: every second sample is a question with the answer to another one, and not for training.
        reference: fp32, of each place the log-probability that the reference gives to its supervised tokens; put here by
            whoever computed them.
        in_order: they are to be taken in the order that they have, which does not end.
    """

    in_order = False

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path, self.fingerprint, self.largest_id = path, str(index["fingerprint"]), int(index["largest_id"])
        self._offsets = np.load(path / "offsets.npy", mmap_mode="r")
        self._order = np.load(path / "order.npy", mmap_mode="r")
        self._bounds = np.load(path / "bounds.npy", mmap_mode="r")
        self._ids = _map(path / "ids.bin", "<i4", int(self._offsets[-1]))
        self._kept = _map(path / "kept.bin", "u1", int(self._offsets[-1]))
        self._weights = _map(path / "weights.bin", "<f4", int(self._offsets[-1])) if index.get("weights") else None
        ends = np.concatenate([[0], np.cumsum(self.sizes)])
        self.lengths: np.ndarray = np.diff(ends[self._bounds]).astype(np.int32)
        self.answers = int(index.get("answers", 1))
        self.mismatched = bool(index.get("mismatched", False))
        self.packed = len(self._order) != len(self.lengths) * self.answers
        self._desirable = np.load(path / "desirable.npy") if "answers" in index else None
        self._values = np.load(path / "values.npy") if index.get("values") else None
        self.reference: np.ndarray | None = None

    @classmethod
    def open(cls, path: Path | str) -> TokenRows:
        """Open a directory written by RowWriter. Raises DataError when it is not whole."""
        path = Path(path)
        try:
            return cls(path, json.loads((path / "index.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"the tokenized data cannot be read: {error}.", where=str(path), fix="delete this directory; it is made again"
            ) from error

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 where there is none."""
        return int(self.lengths.max(initial=0))

    def require_within(self, rows: int, pad_id: int) -> None:
        """Raise DataError where a token, or the one that fills up rows, has no row in an embedding of `rows` rows.

        A rank that holds a part of the embedding takes an id outside of it for another rank's, and so would all of them.
        """
        largest = max(self.largest_id, pad_id)
        if largest >= rows:
            raise DataError(
                f"the data has the token id {largest}, and the model's embedding has {rows:,} rows.",
                where=str(self.path),
                fix="prepare the data with this model's own tokenizer",
            )

    def samples(self, row: int) -> list[Encoded]:
        """The samples of a row: one, or several when packed."""
        return [self.stored(sample) for sample in self._order[self._bounds[row] : self._bounds[row + 1]].tolist()]

    def places(self, row: int) -> slice:
        """Where the samples of a row stand among all."""
        return slice(int(self._bounds[row]), int(self._bounds[row + 1]))

    @property
    def has_preferences(self) -> bool:
        """Whether samples are good and bad answers."""
        return self._desirable is not None

    def desirable(self, row: int) -> np.ndarray:
        """bool, of each sample of a row whether it is a good answer. Only of rows that are preferences."""
        assert self._desirable is not None
        return np.asarray(self._desirable[self._order[self.places(row)]])

    def is_desirable(self, sample: int) -> bool:
        """Whether a sample, by its number on disk, is a good answer. Only of rows that are preferences."""
        assert self._desirable is not None
        return bool(self._desirable[sample])

    @property
    def is_scored(self) -> bool:
        """Whether samples are scored as wholes."""
        return self._values is not None

    def values(self, row: int) -> np.ndarray:
        """fp32 [samples, n], what the scores of each sample of a row are compared with. Only of rows that are scored."""
        assert self._values is not None
        return np.asarray(self._values[self._order[self.places(row)]])

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each sample as it is used, repeats included (int64)."""
        return np.diff(self._offsets)[self._order]

    @property
    def count_stored(self) -> int:
        """Samples on disk, where repeats are stored once."""
        return len(self._offsets) - 1

    def stored(self, sample: int) -> Encoded:
        """One sample by its number on disk."""
        first, last = int(self._offsets[sample]), int(self._offsets[sample + 1])
        weights = None if self._weights is None else np.asarray(self._weights[first:last])
        return Encoded(np.asarray(self._ids[first:last]), np.asarray(self._kept[first:last]).view(bool), weights)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of a row, both int32 [length]; labels are the ids where they carry loss, else -100; not shifted."""
        samples = self.samples(row)
        ids = np.concatenate([sample.ids for sample in samples])
        kept = np.concatenate([sample.kept for sample in samples])
        return ids, np.where(kept, ids, np.int32(IGNORED))


def _map(path: Path, kind: str, size: int) -> np.ndarray:
    if path.stat().st_size != size * np.dtype(kind).itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, expected {size * np.dtype(kind).itemsize}")
    return np.memmap(path, kind, "r", shape=(size,)) if size else np.zeros(0, kind)
