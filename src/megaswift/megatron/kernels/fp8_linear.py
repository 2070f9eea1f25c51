"""Products of linear layers in FP8 (e4m3), each row with a scale of its own: y = x W^T and dx = dy W.

A row is what one element of the result is summed over: a token of x and of dy, an output channel of W forward, an input
channel of W backward. Scales are worked out from the numbers at hand, none is remembered from step to step.
The weight's gradient stays in the activation type. This is the recipe that torchao calls rowwise_with_gw_hp, but for W
backward, which has one scale there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megaswift.megatron.kernels.fp8_quantize import Scaled, quantize_columns, quantize_rows, quantize_swiglu
from megaswift.megatron.kernels.linear_ops import LinearOps
from megaswift.megatron.kernels.swiglu import SILU
from megaswift.run.spec import FP8_MULTIPLE

# With up to 256 tokens and many input channels cuBLASLt has no kernel for scaled rows (pytorch/ao issue 4582).
FEWEST_TOKENS = 512


def scaled_product(a: Scaled, b: Scaled, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """a [m, k] @ b [n, k]^T, scales applied, as `dtype` [m, n]. On a GPU m, n and k are multiples of FP8_MULTIPLE.

    Args:
        fast: let the tensor cores add up with the 14 bits of mantissa that they have, instead of moving partial sums to
            fp32 on the way (Hopper; https://arxiv.org/abs/2412.19437, section 3.3.2).
    """
    if a.values.is_cuda:
        left, right = a.scales[:, None], b.scales[None, :]
        # The second operand is read column by column: the transpose of a contiguous matrix.
        return torch._scaled_mm(
            a.values, b.values.t(), scale_a=left, scale_b=right, out_dtype=dtype, use_fast_accum=fast
        )  # fmt: skip
    product = a.values.float() @ b.values.float().t()
    return (product * a.scales[:, None] * b.scales[None, :]).to(dtype)


class Fp8LinearOps(LinearOps):
    """Forward product and input gradient in e4m3 with scaled rows. NaN or infinity in a row comes out in all it meets.

    Partial sums of the forward product stay in the tensor cores, those of gradients do not: the usual choice.

    A weight is quantised in each forward and each backward pass. Inside `unchanged_weights` it is done once, for as long as
    that context lasts: nothing is ever kept over an update, which writes weights in ways that torch does not see. That
    takes 2 bytes a parameter, so it begins after a first pass has shown how much of the GPU's memory is left.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], Scaled] | None = None
        self._parameters: dict[int, int] = {}  # address of each weight -> its size
        self._room: bool | None = None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., k] @ weight [n, k]^T + bias [n], in x's type."""
        result = _product(x, self._quantized(weight, forward=True), fast=True)
        return result if bias is None else result.add_(bias)

    def swiglu_forward(
        self, gate_up: Tensor, weight: Tensor, residual: Tensor | None, *, keep: bool, gated_by: str = SILU
    ) -> tuple[Tensor, Tensor | None]:
        """As its parent, of SiLU alone; the product is rounded before the residual is added."""
        if gated_by != SILU:
            raise ValueError(f"products in FP8 are gated by {SILU}, not by {gated_by}")
        flat = gate_up.view(-1, gate_up.shape[-1])
        inputs, hidden = quantize_swiglu(flat, _padded(flat.shape[0]), keep=keep)
        result = scaled_product(inputs, self._quantized(weight, forward=True), gate_up.dtype, fast=True)
        result = result[: flat.shape[0]].view(*gate_up.shape[:-1], weight.shape[0])
        return result if residual is None else result.add_(residual), hidden

    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad [..., n] @ weight [n, k], in grad's type."""
        return _product(grad, self._quantized(weight, forward=False), fast=False)

    def add_forward(self, onto: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """As its parent; the product is rounded before it is added."""
        return onto.add_(self.forward(x, weight))

    def add_input_grad(self, onto: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        """As its parent; the product is rounded before it is added."""
        return onto.add_(self.input_grad(grad, weight))

    @contextmanager
    def unchanged_weights(self, micro_batches: int) -> Iterator[None]:
        """Keep quantised weights inside, if several micro batches run and there is room for them."""
        self._kept = {} if micro_batches > 1 and self._room else None
        try:
            yield
        finally:
            self._kept = None
        if self._room is None:
            self._room = has_room(2 * sum(self._parameters.values()))

    def _quantized(self, weight: Tensor, forward: bool) -> Scaled:
        quantize: Callable[[Tensor], Scaled] = quantize_rows if forward else quantize_columns
        if self._room is None:
            self._parameters[weight.data_ptr()] = weight.numel()
        if self._kept is None:
            return quantize(weight)
        key = (weight.data_ptr(), forward)
        if key not in self._kept:
            self._kept[key] = quantize(weight)
        return self._kept[key]


def has_room(needed: int) -> bool:
    """Whether `needed` bytes fit into GPU memory that nobody has taken so far, with a tenth of the GPU's left over."""
    if not torch.cuda.is_available():
        return True
    free, total = torch.cuda.mem_get_info()
    return free - needed > total // 10


def _product(x: Tensor, weight: Scaled, *, fast: bool) -> Tensor:
    """x [..., k] @ weight [n, k]^T; the number of tokens is padded to what the product takes."""
    flat = x.reshape(-1, x.shape[-1])
    result = scaled_product(quantize_rows(flat, _padded(flat.shape[0])), weight, x.dtype, fast=fast)
    return result[: flat.shape[0]].view(*x.shape[:-1], result.shape[-1])


def _padded(tokens: int) -> int:
    return max(FEWEST_TOKENS, (tokens + FP8_MULTIPLE - 1) // FP8_MULTIPLE * FP8_MULTIPLE)
