"""Weight gradients straight into the fp32 buffers of Megatron-Core's data-parallel wrapper (`weight.main_grad`).

The wrapper's protocol, which this file keeps: an operation that has added its gradient to `weight.main_grad` itself sets
`weight.grad_added_to_main_grad = True` and hands autograd a placeholder, so that the wrapper's hook still runs (it counts
ready gradients for overlapped reduction) but does not add anything.

On top of it: the first product of a step may overwrite the buffer. That saves zeroing it and reading it back, 8 bytes a
parameter. `zero_main_grads` replaces `ddp.zero_grad_buffer()` and `settle_main_grads` runs after the last backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.triton_support import jit, tl, use_triton


@jit
def _column_sum_kernel(partial, out, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.load(partial + row[:, None] * cols + col[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if ADD:
        result += tl.load(out + col, mask=inside, other=0.0)
    tl.store(out + col, result, mask=inside)


def column_sum(partial: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum over the rows of fp32 [programs, n], parts of a gradient that a kernel's programs left; added to `out` if given."""
    if not use_triton(partial):
        return partial.sum(0) if out is None else out.add_(partial.sum(0))
    rows, cols = partial.shape
    target = torch.empty(cols, dtype=torch.float32, device=partial.device) if out is None else out
    _column_sum_kernel[((cols + 31) // 32,)](partial, target, rows, cols, 64, 32, out is not None, num_warps=8)
    return target


def has_main_grad(weight: Tensor) -> bool:
    """Whether the weight belongs to Megatron-Core's gradient buffers."""
    return getattr(weight, "main_grad", None) is not None


def buffer(weight: Tensor) -> Tensor:
    """The fp32 buffer of a weight for which `has_main_grad` holds, in the weight's shape."""
    return weight.main_grad  # type: ignore[attr-defined]


def add_product(target: Tensor, grad_output: Tensor, inputs: Tensor, *, overwrite: bool = False, alpha: float = 1.0) -> None:
    """target += alpha * grad_output^T @ inputs, accumulated in the precision of `target`.

    Args:
        target: [n, k], usually fp32.
        grad_output: [tokens, n] and inputs: [tokens, k], in one activation dtype.
        overwrite: take `target` as zero and write to it only.
    """
    left = grad_output.t()
    if target.dtype == inputs.dtype:
        target.addmm_(left, inputs, beta=0.0 if overwrite else 1.0, alpha=alpha)
    elif target.is_cuda and target.dtype == torch.float32:
        if overwrite and alpha == 1.0:
            torch.mm(left, inputs, out_dtype=torch.float32, out=target)
        else:
            beta = 0.0 if overwrite else 1.0
            torch.addmm(target, left, inputs, out_dtype=torch.float32, beta=beta, alpha=alpha, out=target)
    else:
        product = torch.mm(left, inputs)
        if overwrite:
            target.copy_(product).mul_(alpha)
        else:
            target.add_(product, alpha=alpha)


def take_stale(weight: Tensor) -> bool:
    """Whether the buffer still holds the last step's gradient; the caller must overwrite it now.

    Asking also marks the weight as one whose operation overwrites, so that the next `zero_main_grads` leaves it alone.
    """
    weight.overwrites_main_grad = True  # type: ignore[attr-defined]
    stale = getattr(weight, "main_grad_stale", False)
    weight.main_grad_stale = False  # type: ignore[attr-defined]
    return stale


def accumulate_product(weight: Tensor, grad_output: Tensor, inputs: Tensor) -> Tensor | None:
    """weight.main_grad += grad_output^T @ inputs; returns what autograd shall receive for the weight."""
    add_product(buffer(weight), grad_output, inputs, overwrite=take_stale(weight))
    return placeholder(weight)


def add_gradient(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """weight.main_grad += gradient (fp32, the weight's shape); returns what autograd shall receive for the weight."""
    if not has_main_grad(weight):
        return gradient.to(weight.dtype)
    if take_stale(weight):
        buffer(weight).copy_(gradient)
    else:
        buffer(weight).add_(gradient)
    return placeholder(weight)


def accumulate_rows(weight: Tensor, partial: Tensor) -> Tensor | None:
    """The gradient of a vector (a norm's weight, a bias) from its parts [programs, n]: into main_grad or as a tensor.

    Returns what autograd shall receive for the weight.
    """
    if not has_main_grad(weight):
        return column_sum(partial).to(weight.dtype)
    ensure_fresh(weight)
    if buffer(weight).dtype == torch.float32:
        column_sum(partial, buffer(weight).view(-1))
    else:
        buffer(weight).add_(column_sum(partial))
    return placeholder(weight)


def ensure_fresh(weight: Tensor) -> None:
    """Zero a buffer that still holds the last step's gradient, before something adds to it."""
    if getattr(weight, "main_grad_stale", False):
        buffer(weight).zero_()
        weight.main_grad_stale = False  # type: ignore[attr-defined]


def placeholder(weight: Tensor) -> Tensor | None:
    """Mark the gradient as added and return the tensor that autograd receives in its place: its values are never read.

    Zeros where Megatron-Core asks for them (`zero_out_wgrad`, a weight that is used twice), None without its wrapper.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight, requires_grad=False)


def zero_main_grads(ddp: Any) -> None:
    """Begin a step: what `DistributedDataParallel.zero_grad_buffer()` does, but only mark weights that are overwritten."""
    cleared = []
    for param in ddp.params_with_grad:
        param.grad_added_to_main_grad = False
        if getattr(param, "overwrites_main_grad", False):
            param.main_grad_stale = True
        else:
            cleared.append(param.main_grad)
    if cleared:
        torch._foreach_zero_(cleared)
    for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
        group.reset()


def settle_main_grads(ddp: Any) -> None:
    """End the backward passes: zero the buffers of weights that took no part in this step."""
    for param in ddp.params_with_grad:
        ensure_fresh(param)
