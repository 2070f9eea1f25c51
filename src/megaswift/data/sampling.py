"""Which rows of a dataset are trained on, and which validate: `#N` and `--dataset_test_ratio`, as ms-swift counts them.

With L usable rows and N asked for (N = L when not asked): validation gets max(int(min(L, N) * ratio), 1) rows, training
N minus that. Where N is larger than L, whole copies are repeated and the rest is drawn at random.
"""

from __future__ import annotations

import numpy as np

from megaswift.errors import UserError


def split_and_sample(rows: int, count: int | None, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows) as int64 indices below `rows`.

    Args:
        rows: usable rows, at least 1.
        count: N of `#N`, or None.
        ratio: share of validation rows, in [0, 1); with 0, or a single row, there are none.
        seed: the random state starts anew from it for each dataset.
    """
    state = np.random.RandomState(seed)
    wanted = rows if count is None else count
    held_out = max(int(min(rows, wanted) * ratio), 1) if ratio > 0 and rows > 1 and wanted > 1 else 0
    if held_out:
        order = np.random.default_rng(state.randint(0, np.iinfo(np.int32).max)).permutation(rows)
    else:
        order = np.arange(rows)
    validation, rest = order[:held_out], order[held_out:]
    return rest[_repeat(len(rest), wanted - held_out, state)], validation


def sample_validation(rows: int, count: int | None, seed: int, name: str) -> np.ndarray:
    """Rows of a validation dataset: all, or N drawn at random. Raises UserError when N is larger than it is."""
    if count is None or count == rows:
        return np.arange(rows)
    if count > rows:
        raise UserError(
            f"validation data cannot be repeated: {count} rows asked for, {rows} usable.",
            where=f"--val_dataset {name}",
            fix=f"ask for at most #{rows}",
        )
    return np.random.RandomState(seed).permutation(rows)[:count]


def _repeat(rows: int, wanted: int, state: np.random.RandomState) -> np.ndarray:
    """`wanted` indices below `rows`: whole copies in order, then a random part."""
    if wanted == rows:
        return np.arange(rows)
    copies, extra = divmod(wanted, rows)
    return np.concatenate([np.tile(np.arange(rows), copies), state.permutation(rows)[:extra]])
