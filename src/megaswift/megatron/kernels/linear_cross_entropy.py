"""Output layer and cross entropy together, in chunks of tokens: the logits of a whole batch never exist.

Each chunk's logits become its gradient in place, and that gradient is used at once: for the hidden states and for the
weight. The backward pass has nothing left to do but a scale. The vocabulary may be split over tensor-parallel ranks.
Rows without a label are not computed at all. A cap of the logits is made, and its slope multiplied in, by plain operations on each
chunk, on a GPU too: this keeps a copy of the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaswift.megatron.kernels.main_grad import add_product, buffer, has_main_grad, placeholder, take_stale
from megaswift.megatron.kernels.triton_support import jit, processors, tl, use_triton

IGNORED = -100
_FEW_ROWS, _SUMMED_TOKENS = 32, 1024  # of a product on CPUs, see `_hidden_gradient`
_ROW_BLOCK, _ROW_WARPS, _ROW_PROGRAMS = 8192, 32, 2  # a row's tile, its warps, and rows under way a multiprocessor


@jit
def _two_blocks(base, at, end, top, total, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    # One step of the running maximum and sum of every lane; the sum is of powers of two, `top` is in logits.
    log2e: tl.constexpr = 1.4426950408889634
    if MASKED:
        a = tl.load(base + at, mask=at < end, other=float("-inf")).to(tl.float32)
        b = tl.load(base + at + BLOCK, mask=at + BLOCK < end, other=float("-inf")).to(tl.float32)
    else:
        a = tl.load(base + at, eviction_policy="evict_last").to(tl.float32)
        b = tl.load(base + at + BLOCK, eviction_policy="evict_last").to(tl.float32)
    peak = tl.maximum(tl.maximum(a, b), top)
    shift = peak * log2e
    # The old maximum is subtracted before the product: a fused multiply-add would leave the product's rounding, which is
    # huge for a lane that has seen nothing yet.
    return peak, total * tl.exp2((top - peak) * log2e) + (tl.exp2(a * log2e - shift) + tl.exp2(b * log2e - shift))


@jit
def _row_kernel(
    logits,
    labels,
    stats,
    scale,
    factors,
    valid,
    first,
    stride,
    rows,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
    EACH: tl.constexpr,
):
    # A persistent grid: few enough rows are under way that the second pass finds its row in the L2 cache, from the end
    # backwards, the part that was read last. Maximum and sum are kept for each lane, so the first pass has no reduction
    # across threads until its end. With GRAD (the whole vocabulary is here) the second pass turns the row into
    # (softmax - one hot) * scale, and with EACH times the row's own factor. Instructions, not bytes, are scarce here: whole blocks go without masks, and the label's
    # element is corrected on its own after the others.
    log2e: tl.constexpr = 1.4426950408889634
    lane = tl.arange(0, BLOCK)
    wide = stride.to(tl.int64)
    whole = valid // (2 * BLOCK) * (2 * BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        base = logits + row * wide
        top = tl.full([BLOCK], -1e30, dtype=tl.float32)  # finite: minus infinity would need a guard in every step
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, whole, 2 * BLOCK):
            top, total = _two_blocks(base, start + lane, valid, top, total, BLOCK, False)
        if whole < valid:
            top, total = _two_blocks(base, whole + lane, valid, top, total, BLOCK, True)
        peak = tl.max(top, axis=0)
        denominator = tl.sum(total * tl.exp2((top - peak) * log2e), axis=0)
        label = tl.load(labels + row) - first
        here = (label >= 0) & (label < valid)
        target = tl.load(base + label, mask=here, other=0.0).to(tl.float32)
        tl.store(stats + row, peak)
        tl.store(stats + rows + row, denominator)
        tl.store(stats + 2 * rows + row, target)
        if GRAD:
            factor = tl.load(scale)
            if EACH:
                factor *= tl.load(factors + row)
            share = factor / denominator
            shift = peak * log2e
            blocks = valid // BLOCK
            for tail in range(blocks * BLOCK, stride, BLOCK):
                at = tail + lane
                x = tl.load(base + at, mask=at < valid, other=float("-inf")).to(tl.float32)  # padding gets a zero
                tl.store(base + at, (tl.exp2(x * log2e - shift) * share).to(logits.dtype.element_ty), mask=at < stride)
            for done in range(0, blocks):
                at = (blocks - 1 - done) * BLOCK + lane
                x = tl.load(base + at, eviction_policy="evict_first").to(tl.float32)
                tl.store(
                    base + at, (tl.exp2(x * log2e - shift) * share).to(logits.dtype.element_ty), eviction_policy="evict_first"
                )
            tl.debug_barrier()  # the label's element was written by another thread
            tl.store(base + label, (tl.exp2(target * log2e - shift) * share - factor).to(logits.dtype.element_ty), mask=here)


@jit
def _grad_kernel(logits, labels, lse, scale, factors, valid, first, stride, BLOCK: tl.constexpr, EACH: tl.constexpr):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row) - first
    factor = tl.load(scale)
    if EACH:
        factor *= tl.load(factors + row)
    x = tl.load(base + at, mask=at < valid, other=float("-inf")).to(tl.float32)
    grad = (tl.exp(x - tl.load(lse + row)) - tl.where(at == label, 1.0, 0.0)) * factor
    tl.store(base + at, tl.where(at < valid, grad, 0.0).to(logits.dtype.element_ty), mask=at < stride)


@dataclass
class _Shard:
    """Where this rank's rows of the vocabulary begin, how many of them are real, and who holds the others."""

    first: int
    valid: int
    group: dist.ProcessGroup | None

    @property
    def alone(self) -> bool:
        return self.group is None or dist.get_world_size(self.group) == 1


def _combine(stats: Tensor, shard: _Shard) -> tuple[Tensor, Tensor]:
    """(log of the softmax's denominator, loss) of each row from every rank's [3, rows]: maximum, sum, target logit."""
    if not shard.alone:
        everyone = torch.empty((dist.get_world_size(shard.group), *stats.shape), dtype=stats.dtype, device=stats.device)
        dist.all_gather_into_tensor(everyone.view(-1), stats.view(-1), group=shard.group)
        peak = everyone[:, 0].amax(0)
        total = (everyone[:, 1] * torch.exp(everyone[:, 0] - peak)).sum(0)
        stats = torch.stack((peak, total, everyone[:, 2].sum(0)))
    lse = stats[0] + stats[1].log()
    return lse, lse - stats[2]


def _chunk_on_gpu(logits: Tensor, labels: Tensor, scale: Tensor | None, factors: Tensor | None, shard: _Shard) -> Tensor:
    """Losses of the rows, without factors; with `scale` the logits become their gradient times it and the row's factor."""
    rows, width = logits.shape
    stats = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
    fused = scale is not None and shard.alone
    dummy, each = stats if scale is None else scale, factors is not None
    own = stats if factors is None else factors
    grid = (min(rows, _ROW_PROGRAMS * processors(logits.device)),)
    _row_kernel[grid](
        logits, labels, stats, dummy, own, shard.valid, shard.first, width, rows, _ROW_BLOCK, fused, each, num_warps=_ROW_WARPS
    )
    lse, losses = _combine(stats, shard)
    if scale is not None and not fused:
        _grad_kernel[(rows, (width + 4095) // 4096)](
            logits, labels, lse, scale, own, shard.valid, shard.first, width, 4096, each, num_warps=8
        )
    return losses


def _chunk_twin(logits: Tensor, labels: Tensor, scale: Tensor | None, factors: Tensor | None, shard: _Shard) -> Tensor:
    """The same with PyTorch's operations, in as few passes over fp32 logits as they allow; half types go through fp32."""
    if shard.valid < logits.shape[1]:
        logits[:, shard.valid :] = float("-inf")
    full = logits.float()
    local = labels - shard.first
    here = (local >= 0) & (local < shard.valid)
    column = local.masked_fill(~here, 0).unsqueeze(1)
    peak = full.amax(1)
    target = full.gather(1, column).squeeze(1).masked_fill(~here, 0.0)
    if shard.valid == 0:
        softmax, sums, total = full.zero_(), torch.ones_like(peak), torch.zeros_like(peak)
    else:
        # PyTorch adds up a row of its softmax lane by lane: with 50,000 columns the result sums up to 1 +- 1e-5, and that
        # error has one direction, which a deep model's gradient shows a hundred times larger. `sum` adds in pairs.
        softmax = torch.softmax(full, 1, out=full)
        sums = softmax.sum(1)
        # The largest probability is exp(peak - lse), and it never underflows: the denominator comes for free.
        total = sums / softmax.amax(1)
    lse, losses = _combine(torch.stack((peak, total, target)), shard)
    if scale is not None:
        factor = sums.reciprocal_() if shard.alone else torch.exp(peak + total.log() - lse).div_(sums)
        softmax.mul_(factor.unsqueeze(1)).scatter_add_(1, column, -here.to(softmax.dtype).unsqueeze(1))
        if scale.is_cuda or float(scale) != 1.0:
            softmax.mul_(scale)
        if factors is not None:
            softmax.mul_(factors.unsqueeze(1))
        if softmax is not logits:
            logits.copy_(softmax)
    return losses


@dataclass
class _Plan:
    """What one pass over the chunks computes beside the losses.

    Args:
        scale: the factor of all gradients, or None for losses alone.
        factors: one more factor for each row, of its loss and of its gradient (fp32); None: 1.
        into: the fp32 buffer that the weight's gradient goes to, or None; `overwrite` it instead of adding.
        cap: a logit x becomes cap * tanh(x / cap); None: it stays.
    """

    shard: _Shard
    budget: int
    scale: Tensor | None = None
    factors: Tensor | None = None
    want_hidden: bool = False
    into: Tensor | None = None
    overwrite: bool = False
    cap: float | None = None

    def rows_at_a_time(self, rows: int, width: int, element: int) -> int:
        """Equal chunks whose logits take at most `budget` bytes, a multiple of 128 rows."""
        chunks = max(1, -(-rows * width * element // self.budget))
        even = (rows + chunks - 1) // chunks
        return max(1, min(rows, (even + 127) // 128 * 128))


def _capped(logits: Tensor, cap: float) -> Tensor:
    """Cap logits in place, with the roundings of transformers' models; tanh(x / cap) of each."""
    shares = logits.div_(cap).tanh_().clone()
    logits.mul_(cap)
    return shares


def _hidden_gradient(logits: Tensor, weight: Tensor, into: Tensor) -> None:
    """Gradient of the logits [rows, V] times the weight [V, h].

    MKL adds up few rows token by token into one fp32 sum: where tokens' rows have a common direction, as trained ones have,
    50,000 of them leave an error of 1e-4. So on CPUs the sum is made of parts.
    """
    if logits.is_cuda or logits.shape[0] > _FEW_ROWS:
        torch.mm(logits, weight, out=into)
        return
    into.zero_()
    for part, rows in zip(logits.split(_SUMMED_TOKENS, dim=1), weight.split(_SUMMED_TOKENS)):
        into.add_(part @ rows)


def _run(hidden: Tensor, weight: Tensor, labels: Tensor, plan: _Plan) -> tuple[Tensor, Tensor | None]:
    """(losses, gradient of hidden or None) of labelled rows, chunk by chunk."""
    rows, width = hidden.shape[0], weight.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty_like(hidden) if plan.want_hidden else None
    step = plan.rows_at_a_time(rows, width, hidden.element_size())
    space = torch.empty((step, width), dtype=hidden.dtype, device=hidden.device)
    chunk = _chunk_on_gpu if use_triton(hidden) else _chunk_twin
    overwrite = plan.overwrite
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        inputs = hidden[part]
        logits = torch.mm(inputs, weight.t(), out=space[: inputs.shape[0]])
        factors = None if plan.factors is None else plan.factors[part]
        shares = None if plan.cap is None else _capped(logits, plan.cap)
        losses[part] = chunk(logits, labels[part], plan.scale, factors, plan.shard)
        if shares is not None and plan.scale is not None:  # times the slope of the cap: 1 - tanh^2
            torch.ops.aten.tanh_backward.grad_input(logits, shares, grad_input=logits)
        if dhidden is not None:
            _hidden_gradient(logits, weight, dhidden[part])
        if plan.into is not None:
            add_product(plan.into, logits, inputs, overwrite=overwrite)
            overwrite = False
    if plan.into is not None and overwrite:  # no row had a label
        plan.into.zero_()
    return losses if plan.factors is None else losses * plan.factors, dhidden


@dataclass
class _Options:
    """What backward needs to know of the call, beside tensors."""

    plan: _Plan
    promised: bool
    reduce_hidden_grad: bool
    shared_with_embedding: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, options: _Options) -> Tensor:
        plan = options.plan
        plan.want_hidden, want_weight = ctx.needs_input_grad[:2]
        direct = want_weight and options.promised and has_main_grad(weight)
        if direct:
            plan.into, plan.overwrite = buffer(weight), take_stale(weight)
        elif want_weight:
            plan.into, plan.overwrite = torch.empty(weight.shape, dtype=torch.float32, device=weight.device), True
        losses, dhidden = _run(hidden if rows is None else hidden.index_select(0, rows), weight, labels, plan)
        if dhidden is not None and options.reduce_hidden_grad and not plan.shard.alone:
            dist.all_reduce(dhidden, group=plan.shard.group)
        ctx.save_for_backward(dhidden, None if direct else plan.into, rows, weight, plan.scale)
        plan.into = None
        ctx.tokens, ctx.direct, ctx.options = hidden.shape[0], direct, options
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, rows, weight, scale = ctx.saved_tensors
        upstream = grads[0].float()
        if ctx.options.promised:  # a broken promise must not train on silently
            torch._assert_async(upstream == scale, "the loss was multiplied by something else than grad_scale")
        else:
            dhidden = None if dhidden is None else (dhidden.float() * upstream).to(dhidden.dtype)
            dweight = None if dweight is None else dweight * upstream
        if dhidden is not None and rows is not None:
            whole = torch.zeros((ctx.tokens, dhidden.shape[1]), dtype=dhidden.dtype, device=dhidden.device)
            dhidden = whole.index_copy_(0, rows, dhidden)
        if dweight is not None and not has_main_grad(weight):
            return dhidden, dweight.to(weight.dtype), None, None, None
        if dweight is not None:
            buffer(weight).copy_(dweight) if take_stale(weight) else buffer(weight).add_(dweight)
        elif not ctx.direct:
            return dhidden, None, None, None, None
        return dhidden, None if ctx.options.shared_with_embedding else placeholder(weight), None, None, None


def labelled_rows(
    labels: Tensor, device: torch.device, factors: Tensor | None = None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(indices of the rows with a label, or None when all have one; their labels; their factors), all on `device`.

    With labels on the CPU nothing waits for the GPU: pass the batch's labels as the loader made them.
    """
    flat = labels.reshape(-1)
    rows = torch.nonzero(flat != IGNORED).squeeze(1)
    own = None if factors is None else factors.reshape(-1)
    if rows.numel() == flat.numel():
        return None, _move(flat, device), None if own is None else _move(own, device)
    return _move(rows, device), _move(flat[rows], device), None if own is None else _move(own[rows], device)


def _move(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it: from pinned memory where the copy crosses to a GPU."""
    if device.type == "cuda" and not numbers.is_cuda:
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    grad_scale: float | Tensor | None = None,
    factors: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    shared_with_embedding: bool = False,
    reduction: str = "sum",
    chunk_bytes: int | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(hidden @ weight^T) at the labels.

    Args:
        hidden: [T, h], the same on every rank of `tp_group` (gather it before under sequence parallelism).
        weight: [V_local, h], rows `vocab_start` .. `vocab_start + V_local` of the vocabulary.
        labels: int64 [T], -100 where there is no loss; best on the CPU (see `labelled_rows`).
        vocab_size: real rows of the whole vocabulary; rows beyond it are padding and stay out of the softmax.
        grad_scale: what the caller promises to multiply loss_sum by before `backward` (1.0 for a plain sum). With it the
            weight's gradient is added to `weight.main_grad` in the forward pass, and a broken promise is an error.
            Without it the gradient waits in its own fp32 buffer until the factor is known.
        factors: fp32 [T], what each row's loss is multiplied by; None: 1. Best on the CPU, as labels are.
        reduce_hidden_grad: sum the gradient of `hidden` over `tp_group`. Pass False if `hidden` came from a gather whose
            backward pass is a reduce-scatter.
        shared_with_embedding: the weight is also the input embedding of this rank, whose operation answers autograd for it.
        reduction: "sum", or "none" for each token's loss (no gradient; 0 where there is no label).
        chunk_bytes: size of the largest piece of logits; default 2.5 GiB on a GPU (a quarter of it for a frozen weight,
            whose gradient is not gone through with each piece), 128 MiB on the CPU; half of it with a cap.
        cap: a logit x becomes cap * tanh(x / cap) before the softmax; None: it stays.
    Returns:
        loss (fp32; a scalar, or [T] for "none"), and the number of labelled tokens (int64 scalar).
    """
    device = hidden.device
    rows, chosen, own = labelled_rows(labels, device, factors)
    count = torch.full((), chosen.numel(), dtype=torch.int64, device=device)
    real = weight.shape[0] if vocab_size is None else max(0, min(weight.shape[0], vocab_size - vocab_start))
    whole = (5 << 29 if weight.requires_grad else 5 << 27) if hidden.is_cuda else 1 << 27
    budget = chunk_bytes or whole // (1 if cap is None else 2)
    plan = _Plan(_Shard(vocab_start, real, tp_group), budget, factors=own, cap=cap)
    hidden = hidden.contiguous()
    if reduction == "none" or not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        with torch.no_grad():
            losses, _ = _run(hidden if rows is None else hidden.index_select(0, rows), weight, chosen, plan)
        if reduction != "none":
            return losses.sum(), count
        if rows is None:
            return losses, count
        return torch.zeros(hidden.shape[0], dtype=torch.float32, device=device).index_copy_(0, rows, losses), count
    if isinstance(grad_scale, Tensor):
        plan.scale = grad_scale.float()
    else:
        plan.scale = torch.full((), 1.0 if grad_scale is None else grad_scale, dtype=torch.float32, device=device)
    options = _Options(plan, grad_scale is not None, reduce_hidden_grad, shared_with_embedding)
    return _LinearCrossEntropy.apply(hidden, weight, chosen, rows, options), count
