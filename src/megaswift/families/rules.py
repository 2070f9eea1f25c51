"""The rule kinds that say how Hugging Face tensors and Megatron tensors correspond, in both directions.

A rule names tensors by templates in which `{i}` is the layer. Megatron names are those that stand in a checkpoint
(the spelling of TransformerEngine's fused modules, which the local modules are saved under as well). `pack` turns the
Hugging Face tensors of one layer into the Megatron tensor, `unpack` is its exact inverse, and `shard` and `merge` cut
the Megatron tensor for tensor parallelism and put it together again. No rule changes a value: both directions are
bit-exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """The sizes of one model, as its config names them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @property
    def group(self) -> int:
        """Rows of one key/value group in the fused matrix: its queries, one key, one value."""
        return (self.heads // self.kv_heads + 2) * self.head_dim


class Rule(Protocol):
    """What every rule kind offers; shapes are those of one layer."""

    @property
    def megatron(self) -> str: ...

    @property
    def hf(self) -> tuple[str, ...]: ...

    def hf_shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face tensors, in the order of `hf`."""
        ...

    def megatron_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the unsplit Megatron tensor, without vocabulary padding."""
        ...

    def pack(self, parts: list[Tensor], sizes: Sizes) -> Tensor:
        """Hugging Face tensors -> the Megatron tensor."""
        ...

    def unpack(self, tensor: Tensor, sizes: Sizes) -> list[Tensor]:
        """The Megatron tensor -> Hugging Face tensors; vocabulary padding is dropped."""
        ...

    def shard(self, tensor: Tensor, tp: int) -> list[Tensor]:
        """The Megatron tensor -> one piece for each tensor-parallel rank."""
        ...

    def merge(self, pieces: list[Tensor]) -> Tensor:
        """Pieces of all tensor-parallel ranks -> the Megatron tensor."""
        ...


@dataclass(frozen=True)
class Copy:
    """One tensor, the same on both sides.

    Args:
        shape: names of `Sizes` fields, for example ("hidden",) or ("hidden", "q_rows").
        split: axis that tensor parallelism cuts; None where every rank holds the whole.
    """

    megatron: str
    source: str
    shape: tuple[str, ...]
    split: int | None = None

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.source,)

    def hf_shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        named = {**vars(sizes), "q_rows": sizes.heads * sizes.head_dim}
        return [tuple(named[name] for name in self.shape)]

    def megatron_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return self.hf_shapes(sizes)[0]

    def pack(self, parts: list[Tensor], sizes: Sizes) -> Tensor:
        return parts[0]

    def unpack(self, tensor: Tensor, sizes: Sizes) -> list[Tensor]:
        return [tensor]

    def shard(self, tensor: Tensor, tp: int) -> list[Tensor]:
        return [tensor] * tp if self.split is None else list(tensor.chunk(tp, self.split))

    def merge(self, pieces: list[Tensor]) -> Tensor:
        import torch

        return pieces[0] if self.split is None else torch.cat(pieces, self.split)


@dataclass(frozen=True)
class Vocab(Copy):
    """An embedding or output matrix: rows are tokens, and Megatron may hold padding rows at the end."""

    shape: tuple[str, ...] = ("vocab", "hidden")
    split: int | None = 0

    def unpack(self, tensor: Tensor, sizes: Sizes) -> list[Tensor]:
        return [tensor[: sizes.vocab]]


@dataclass(frozen=True)
class FusedQKV:
    """Query, key and value fused into one matrix (or bias), grouped by key/value head: [q .. q, k, v] for each."""

    megatron: str
    hf: tuple[str, str, str]
    bias: bool = False

    def hf_shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        columns = () if self.bias else (sizes.hidden,)
        query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        return [(query, *columns), (key, *columns), (key, *columns)]

    def megatron_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return (sizes.kv_heads * sizes.group,) if self.bias else (sizes.kv_heads * sizes.group, sizes.hidden)

    def pack(self, parts: list[Tensor], sizes: Sizes) -> Tensor:
        import torch

        grouped = [part.reshape(sizes.kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).reshape(self.megatron_shape(sizes))

    def unpack(self, tensor: Tensor, sizes: Sizes) -> list[Tensor]:
        rows = [sizes.group - 2 * sizes.head_dim, sizes.head_dim, sizes.head_dim]
        parts = tensor.reshape(sizes.kv_heads, sizes.group, *tensor.shape[1:]).split(rows, dim=1)
        return [part.reshape(shape) for part, shape in zip(parts, self.hf_shapes(sizes))]

    def shard(self, tensor: Tensor, tp: int) -> list[Tensor]:
        return list(tensor.chunk(tp, 0))

    def merge(self, pieces: list[Tensor]) -> Tensor:
        import torch

        return torch.cat(pieces, 0)


@dataclass(frozen=True)
class GateUp:
    """Gate and up projections of a gated MLP, one above the other; tensor parallelism cuts inside each half."""

    megatron: str
    hf: tuple[str, str]

    def hf_shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        return [(sizes.ffn, sizes.hidden)] * 2

    def megatron_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return (2 * sizes.ffn, sizes.hidden)

    def pack(self, parts: list[Tensor], sizes: Sizes) -> Tensor:
        import torch

        return torch.cat(parts, 0)

    def unpack(self, tensor: Tensor, sizes: Sizes) -> list[Tensor]:
        return list(tensor.chunk(2, 0))

    def shard(self, tensor: Tensor, tp: int) -> list[Tensor]:
        import torch

        gate, up = tensor.chunk(2, 0)
        return [torch.cat(pair, 0) for pair in zip(gate.chunk(tp, 0), up.chunk(tp, 0))]

    def merge(self, pieces: list[Tensor]) -> Tensor:
        import torch

        halves = [piece.chunk(2, 0) for piece in pieces]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves], 0)
