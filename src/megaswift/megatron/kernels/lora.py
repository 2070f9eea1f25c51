"""A frozen linear layer with low-rank adapters on parts of its rows, as one operation: y = W x + scale * B A dropout(x).

Nothing that is as wide as the layer crosses ranks for the adapters. In a column-parallel layer every rank computes A x of
the tokens that it has for W x anyway, and its rows of B; what reaches x from both is summed as one. In a row-parallel layer
B of this rank's part of A x is added to the part of W x before that is summed. What is left are sums over ranks of the
gradients of the halves that every rank holds whole (A, or B): once a step, by `sum_gradients`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaswift.megatron.kernels.counter_dropout import Dropout
from megaswift.megatron.kernels.linear_ops import LinearOps
from megaswift.megatron.kernels.main_grad import accumulate_product, add_gradient, buffer, has_main_grad
from megaswift.megatron.kernels.weight_grad import gather_sequence


@dataclass(frozen=True)
class Rows:
    """Rows of one Hugging Face module in a fused matrix: `count` from `first` on, in each of `groups` turns of `width` rows."""

    groups: int
    width: int
    first: int
    count: int

    def of_columns(self, x: Tensor) -> Tensor:
        """[tokens, groups * count] of x [tokens, groups * width]; a view unless there are several groups."""
        return x.view(-1, self.groups, self.width)[:, :, self.first : self.first + self.count].flatten(1)

    def of_rows(self, x: Tensor) -> Tensor:
        """[groups * count, n] of x [groups * width, n]."""
        return x.view(self.groups, self.width, -1)[:, self.first : self.first + self.count].flatten(0, 1)

    def add_product(self, target: Tensor, low: Tensor, b: Tensor, alpha: float) -> None:
        """Add alpha * low [tokens, r] @ b [groups * count, r]^T to these columns of target [tokens, groups * width]."""
        if self.groups == 1:
            target[:, self.first : self.first + self.count].addmm_(low, b.t(), alpha=alpha)
        else:
            own = target.view(-1, self.groups, self.width)[:, :, self.first : self.first + self.count]
            own.add_(torch.mm(low, b.t()).view(own.shape), alpha=alpha)

    def set_rows(self, target: Tensor, value: Tensor) -> None:
        """Put value [groups * count, n] into these rows of target [groups * width, n]."""
        own = target.view(self.groups, self.width, -1)[:, self.first : self.first + self.count]
        own.copy_(value.view(own.shape))


@dataclass(frozen=True)
class Parts:
    """Which rows of the layer, and of B, belong to which r rows of A.

    Args:
        outputs, halves: of each Hugging Face module, in the order of A: its rows in the layer's result, and in B.
    """

    outputs: tuple[Rows, ...]
    halves: tuple[Rows, ...]


@dataclass(frozen=True)
class LoraCall:
    """What one call of the operation needs beside tensors.

    Args:
        sequence: gather x over `group` on the way in, and scatter its gradient on the way back.
        reduce_grad: sum the gradient of x over `group`.
        dropout: None where nothing is dropped.
    """

    parts: Parts
    scale: float
    linear_ops: LinearOps
    sequence: bool = False
    reduce_grad: bool = False
    group: Any = None
    dropout: Dropout | None = None


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks of [s, ...], this rank's part of the first axis."""
    part = torch.empty((x.shape[0] // dist.get_world_size(group), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


def _dropped(x: Tensor, call: LoraCall, keys: Tensor | None) -> Tensor:
    """x [tokens, k] as A sees it."""
    return x if call.dropout is None or keys is None else x * call.dropout.factors(keys, x.shape[1], x.dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Tensor | None, a: Any, b: Any, keys: Tensor | None, call: LoraCall
    ) -> Tensor:
        whole = gather_sequence(x, call.group) if call.sequence else x
        output = call.linear_ops.forward(whole, weight, bias)
        ctx.weight, ctx.a, ctx.b, ctx.call = weight, a, b, call  # through saved-tensor hooks they would lose main_grad
        if a is None:
            return output
        flat, rows = _dropped(whole.reshape(-1, whole.shape[-1]), call, keys), output.view(-1, output.shape[-1])
        low = torch.mm(flat, a.t())
        parts = call.parts
        for piece, out, half in zip(low.chunk(len(parts.outputs), 1), parts.outputs, parts.halves, strict=True):
            out.add_product(rows, piece, half.of_rows(b), call.scale)
        ctx.save_for_backward(x, low, keys)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, a, b = ctx.call, ctx.a, ctx.b
        parts = call.parts
        grad = grads[0].contiguous()
        if a is None:
            grad_x = call.linear_ops.input_grad(grad, ctx.weight)
            if call.sequence:
                grad_x = _scattered(grad_x, call.group)
            elif call.reduce_grad:
                dist.all_reduce(grad_x, group=call.group)
            return grad_x, None, None, None, None, None, None
        x, low, keys = ctx.saved_tensors
        rows = grad.view(-1, grad.shape[-1])
        dlow, db = torch.empty_like(low), torch.empty(b.shape, dtype=torch.float32, device=b.device)
        wide = _into_fp32 if rows.is_cuda and rows.dtype != torch.float32 else torch.mm
        for piece, into, out, half in zip(
            low.chunk(len(parts.outputs), 1), dlow.chunk(len(parts.outputs), 1), parts.outputs, parts.halves, strict=True
        ):
            own = out.of_columns(rows)
            into.copy_(torch.mm(own, half.of_rows(b)))
            half.set_rows(db, wide(own.t(), piece))
        dlow.mul_(call.scale)
        grad_b = add_gradient(b, db.mul_(call.scale)) if ctx.needs_input_grad[4] else None
        grad_x, work = None, None
        if ctx.needs_input_grad[0]:
            grad_x = call.linear_ops.input_grad(grad, ctx.weight)
            flat = grad_x.view(-1, grad_x.shape[-1])
            if call.dropout is None or keys is None:
                flat.addmm_(dlow, a)
            else:
                flat.add_(torch.mm(dlow, a).mul_(call.dropout.factors(keys, flat.shape[1], flat.dtype)))
            if call.sequence:
                part = torch.empty_like(x)
                work = dist.reduce_scatter_tensor(part, grad_x, group=call.group, async_op=True)
            elif call.reduce_grad:
                part = grad_x
                work = dist.all_reduce(grad_x, group=call.group, async_op=True)
        grad_a = None
        if ctx.needs_input_grad[3]:
            own_keys = keys
            if call.sequence:  # the gradient of A x is scattered, which is narrow, rather than x gathered again
                dlow = _scattered(dlow.view(*grad.shape[:-1], -1), call.group).flatten(0, -2)
                if keys is not None:
                    own_keys = keys.chunk(dist.get_world_size(call.group))[dist.get_rank(call.group)]
            inputs = _dropped(x.reshape(-1, x.shape[-1]), call, own_keys)
            grad_a = accumulate_product(a, dlow, inputs) if has_main_grad(a) else dlow.t().mm(inputs)
        if work is not None:
            work.wait()
            grad_x = part
        return grad_x, None, None, grad_a, grad_b, None, None


def _into_fp32(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


def lora_linear(
    x: Tensor, weight: Any, bias: Tensor | None, a: Tensor | None, b: Tensor | None, keys: Tensor | None, call: LoraCall
) -> Tensor:
    """W x + bias + scale * B A dropout(x), with the gradients of A and B in `main_grad` where they have one.

    Args:
        x: [s, b, k], or [s / tp, b, k] where the call gathers it.
        weight: [n, k], frozen, in the form that the call's operations take; bias: [n] or None, frozen.
        a: [parts * r, k]; b: [rows of the parts, r]; None where the layer has no adapter.
        keys: int32 [s * b], a key for each token, for dropout; None: nothing is dropped.
    Returns:
        [s, b, n].
    """
    return _LoraLinear.apply(x, weight, bias, a, b, keys, call)


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, call: LoraCall, columns: dist.ProcessGroup | None) -> Tensor:
    """fp32 [rows of B]: the Euclidean norm of each row of W + scale * B A, without making that matrix.

    |w + s b A|^2 = |w|^2 + 2 s b . (A w) + s^2 b (A A^T) b; so only r columns are made, and summed where ranks hold parts of a row.

    Args:
        weight: [n, k] of this rank; a: [parts * r, k]; b: [rows of the parts, r].
        columns: the ranks that hold the other columns; None: these are all.
    """
    found = torch.empty(b.shape[0], 1, dtype=torch.float32, device=b.device)
    parts = call.parts
    for own, out, half in zip(a.float().chunk(len(parts.outputs)), parts.outputs, parts.halves, strict=True):
        rows, factors = out.of_rows(weight).float(), half.of_rows(b).float() * call.scale
        sums = torch.cat((rows.square().sum(1, keepdim=True), rows @ own.t()), 1)
        gram = own @ own.t()
        if columns is not None and dist.get_world_size(columns) > 1:
            both = torch.cat((sums, torch.nn.functional.pad(gram, (1, 0))))
            dist.all_reduce(both, group=columns)
            sums, gram = both[: len(sums)], both[len(sums) :, 1:]
        squared = sums[:, 0] + 2 * (factors * sums[:, 1:]).sum(1) + (factors @ gram * factors).sum(1)
        half.set_rows(found, squared.clamp_min(0.0).sqrt().unsqueeze(1))
    return found.squeeze(1)


@torch.no_grad()
def take_out(weight: Tensor, a: Tensor, b: Tensor, call: LoraCall) -> None:
    """weight [n, k] -= scale * B A, in place, of the rows that have an adapter: a [parts * r, k], b [rows of the parts, r]."""
    parts = call.parts
    for own, out, half in zip(a.float().chunk(len(parts.outputs)), parts.outputs, parts.halves, strict=True):
        left = torch.addmm(out.of_rows(weight).float(), half.of_rows(b).float(), own, alpha=-call.scale)
        out.set_rows(weight, left.to(weight.dtype))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, magnitude: Tensor, norms: Tensor, parts: Parts) -> Tensor:
        shares, factors = magnitude.float() / norms, torch.ones(y.shape[-1], 1, dtype=torch.float32, device=y.device)
        for out, half in zip(parts.outputs, parts.halves, strict=True):
            out.set_rows(factors, half.of_rows(shares.unsqueeze(1)))
        scale = factors.squeeze(1).to(y.dtype)
        ctx.save_for_backward(y, norms, scale)
        ctx.magnitude, ctx.parts = magnitude, parts
        return y * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y, norms, scale), parts = ctx.saved_tensors, ctx.parts
        made = None
        if ctx.needs_input_grad[1]:
            sums = (grads[0] * y).flatten(0, -2).sum(0, dtype=torch.float32).unsqueeze(1)
            found = torch.empty(norms.shape[0], 1, dtype=torch.float32, device=y.device)
            for out, half in zip(parts.outputs, parts.halves, strict=True):
                half.set_rows(found, out.of_rows(sums))
            made = add_gradient(ctx.magnitude, found.squeeze(1) / norms)
        return grads[0] * scale, made, None, None


def scaled_rows(y: Tensor, magnitude: Tensor, norms: Tensor, parts: Parts) -> Tensor:
    """DoRA (https://arxiv.org/abs/2402.09353): y [..., n] with each adapted row times magnitude / norm; the norms get no gradient.

    Args:
        magnitude, norms: [rows of B], in its order.
    """
    return _Scaled.apply(y, magnitude, norms, parts)


def sum_gradients(parameters: Iterable[torch.nn.Parameter], mark: str, group: dist.ProcessGroup) -> None:
    """Sum the gradient buffers of parameters that every rank of `group` holds whole, at the end of a step's backward passes.

    Args:
        mark: the attribute by which their gradients are known as parts.
    """
    if dist.get_world_size(group) == 1:
        return
    buffers = [buffer(parameter) for parameter in parameters if getattr(parameter, mark, False)]
    if not buffers:
        return
    flat = torch.cat([part.reshape(-1) for part in buffers])
    dist.all_reduce(flat, group=group)
    for part, value in zip(buffers, flat.split([part.numel() for part in buffers]), strict=True):
        part.copy_(value.view(part.shape))
