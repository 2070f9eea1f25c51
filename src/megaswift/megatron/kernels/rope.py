"""Rotary position embedding fused with the split of a query-key-value product, forward and backward in one pass each.

Halves convention (https://arxiv.org/abs/2104.09864): x * cos + (-x2, x1) * sin. The tables are those of transformers:
[s, b or 1, head_dim] with two equal halves, already scaled by the RoPE type's attention factor. A rotation's gradient is
the opposite rotation, so nothing but the tables is kept. The product's bias is added here, where its gradient costs no
pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.main_grad import accumulate_rows
from megaswift.megatron.kernels.triton_support import jit, next_power_of_2, tl, use_triton


# fmt: off
@jit
def _split_kernel(
    mixed, bias, partial, q, k, v, cos, sin, tokens, batch, q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, table_s, table_b,
    GROUPS: tl.constexpr, REP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    TILES: tl.constexpr, BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    # fmt: on
    # One program: one head of TILES x TOKENS tokens. `mixed` holds, for each group, its REP query heads, its key head and
    # its value head. Backward reads q, k, v and writes mixed; its sums over the tokens are this program's part of the
    # bias' gradient, kept in registers until the end.
    head = tl.program_id(1)
    group, part = head // (REP + 2), head % (REP + 2)
    col = tl.arange(0, BLOCK)
    inside = col < HALF
    width = GROUPS * (REP + 2) * HALF * 2
    if HAS_BIAS and not BACKWARD:
        add_first = tl.load(bias + head * HALF * 2 + col, mask=inside, other=0.0).to(tl.float32)[None, :]
        add_second = tl.load(bias + head * HALF * 2 + HALF + col, mask=inside, other=0.0).to(tl.float32)[None, :]
    sum_first = tl.zeros([TOKENS, BLOCK], dtype=tl.float32)
    sum_second = tl.zeros([TOKENS, BLOCK], dtype=tl.float32)
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * TOKENS + tl.arange(0, TOKENS)
        at_s, at_b = (token // batch).to(tl.int64), (token % batch).to(tl.int64)
        mask = (token < tokens)[:, None] & inside[None, :]
        packed = mixed + token.to(tl.int64)[:, None] * width + head * HALF * 2 + col[None, :]
        if part < REP:
            single = q + (at_s * q_s + at_b * q_b)[:, None] + (group * REP + part) * q_h + col[None, :]
        elif part == REP:
            single = k + (at_s * k_s + at_b * k_b)[:, None] + group * k_h + col[None, :]
        else:
            single = v + (at_s * v_s + at_b * v_b)[:, None] + group * v_h + col[None, :]
        if BACKWARD:
            source, target = single, packed
        else:
            source, target = packed, single
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS and not BACKWARD:
            first += add_first
            second += add_second
        if part <= REP:
            table = (at_s * table_s + at_b * table_b)[:, None] + col[None, :]
            c = tl.load(cos + table, mask=mask, other=0.0).to(tl.float32)
            s = tl.load(sin + table, mask=mask, other=0.0).to(tl.float32)
            if BACKWARD:
                s = -s
            first, second = first * c - second * s, second * c + first * s
        if HAS_BIAS and BACKWARD:
            sum_first += first
            sum_second += second
        tl.store(target, first.to(target.dtype.element_ty), mask=mask)
        tl.store(target + HALF, second.to(target.dtype.element_ty), mask=mask)
    if HAS_BIAS and BACKWARD:
        sums = partial + tl.program_id(0) * width + head * HALF * 2 + col
        tl.store(sums, tl.sum(sum_first, axis=0), mask=inside)
        tl.store(sums + HALF, tl.sum(sum_second, axis=0), mask=inside)


@jit
def _rotate_kernel(
    x,
    y,
    cos,
    sin,
    tokens,
    batch,
    x_s,
    x_b,
    x_h,
    table_s,
    table_b,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at_s, at_b = (token // batch).to(tl.int64), (token % batch).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = (token < tokens)[:, None] & (col < HALF)[None, :]
    table = (at_s * table_s + at_b * table_b)[:, None] + col[None, :]
    c = tl.load(cos + table, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + table, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        s = -s
    source = x + (at_s * x_s + at_b * x_b)[:, None] + col[None, :]
    target = y + token.to(tl.int64)[:, None] * HEADS * HALF * 2 + col[None, :]
    for head in range(HEADS):
        first = tl.load(source + head * x_h, mask=mask, other=0.0)
        second = tl.load(source + head * x_h + HALF, mask=mask, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        tl.store(target + head * HALF * 2, (a * c - b * s).to(first.dtype), mask=mask)
        tl.store(target + head * HALF * 2 + HALF, (b * c + a * s).to(first.dtype), mask=mask)


_TILES = 8  # tiles of tokens a program takes one after the other


def _table(table: Tensor) -> Tensor:
    """The table as [s, b or 1, d]; a heads axis of length 1 is dropped."""
    return table.squeeze(2) if table.dim() == 4 else table


def _table_strides(table: Tensor) -> tuple[int, int]:
    return table.stride(0), (table.stride(1) if table.shape[1] > 1 else 0)


def _fits(x: Tensor, table: Tensor, head_dim: int) -> bool:
    return use_triton(x) and table.shape[-1] == head_dim and table.stride(-1) == 1


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The twin: rotate x [s, b, heads, d]; features beyond the tables' width pass through."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((_turn(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    result = x * cos.unsqueeze(2)  # in the wider of the two precisions, as in the kernel
    return result.add_(torch.cat((-second, first), dim=-1) * sin.unsqueeze(2)).to(x.dtype)


def _launch_split(
    mixed: Tensor, bias: Tensor | None, parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor, *, backward: bool
) -> Tensor | None:
    """Run the kernel; backward returns parts [n, width] in fp32 that add up to the bias' gradient."""
    q, k, v = parts
    half, groups = q.shape[3] // 2, k.shape[2]
    block = next_power_of_2(half)
    per_program = max(1, 1024 // block)
    tokens, batch = q.shape[0] * q.shape[1], q.shape[1]
    strides = (stride for part in parts for stride in part.stride()[:3])
    programs = -(-tokens // (per_program * _TILES))
    partial = q  # any address, where no sums are written
    if backward and bias is not None:
        partial = torch.empty((programs, bias.numel()), dtype=torch.float32, device=q.device)
    _split_kernel[(programs, mixed.numel() // tokens // (2 * half))](
        mixed,
        q if bias is None else bias,
        partial,
        q,
        k,
        v,
        cos,
        sin,
        tokens,
        batch,
        *strides,
        *_table_strides(cos),
        groups,
        q.shape[2] // groups,
        half,
        block,
        per_program,
        _TILES,
        backward,
        bias is not None,
        num_warps=4,
    )
    return None if partial is q else partial


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, heads: int, groups: int
    ) -> tuple[Tensor, ...]:
        s, b, width = mixed.shape
        dim = width // (heads + 2 * groups)
        ctx.save_for_backward(cos, sin)
        ctx.bias = bias
        if _fits(mixed, cos, dim):
            mixed = mixed.contiguous()
            parts = tuple(torch.empty((s, b, n, dim), dtype=mixed.dtype, device=mixed.device) for n in (heads, groups, groups))
            _launch_split(mixed, bias, parts, cos, sin, backward=False)
            return parts
        view = (mixed if bias is None else mixed + bias).view(s, b, groups, -1, dim)
        q, k, v = view[..., :-2, :].reshape(s, b, heads, dim), view[..., -2, :], view[..., -1, :]
        return _turn(q, cos, sin), _turn(k, cos, sin), v.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        bias = ctx.bias
        q, k, v = grads
        s, b, heads, dim = q.shape
        groups = k.shape[2]
        mixed = torch.empty((s, b, groups, heads // groups + 2, dim), dtype=q.dtype, device=q.device)
        if _fits(q, cos, dim):
            parts = tuple(part if part.stride(-1) == 1 else part.contiguous() for part in grads)
            parts_of_bias = _launch_split(mixed, bias, parts, cos, sin, backward=True)
        else:
            mixed[..., :-2, :] = _turn(q, cos, -sin).view(s, b, groups, heads // groups, dim)
            mixed[..., -2, :] = _turn(k, cos, -sin)
            mixed[..., -1, :] = v
            parts_of_bias = None if bias is None else mixed.view(s * b, -1).sum(0, keepdim=True, dtype=torch.float32)
        wanted = bias is not None and ctx.needs_input_grad[1]
        dbias = accumulate_rows(bias, parts_of_bias) if wanted and parts_of_bias is not None else None
        return mixed.view(s, b, -1), dbias, None, None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _apply(x, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _apply(grads[0], cos, sin, backward=True), None, None


def _apply(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    s, b, heads, dim = x.shape
    if not _fits(x, cos, dim):
        return _turn(x, cos, -sin if backward else sin)
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty((s, b, heads, dim), dtype=x.dtype, device=x.device)
    block = next_power_of_2(dim // 2)
    per_program = max(1, 1024 // block)
    grid = ((s * b + per_program - 1) // per_program,)
    _rotate_kernel[grid](
        x,
        y,
        cos,
        sin,
        s * b,
        b,
        *x.stride()[:3],
        *_table_strides(cos),
        heads,
        dim // 2,
        block,
        per_program,
        backward,
        num_warps=4,
    )
    return y


def split_rotate_qkv(
    mixed: Tensor, cos: Tensor, sin: Tensor, *, heads: int, groups: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the bias to a query-key-value product, split it, and rotate query and key.

    Args:
        mixed: [s, b, groups * (heads / groups + 2) * d] in Megatron-Core's order: for each group its query heads, key, value.
        cos, sin: [s, b or 1, d] or [s, b or 1, 1, d], any floating type.
        heads, groups: query heads and key-value heads of this rank.
        bias: [groups * (heads / groups + 2) * d] that the product left out, or None.
    Returns:
        query [s, b, heads, d], key and value [s, b, groups, d], contiguous.
    """
    return _SplitRotate.apply(mixed, bias, _table(cos), _table(sin), heads, groups)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [s, b, heads, d] by tables [s, b or 1, d] (a query or key that was normalised after the split)."""
    return _Rotate.apply(x, _table(cos), _table(sin))
