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

from megaswift.megatron.kernels import swiglu
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

    def of_rows(self, x: Tensor) -> Tensor:
        """[groups * count, n] of x [groups * width, n]."""
        return x.view(self.groups, self.width, -1)[:, self.first : self.first + self.count].flatten(0, 1)

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

    def spread(self, b: Tensor, rows: int) -> Tensor:
        """B [rows of the parts, r] as one matrix [rows, parts * r] behind all of A, with zeros where a part has no say.

        So every part is multiplied by one product, which goes once over what is as wide as the layer.
        """
        rank = b.shape[1]
        if len(self.outputs) == 1 and b.shape[0] == rows:
            return b
        whole = torch.zeros((rows, len(self.outputs) * rank), dtype=b.dtype, device=b.device)
        for number, (out, half) in enumerate(zip(self.outputs, self.halves, strict=True)):
            out.set_rows(whole[:, number * rank : (number + 1) * rank], half.of_rows(b))
        return whole

    def gathered(self, whole: Tensor, b: Tensor) -> Tensor:
        """The inverse for a gradient: fp32 [rows of the parts, r] of [rows, parts * r]."""
        rank = b.shape[1]
        if len(self.outputs) == 1 and b.shape[0] == whole.shape[0]:
            return whole
        own = torch.empty(b.shape, dtype=whole.dtype, device=b.device)
        for number, (out, half) in enumerate(zip(self.outputs, self.halves, strict=True)):
            half.set_rows(own, out.of_rows(whole[:, number * rank : (number + 1) * rank]))
        return own


@dataclass(frozen=True)
class LoraCall:
    """What one call of the operation needs beside tensors.

    Args:
        sequence: gather x over `group` on the way in, and scatter its gradient on the way back.
        reduce_grad: sum the gradient of x over `group`.
        dropout: None where nothing is dropped.
        gated: x is [gate, up], and what is multiplied is silu(gate) * up, which is made again for A's gradient and not kept; the
            gradient overwrites x.
        needed: False where only gradients will be asked for, and nobody reads the result: it is not computed then.
    """

    parts: Parts
    scale: float
    linear_ops: LinearOps
    sequence: bool = False
    reduce_grad: bool = False
    group: Any = None
    dropout: Dropout | None = None
    gated: bool = False
    needed: bool = True


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    part, work = _begin_scatter(x.contiguous(), group)
    work.wait()
    return part


def _dropped(x: Tensor, call: LoraCall, keys: Tensor | None) -> Tensor:
    """x [tokens, k] as A sees it."""
    return x if call.dropout is None or keys is None else x * call.dropout.factors(keys, x.shape[1], x.dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Any,
        bias: Tensor | None,
        a: Any,
        b: Any,
        keys: Tensor | None,
        residual: Tensor | None,
        call: LoraCall,
    ) -> Tensor:
        x = x.contiguous()
        whole = gather_sequence(x, call.group) if call.sequence else x
        flat = (swiglu.forward(whole) if call.gated else whole).view(-1, weight.shape[1])
        low = None if a is None else torch.mm(_dropped(flat, call, keys), a.t())
        ctx.weight, ctx.a, ctx.b, ctx.call = weight, a, b, call  # through saved-tensor hooks they would lose main_grad
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x if a is not None or call.gated else None, low, keys)
        shape = (*whole.shape[:-1], weight.shape[0])
        if not call.needed:
            return x.new_empty(shape)
        if low is None and residual is None:
            return call.linear_ops.forward(flat, weight, bias).view(shape)
        onto = _begun(residual, bias, low, call.parts, b, call.scale, weight.shape[0])
        return call.linear_ops.add_forward(onto, flat, weight).view(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, a, b, ops = ctx.call, ctx.a, ctx.b, ctx.call.linear_ops
        x, low, keys = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows = grad.view(-1, grad.shape[-1])
        grad_a = grad_b = grad_x = work = None
        dlow: Any = None
        if a is not None:
            wide, whole = (
                _into_fp32 if rows.is_cuda and rows.dtype != torch.float32 else torch.mm,
                call.parts.spread(b, rows.shape[1]),
            )
            dlow = torch.empty_like(low).addmm_(rows, whole, beta=0.0, alpha=call.scale)
            if ctx.needs_input_grad[4]:
                grad_b = add_gradient(b, call.parts.gathered(wide(rows.t(), low), b).mul_(call.scale))
        if ctx.needs_input_grad[0]:
            if dlow is None:
                flat = ops.input_grad(rows, ctx.weight)
            else:
                flat = torch.mm(dlow, a)
                if call.dropout is not None and keys is not None:
                    flat.mul_(call.dropout.factors(keys, flat.shape[1], flat.dtype))
                flat = ops.add_input_grad(flat, rows, ctx.weight)
            grad_x = flat.view(*grad.shape[:-1], -1)
            if call.gated:  # flat becomes silu(gate) * up, and [gate, up] their gradient
                swiglu.backward_in_place(flat, x.view(rows.shape[0], -1), recompute=a is not None)
                grad_x = x
            elif call.sequence:
                grad_x, work = _begin_scatter(grad_x, call.group)
            elif call.reduce_grad:
                work = dist.all_reduce(grad_x, group=call.group, async_op=True)
        if ctx.needs_input_grad[3]:
            if not call.gated:
                flat = x.view(-1, x.shape[-1])
            elif grad_x is None:
                flat = swiglu.forward(x).view(rows.shape[0], -1)
            if call.sequence:  # the gradient of A x is scattered, which is narrow, rather than x gathered again
                dlow = _scattered(dlow.view(*grad.shape[:-1], -1), call.group).flatten(0, -2)
                if keys is not None:
                    keys = keys.chunk(dist.get_world_size(call.group))[dist.get_rank(call.group)]
            inputs = _dropped(flat, call, keys)
            grad_a = accumulate_product(a, dlow, inputs) if has_main_grad(a) else dlow.t().mm(inputs)
        if work is not None:
            work.wait()
        return grad_x, None, None, grad_a, grad_b, None, grad if ctx.has_residual else None, None


def _begun(
    residual: Tensor | None, bias: Tensor | None, low: Tensor | None, parts: Parts, b: Any, scale: float, rows: int
) -> Tensor:
    """[tokens, rows] = residual + bias + scale * B low, to which W x is added: what is as wide as the layer is written once more, not read."""
    flat = None if residual is None else residual.reshape(-1, rows)
    if flat is not None and bias is not None:
        flat = flat + bias
    if low is None:
        assert flat is not None
        return flat.clone()
    start = flat if flat is not None else bias
    whole = parts.spread(b, rows).t()
    if start is None:
        return low.new_empty((low.shape[0], rows)).addmm_(low, whole, beta=0.0, alpha=scale)
    return torch.addmm(start, low, whole, alpha=scale)


def _begin_scatter(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    """This rank's part of the sum over ranks of [s, ...] along the first axis, and what to wait for."""
    part = x.new_empty((x.shape[0] // dist.get_world_size(group), *x.shape[1:]))
    return part, dist.reduce_scatter_tensor(part, x, group=group, async_op=True)


def _into_fp32(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


def lora_linear(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    keys: Tensor | None,
    call: LoraCall,
    residual: Tensor | None = None,
) -> Tensor:
    """W x + bias + scale * B A dropout(x) + residual, with the gradients of A and B in `main_grad` where they have one.

    Args:
        x: [s, b, k], or [s / tp, b, k] where the call gathers it; [s, b, 2k] where it is gated.
        weight: [n, k], frozen, in the form that the call's operations take; bias: [n] or None, frozen.
        a: [parts * r, k]; b: [rows of the parts, r]; None where the layer has no adapter.
        keys: int32 [s * b], a key for each token, for dropout; None: nothing is dropped.
        residual: [s, b, n] or None.
    Returns:
        [s, b, n].
    """
    return _LoraLinear.apply(x, weight, bias, a, b, keys, residual, call)


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
