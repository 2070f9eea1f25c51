"""Which rows a step sees, and their tensors: a pure function of (seed, step), the same for every data-parallel layout.

batches = Batches(rows, micro_batch_size=1, global_batch_size=16, dp_rank=0, dp_size=2, seed=42, pad_id=0)
for step, micros in prefetch(batches, first_step, last_step, threads=1): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from megaswift.data.store import IGNORED, TokenRows
from megaswift.data.tokens import Encoded, pooled_place, weights_of
from megaswift.errors import DataError, UserError

if TYPE_CHECKING:
    from torch import Tensor

LENGTH_WINDOW = 50  # global batches among which group_by_length sorts


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], shifted left by one inside each sample; -100 where there is no loss.
        weights: fp32 [b, s], what the loss at each label is multiplied by, 0 where there is none; None: 1 at every label.
        position_ids: int64 [b, s]; they restart at 0 in each sample.
        cu_seqlens: int32 [n + 1], borders of the samples that share the one row (b == 1); None for plain causal rows.
        sample_ids: rows of the data in it.
        padding: bool [b, s], True at tokens that only fill up; None: there are none.
        origins: int64 [b, s], which token each is, whatever the layout: row of the data x 2^32 + place in that row.
        desirable: bool [samples], of preferences: whether each sample is a good answer, in the order of the rows.
        values: fp32 [samples, n], of samples that are scored: what the scores of each are compared with.
        pooled: bool [b, s], True at the one token of each of these whose state is scored: the last one that is not `pad_id`.
        reference: fp32 [samples], the log-probability that the reference gives to the labels of each.
        mismatched: of answers with labels, the same questions with answers to others, as a micro batch of its own.
        share: where several ranks share each row, which part these tokens are: a Share of engine.kernels.context_parallel, made there.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    sample_ids: tuple[int, ...]
    weights: Tensor | None = None
    share: Any = None
    padding: Tensor | None = None
    origins: Tensor | None = None
    desirable: Tensor | None = None
    reference: Tensor | None = None
    mismatched: MicroBatch | None = None
    values: Tensor | None = None
    pooled: Tensor | None = None


class Batches:
    """Training batches of one data-parallel rank.

    Epoch e is a permutation from (seed, e) alone; step k takes places k * global_batch_size and on of the endless
    stream of epochs. Rows that have an order without end themselves are taken in it. Within a global batch, rows of similar length share a micro batch (padded rows), or micro batches
    get about equal numbers of tokens (padding-free); ranks work at the same time on micro batches of similar size.

    Args:
        rows: the tokenized rows.
        micro_batch_size: rows in one micro batch.
        global_batch_size: rows in one step, all ranks together; a multiple of micro_batch_size * dp_size.
        dp_rank, dp_size: which data-parallel rank this is, and of how many.
        seed: seed of the order.
        pad_id: token id of padding.
        shuffle: False keeps the order of the rows.
        group_by_length: draw rows of similar length into one global batch.
        padding_free: lay the rows of a micro batch end to end; False pads them to the longest.
        pad_multiple: micro batches are padded to a multiple of this many tokens (sequence and context parallelism need it).

    Raises:
        UserError: global_batch_size does not divide.
        DataError: fewer rows than one global batch.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        pad_id: int,
        shuffle: bool = True,
        group_by_length: bool = False,
        padding_free: bool = True,
        pad_multiple: int = 1,
    ) -> None:
        _check_sizes(micro_batch_size, global_batch_size, dp_size)
        require_rows(rows, global_batch_size)
        self.rows, self.micro, self.size = rows, micro_batch_size, global_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.seed, self.shuffle, self.group_by_length = seed, shuffle and not rows.in_order, group_by_length
        self.padding_free, self.pad_multiple, self.pad_id = padding_free, pad_multiple, pad_id
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def fingerprint(self) -> str:
        """Changes when the rows, their order or the way they are drawn do; a resumed run compares it."""
        return f"{self.rows.fingerprint}-{self.seed}-{int(self.shuffle)}{int(self.group_by_length)}"

    def sample_ids(self, step: int) -> np.ndarray:
        """The rows of a step, all ranks together, in the order of the stream."""
        count = len(self.rows)
        first, last = step * self.size, (step + 1) * self.size
        if self.rows.in_order:
            return np.arange(first, last)
        parts = []
        while first < last:
            epoch, place = divmod(first, count)
            part = self._epoch(epoch)[place : min(count, place + last - first)]
            parts.append(part)
            first += len(part)
        return np.concatenate(parts)

    def step(self, step: int) -> list[MicroBatch]:
        """The micro batches of this rank for one step: global_batch_size / (micro_batch_size * dp_size) of them."""
        ids = self.sample_ids(step)
        groups = self._groups(ids, self.rows.lengths[ids])
        return [self._micro(groups[k]) for k in range(self.dp_rank, len(groups), self.dp_size)]

    def _make_epoch(self, epoch: int) -> np.ndarray:
        count = len(self.rows)
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(count) if self.shuffle else np.arange(count)
        if not self.group_by_length:
            return order
        lengths = self.rows.lengths
        window = LENGTH_WINDOW * self.size
        blocks = []
        for first in range(0, count, window):
            part = order[first : first + window]
            part = part[np.argsort(-lengths[part], kind="stable")]
            blocks += [part[k : k + self.size] for k in range(0, len(part), self.size)]
        whole = [block for block in blocks if len(block) == self.size]
        rest = [block for block in blocks if len(block) < self.size]
        shuffled = [whole[k] for k in (random.permutation(len(whole)) if self.shuffle else range(len(whole)))]
        return np.concatenate(shuffled + rest)

    def _groups(self, ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Row numbers of every micro batch of a step, similar ones next to each other; rank r works on r, r + dp, ..."""
        by_length = ids[np.lexsort((ids, -lengths))]
        count = len(ids) // self.micro
        if not self.padding_free or self.micro == 1:
            return list(by_length.reshape(count, self.micro))
        # Deal like cards, turning around at each end, so that every micro batch gets long and short rows.
        deal = by_length.reshape(self.micro, count)
        deal[1::2] = deal[1::2, ::-1].copy()
        groups = list(deal.T)
        return sorted(groups, key=lambda group: (-int(self.rows.lengths[group].sum()), int(group[0])))

    def _micro(self, group: np.ndarray) -> MicroBatch:
        return make_micro_batch(self.rows, group.tolist(), self.padding_free, self.pad_multiple, self.pad_id)


class EvalBatches:
    """Validation batches of one data-parallel rank: every row exactly once, and as many micro batches on each rank.

    Arguments are those of Batches. What is missing in the last step is filled with micro batches without loss.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        pad_id: int,
        padding_free: bool = True,
        pad_multiple: int = 1,
    ) -> None:
        _check_sizes(micro_batch_size, global_batch_size, dp_size)
        self.rows, self.micro, self.size = rows, micro_batch_size, global_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.padding_free, self.pad_multiple, self.pad_id = padding_free, pad_multiple, pad_id
        self._order = np.argsort(-rows.lengths, kind="stable")

    def __len__(self) -> int:
        """Steps of one evaluation: ceil(rows / global_batch_size)."""
        return -(-len(self.rows) // self.size)

    def step(self, step: int) -> list[MicroBatch]:
        """The micro batches of this rank for one step; an empty one has sample_ids () and no label."""
        ids = self._order[step * self.size : (step + 1) * self.size]
        result = []
        for k in range(self.dp_rank, self.size // self.micro, self.dp_size):
            group = ids[k * self.micro : (k + 1) * self.micro]
            result.append(make_micro_batch(self.rows, group.tolist(), self.padding_free, self.pad_multiple, self.pad_id))
        return result


def make_micro_batch(rows: TokenRows, group: list[int], padding_free: bool, pad_multiple: int, pad_id: int) -> MicroBatch:
    """The tensors of some rows. Packed rows share one row of tokens even when padding_free is False."""
    how = (padding_free, pad_multiple, pad_id)
    if not rows.mismatched:
        return _micro_batch(rows, group, slice(None), rows.answers, *how)
    beside = _micro_batch(rows, group, slice(1, None, 2), 1, *how)
    return replace(_micro_batch(rows, group, slice(0, None, 2), 1, *how), mismatched=beside)


def _micro_batch(
    rows: TokenRows, group: list[int], which: slice, answers: int, padding_free: bool, pad_multiple: int, pad_id: int
) -> MicroBatch:
    """The tensors of some of the samples of some rows.

    Args:
        which: of each row's samples; answers: how many of them an example has.
    """
    by_row = [rows.samples(row)[which] for row in group]
    samples = [sample for row in by_row for sample in row]
    if not samples:
        empty = Encoded(np.full(1, pad_id, np.int32), np.zeros(1, bool))
        batch = _end_to_end([empty], tuple(group), pad_multiple, pad_id)
        if rows.is_scored:
            batch = replace(batch, pooled=batch.labels != IGNORED)
        return replace(batch, padding=batch.labels == IGNORED, **_preferences(rows, group, which))
    pooled = [_pooled(sample, pad_id) for sample in samples if rows.is_scored]
    origins = [(row << 32) + np.arange(sum(len(s.ids) for s in own), dtype=np.int64) for row, own in zip(group, by_row)]
    if padding_free or len(samples) > len(group) * answers:
        made = _end_to_end(samples, tuple(group), pad_multiple, pad_id)
        origins, pooled = (
            [np.concatenate([*origins, np.zeros(0, np.int64)])],
            [np.concatenate([*pooled, np.zeros(0, np.int64)])],
        )
    else:
        made = _padded(samples, tuple(group), pad_multiple, pad_id)
        ends = np.cumsum([len(sample.ids) for sample in samples])
        origins = np.split(np.concatenate(origins), ends[:-1])
    if rows.is_scored:
        made = replace(made, pooled=_side_by_side(pooled, made.tokens.shape[1]).bool())
    return replace(made, origins=_side_by_side(origins, made.tokens.shape[1]), **_preferences(rows, group, which))


def _pooled(sample: Encoded, pad_id: int) -> np.ndarray:
    """int64, 1 at the token of a sample whose state is scored."""
    marked = np.zeros(len(sample.ids), np.int64)
    marked[pooled_place(sample.ids, pad_id)] = 1
    return marked


def _preferences(rows: TokenRows, group: list[int], which: slice) -> dict[str, Any]:
    """What a micro batch of preferences knows of its samples."""
    import torch

    found: dict[str, Any] = {}
    if rows.has_preferences:
        parts = [rows.desirable(row)[which] for row in group]
        found["desirable"] = torch.from_numpy(np.concatenate([*parts, np.zeros(0, bool)]))
    if rows.is_scored:
        parts = [rows.values(row)[which] for row in group]
        found["values"] = torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros((0, 1))
    if rows.reference is not None:
        parts = [rows.reference[rows.places(row)][which] for row in group]
        found["reference"] = torch.from_numpy(np.concatenate([*parts, np.zeros(0, np.float32)]))
    return found


def _side_by_side(rows: list[np.ndarray], width: int) -> Tensor:
    """int64 [rows, width]; what is missing at the end of a row is 0."""
    import torch

    table = np.zeros((len(rows), width), np.int64)
    for row, values in zip(table, rows):
        row[: len(values)] = values
    return torch.from_numpy(table)


def prefetch(
    batches: Batches | EvalBatches, first_step: int, last_step: int, threads: int
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, micro batches) of steps first_step to last_step, without the last; `threads` prepare ahead, 0: none do."""
    if threads <= 0:
        for step in range(first_step, last_step):
            yield step, batches.step(step)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads, "batches") as pool:
        pending = [
            (step, pool.submit(batches.step, step)) for step in range(first_step, min(last_step, first_step + threads + 1))
        ]
        try:
            while pending:
                step, future = pending.pop(0)
                following = step + threads + 1
                if following < last_step:
                    pending.append((following, pool.submit(batches.step, following)))
                yield step, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def require_rows(rows: TokenRows, global_batch_size: int) -> None:
    """Raise DataError when the data is smaller than one global batch; rows without end are enough for any."""
    if len(rows) < global_batch_size and not rows.in_order:
        raise DataError(
            f"{len(rows)} training rows are fewer than one global batch of {global_batch_size}.",
            where="--dataset",
            fix="ask for more rows (name#N repeats them), or lower --gradient_accumulation_steps or --batch_size",
        )


def _check_sizes(micro: int, size: int, dp_size: int) -> None:
    if size % (micro * dp_size):
        unit = micro * dp_size
        raise UserError(
            f"a global batch of {size} rows does not divide into micro batches of {micro} on {dp_size} data-parallel ranks.",
            where="--batch_size",
            fix=f"use a global batch of {max(size // unit, 1) * unit} or {(size // unit + 1) * unit}",
        )


def _labels(sample: Encoded) -> np.ndarray:
    """What each place must predict: the next token where it carries loss; the last place what follows, if the sample says it."""
    labels = np.full(len(sample.ids), IGNORED, np.int64)
    labels[:-1] = np.where(sample.kept[1:], sample.ids[1:], IGNORED)
    if sample.following is not None:
        labels[-1] = sample.following
    return labels


def _weights(sample: Encoded) -> np.ndarray:
    """fp32: the weight of what each place must predict."""
    return np.append(weights_of(sample)[1:], np.float32(0))


def _weighted(samples: list[Encoded]) -> bool:
    return any(sample.weights is not None for sample in samples)


def _end_to_end(samples: list[Encoded], group: tuple[int, ...], pad_multiple: int, pad_id: int) -> MicroBatch:
    import torch

    sizes = [len(sample.ids) for sample in samples]
    tail = -sum(sizes) % pad_multiple
    tokens = np.concatenate([*(sample.ids for sample in samples), np.full(tail, pad_id)]).astype(np.int64)
    labels = np.concatenate([*map(_labels, samples), np.full(tail, IGNORED, np.int64)])
    parts = sizes + ([tail] if tail else [])
    positions = np.concatenate([np.arange(size) for size in parts])
    borders = None
    if len(samples) > 1:  # one sample with a padded tail is a plain causal row
        borders = torch.from_numpy(np.concatenate([[0], np.cumsum(parts)]).astype(np.int32))
    row = [torch.from_numpy(array[None]) for array in (tokens, labels, positions)]
    weights = None
    if _weighted(samples):
        weights = torch.from_numpy(np.concatenate([*map(_weights, samples), np.zeros(tail, np.float32)])[None])
    padding = torch.arange(len(tokens))[None] >= sum(sizes) if tail else None
    return MicroBatch(row[0], row[1], row[2], borders, group, weights, padding=padding)


def _padded(samples: list[Encoded], group: tuple[int, ...], pad_multiple: int, pad_id: int) -> MicroBatch:
    import torch

    width = max(len(sample.ids) for sample in samples)
    width += -width % pad_multiple
    tokens = np.full((len(samples), width), pad_id, np.int64)
    labels = np.full((len(samples), width), IGNORED, np.int64)
    for k, sample in enumerate(samples):
        tokens[k, : len(sample.ids)] = sample.ids
        labels[k, : len(sample.ids)] = _labels(sample)
    weights = None
    if _weighted(samples):
        weights = torch.zeros((len(samples), width))
        for k, sample in enumerate(samples):
            weights[k, : len(sample.ids)] = torch.from_numpy(_weights(sample))
    positions = np.broadcast_to(np.arange(width), tokens.shape).copy()
    numbers = [torch.from_numpy(array) for array in (tokens, labels, positions)]
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    padding = None if lengths.min() == width else torch.arange(width)[None] >= lengths[:, None]
    return MicroBatch(numbers[0], numbers[1], numbers[2], None, group, weights, padding=padding)
