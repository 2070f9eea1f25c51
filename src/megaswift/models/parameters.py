"""A model's tensors as one list: where each lies in a checkpoint, which rows of Hugging Face tensors it is made of, how it is cut.

Everything that reads, writes, counts or compares weights walks this list; names are whole, nothing is a template any more.
Every arrangement is a plan of rows and no value is ever changed, so both directions are bit-exact. `Arrangement` is the only
place in which a tensor is taken apart or put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows first, first + step, ... below `last` of one of a parameter's Hugging Face tensors."""

    tensor: int
    first: int
    last: int
    step: int = 1

    @property
    def count(self) -> int:
        return -(-(self.last - self.first) // self.step)

    def part(self, skipped: int, count: int) -> Piece:
        """`count` of its rows, without the first `skipped`."""
        first = self.first + skipped * self.step
        return replace(self, first=first, last=min(self.last, first + count * self.step))


@dataclass(frozen=True)
class Arrangement:
    """How the rows of a Megatron tensor are made of rows of Hugging Face tensors, and how tensor parallelism cuts it.

    Args:
        pieces: the Megatron tensor's rows from the first to the last; together they hold every row of every Hugging Face
            tensor once.
        blocks: rows that tensor parallelism cuts as one, each evenly: a rank holds its part of every block, one after the other.
        split: the axis that is cut: 0, 1 (`blocks` is then of no use), or None where every rank holds the whole.
    """

    pieces: tuple[Piece, ...]
    blocks: tuple[int, ...]
    split: int | None = 0

    @cached_property
    def size(self) -> int:
        """Rows of the Megatron tensor."""
        return sum(piece.count for piece in self.pieces)

    @cached_property
    def is_whole(self) -> bool:
        """Whether it is one Hugging Face tensor as it stands."""
        return len(self.pieces) == 1 and self.pieces[0].step == 1

    def rows(self, first: int, last: int) -> list[Piece]:
        """Which Hugging Face rows make rows `first` up to, not including, `last`."""
        found, place = [], 0
        for piece in self.pieces:
            low, high = max(first - place, 0), min(last - place, piece.count)
            if low < high:
                found.append(piece.part(low, high - low))
            place += piece.count
        return found

    def run(self, tensor: int) -> tuple[int, int] | None:
        """First row, and the one after the last, where a Hugging Face tensor lies in one piece; None where it is spread."""
        place = 0
        for piece in self.pieces:
            if piece.tensor == tensor:
                alone = piece.step == 1 and sum(other.tensor == tensor for other in self.pieces) == 1
                return (place, place + piece.count) if alone else None
            place += piece.count
        return None

    def only(self, tensors: Sequence[int]) -> Arrangement:
        """The same of some of its Hugging Face tensors, which are counted anew: what an adapter beside them is made of."""
        order = {number: place for place, number in enumerate(tensors)}
        blocks, place = [], 0
        for block in self.blocks:
            blocks.append(sum(piece.count for piece in self.rows(place, place + block) if piece.tensor in order))
            place += block
        pieces = [replace(piece, tensor=order[piece.tensor]) for piece in self.pieces if piece.tensor in order]
        return replace(self, pieces=tuple(pieces), blocks=tuple(block for block in blocks if block))

    def turns(self, tp: int = 1) -> tuple[int, list[tuple[int, int]]]:
        """How the Hugging Face tensors take turns in a rank's rows: how often, and (tensor, rows) of one turn.

        Raises ValueError for rows that do not repeat in this way.
        """
        runs: list[tuple[int, int]] = []
        border, borders = 0, {sum(self.blocks[:number]) for number in range(len(self.blocks))}
        for piece in self.pieces:
            if runs and runs[-1][0] == piece.tensor and border not in borders:
                runs[-1] = (piece.tensor, runs[-1][1] + piece.count)
            else:
                runs.append((piece.tensor, piece.count))
            border += piece.count
        cut = tp if self.split == 0 else 1
        if len(self.blocks) > 1 or len(runs) == 1:  # every block is cut in itself
            if any(count % cut for _, count in runs):
                raise ValueError(f"rows {runs} do not divide by {cut}")
            return 1, [(tensor, count // cut) for tensor, count in runs]
        turn = next(length for length in range(1, len(runs) + 1) if runs == runs[:length] * (len(runs) // length))
        groups, rest = divmod(len(runs) // turn, cut)
        if rest:
            raise ValueError(f"{len(runs) // turn} groups of rows do not divide by {cut}")
        return groups, runs[:turn]

    def places(self, tp: int, rank: int) -> list[tuple[int, int, int]]:
        """Where a rank's part lies: (its first row, the first row in the whole tensor, rows) of each piece in one."""
        if self.split != 0 or tp == 1:
            return [(0, 0, self.size)]
        found, local, start = [], 0, 0
        for block in self.blocks:
            found.append((local, start + rank * (block // tp), block // tp))
            local, start = local + block // tp, start + block
        return found

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors -> the Megatron tensor."""
        import torch

        if self.is_whole:
            return parts[0]
        return torch.cat([parts[piece.tensor][piece.first : piece.last : piece.step] for piece in self.pieces])

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """The Megatron tensor -> Hugging Face tensors; rows beyond the last one (vocabulary padding) are dropped."""
        if self.is_whole:
            return [tensor[: self.size]]
        counts: dict[int, int] = {}
        for piece in self.pieces:
            counts[piece.tensor] = counts.get(piece.tensor, 0) + piece.count
        parts = [tensor.new_empty((counts[number], *tensor.shape[1:])) for number in range(len(counts))]
        place = 0
        for piece in self.pieces:
            parts[piece.tensor][piece.first : piece.last : piece.step] = tensor[place : place + piece.count]
            place += piece.count
        return parts

    def shard(self, tensor: Tensor, tp: int) -> list[Tensor]:
        """The Megatron tensor -> one piece for each tensor-parallel rank."""
        import torch

        if self.split is None or tp == 1:
            return [tensor] * tp
        if self.split or len(self.blocks) == 1:
            return list(tensor.chunk(tp, self.split))
        cut = [block.chunk(tp) for block in tensor.split(list(self.blocks))]
        return [torch.cat([block[rank] for block in cut]) for rank in range(tp)]

    def merge(self, pieces: Sequence[Tensor]) -> Tensor:
        """Pieces of all tensor-parallel ranks -> the Megatron tensor."""
        import torch

        if self.split is None or len(pieces) == 1:
            return pieces[0]
        if self.split or len(self.blocks) == 1:
            return torch.cat(list(pieces), self.split)
        sizes = [block // len(pieces) for block in self.blocks]
        cut = [piece.split(sizes) for piece in pieces]
        return torch.cat([piece[number] for number in range(len(sizes)) for piece in cut])


def whole(rows: int, split: int | None = None) -> Arrangement:
    """One Hugging Face tensor as it stands."""
    return Arrangement((Piece(0, 0, rows),), (rows,), split)


def stacked(*rows: int) -> Arrangement:
    """Tensors one above the other; tensor parallelism cuts inside each (gate over up)."""
    return Arrangement(tuple(Piece(number, 0, count) for number, count in enumerate(rows)), rows)


def alternating(rows: int) -> Arrangement:
    """One Hugging Face tensor in which the rows of two alternate: they stand one above the other here, `rows` of each, cut inside each."""
    return Arrangement((Piece(0, 0, 2 * rows, 2), Piece(0, 1, 2 * rows, 2)), (rows, rows))


def grouped(groups: int, *rows: int) -> Arrangement:
    """`groups` times some rows of each tensor: queries, key and value of a key/value head, for each such head.

    Args:
        rows: of each tensor in one group.
    """
    pieces = [Piece(number, group * count, (group + 1) * count) for group in range(groups) for number, count in enumerate(rows)]
    return Arrangement(tuple(pieces), (groups * sum(rows),))


def halves(heads: int, size: int, width: int | None = None, first: int = 0) -> Callable[[Piece], list[Piece]]:
    """For `rearranged`: rotation by neighbours becomes rotation by halves, a permutation of the rows of each head.

    Args:
        heads, size: of the tensor; rows of a head are `size`.
        width: rows of a head that rotate; default: all.
        first: rows of a head before those.
    """
    wide = size if width is None else width

    def order(piece: Piece) -> list[Piece]:
        made = []
        for head in range(piece.first // size, piece.last // size):
            start = head * size
            spans = [
                (start, start + first, 1),
                (start + first, start + first + wide, 2),
                (start + first + 1, start + first + wide, 2),
            ]
            spans.append((start + first + wide, start + size, 1))
            made += [Piece(piece.tensor, low, high, step) for low, high, step in spans if low < high]
        return made

    if size % 2 or wide % 2 or first + wide > size or heads < 1:
        raise ValueError(f"{wide} rotating rows from {first} on do not fit heads of {size}")
    return order


def rearranged(arrangement: Arrangement, order: Callable[[Piece], list[Piece]], tensors: Sequence[int]) -> Arrangement:
    """An arrangement whose pieces of some tensors, which must be whole heads, have their rows in another order."""
    pieces = [one for piece in arrangement.pieces for one in (order(piece) if piece.tensor in tensors else [piece])]
    return replace(arrangement, pieces=tuple(pieces))


def fused(arrangement: Arrangement, rows: Sequence[int]) -> Arrangement:
    """An arrangement of tensors that the Hugging Face folder holds as one, one above the other.

    Args:
        rows: of each of them, in the order in which they stand there.
    """
    starts = [sum(rows[:number]) for number in range(len(rows))]
    pieces = [
        Piece(0, starts[piece.tensor] + piece.first, starts[piece.tensor] + piece.last, piece.step)
        for piece in arrangement.pieces
    ]
    joined: list[Piece] = []
    for piece in pieces:
        if joined and piece.step == joined[-1].step == 1 and joined[-1].last == piece.first:
            joined[-1] = replace(joined[-1], last=piece.last)
        else:
            joined.append(piece)
    return replace(arrangement, pieces=tuple(joined))


@dataclass(frozen=True)
class HFTensor:
    """A tensor of a Hugging Face folder, or the part of one that a parameter is made of.

    Args:
        name: as it stands in the folder.
        shape: of the part, with the rows first.
        index: where the part stands on the first axis of a tensor that holds several (experts); None: it is the tensor.
        count: how many it holds then.
        transposed: the folder holds the part with rows and columns exchanged.
        held: the name under which transformers has it once the model is loaded, where that is another.
    """

    name: str
    shape: Shape
    index: int | None = None
    count: int = 1
    transposed: bool = False
    held: str | None = None

    @property
    def in_model(self) -> str:
        """Its name in transformers' loaded model: what modules are called by, and what PEFT's names follow from."""
        return self.held or self.name

    @property
    def label(self) -> str:
        """The name, with the place of the part where it is one of several: what hashes and precisions are noted under."""
        return self.name if self.index is None or self.count == 1 else f"{self.name}[{self.index}]"

    @property
    def stored_shape(self) -> Shape:
        """Shape of the tensor in the folder."""
        own = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape
        return own if self.index is None else (self.count, *own)

    def of(self, tensor: Tensor) -> Tensor:
        """The part, of the folder's tensor."""
        own = tensor if self.index is None else tensor[self.index]
        return own.transpose(-1, -2) if self.transposed else own

    def stored(self, part: Tensor) -> Tensor:
        """The part as the folder holds it (at its index)."""
        return part.transpose(-1, -2) if self.transposed else part


@dataclass(frozen=True)
class Parameter:
    """One tensor of one layer (and expert), or one outside the layers.

    Args:
        name: in Megatron-Core's model, spelt as in a checkpoint (norms under TransformerEngine's names).
        key: of the tensor in a torch_dist checkpoint: layers are stacked there, unless they differ from each other.
        place: where it lies on the leading axes (layer, expert) of that tensor; () where it has none.
        counts: how many lie on each of these axes.
        shape: its own, without vocabulary padding.
        hf: what it is made of.
        arrangement: how.
        padded: whether Megatron may hold more rows (vocabulary padding).
        loaded: the name under which transformers holds it once loaded (with all experts in one tensor), where that is not
            the name of its one Hugging Face tensor.
        trained: False for a buffer, which has no gradient and no optimizer state.
    """

    name: str
    key: str
    place: Shape
    counts: Shape
    shape: Shape
    hf: tuple[HFTensor, ...]
    arrangement: Arrangement
    padded: bool = False
    loaded: str | None = None
    trained: bool = True

    @property
    def global_shape(self) -> Shape:
        """Of the tensor in the checkpoint, without vocabulary padding."""
        return (*self.counts, *self.shape)

    @property
    def offset(self) -> Shape:
        """Where it begins in that tensor."""
        return (*self.place, *(0 for _ in self.shape))

    @property
    def size(self) -> int:
        """Its number of values."""
        return math.prod(self.shape)

    @property
    def labels(self) -> list[str]:
        """What its Hugging Face parts are noted under."""
        return [part.label for part in self.hf]


def by_key(parameters: Sequence[Parameter]) -> dict[str, Parameter]:
    """Checkpoint key -> the first parameter that is stored there."""
    found: dict[str, Parameter] = {}
    for parameter in parameters:
        found.setdefault(parameter.key, parameter)
    return found


def hf_shapes(parameters: Sequence[Parameter]) -> dict[str, Shape]:
    """Name and shape of every tensor of the Hugging Face folder."""
    return {part.name: part.stored_shape for parameter in parameters for part in parameter.hf}


def as_stored(parameters: Sequence[Parameter], loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of transformers' loaded model -> the same by the names of a folder: experts apart, or as it has them."""
    import torch

    made: dict[str, Tensor] = {}
    several: dict[str, list[Tensor]] = {}
    taken: set[str] = set()
    for parameter in parameters:
        if parameter.loaded is None or parameter.loaded not in loaded:
            continue
        taken.add(parameter.loaded)
        whole = loaded[parameter.loaded]
        index = parameter.hf[0].index
        own = whole[parameter.place[-1] if index is None else index] if whole.ndim > len(parameter.shape) else whole
        for part, value in zip(parameter.hf, parameter.arrangement.unpack(own), strict=True):
            if part.index is None:
                made[part.name] = part.stored(value)
            else:
                several.setdefault(part.name, []).append(part.stored(value))
    names = {part.held: part.name for parameter in parameters for part in parameter.hf if part.held is not None}
    rest = {names.get(name, name): value for name, value in loaded.items() if name not in taken}
    return rest | made | {name: torch.stack(parts) for name, parts in several.items()}
