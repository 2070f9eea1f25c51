"""AdamW with moments of two bytes or of one: the arithmetic is fp32, what is kept between steps is rounded.

bf16: rounded at random in proportion to the distance to the two neighbours (stochastic rounding), so that changes smaller
than half a unit in the last place, which is what a slow decay makes, add up instead of getting lost.

8 bits: GROUP neighbours share an fp32 scale, their largest magnitude, and each keeps a small floating-point number relative
to it: the mean a sign, 4 bits of exponent and 3 of mantissa; of the squared gradients' mean the root, with 4 and 4 bits.
Both reach down to 2^-15.8 of the group's largest. Rounding is at random here too, by adding random bits to the part that is
cut off; a root that is not zero never becomes zero, so that no update explodes. Block-wise 8-bit moments are from
https://arxiv.org/abs/2110.02861; the codes differ.

Random numbers are a hash of the element's place and the step, so a run can be repeated bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megaswift.megatron.kernels.triton_support import jit, tl

GROUP = 256  # elements that share a scale
MEAN_LAST, MEAN_BITS = 127, 3  # largest code, which stands for the scale itself, and bits of mantissa
ROOT_LAST, ROOT_BITS = 255, 4


@jit
def _hash(place, seed):
    """32 random bits of a place and a step: a multiply-and-shift mix."""
    x = place.to(tl.uint32) * 0x9E3779B1 + tl.cast(seed, tl.uint32)
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0x735A2D97
    return x ^ (x >> 15)


@jit
def _round_bf16(value, noise):
    """fp32 -> bf16 by 16 random bits."""
    bits = value.to(tl.int32, bitcast=True) + noise
    return (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)


@jit
def _encode(value, scale, noise, MANTISSA: tl.constexpr, LAST: tl.constexpr, KEEP: tl.constexpr):
    """Codes of magnitudes [rows, GROUP], given their rows' largest and 16 random bits each.

    A float's bits, read as an integer, count its neighbours: adding random bits below the cut and cutting is linear
    stochastic rounding, also across powers of two.
    """
    scale = tl.maximum(scale, 1e-30)
    ratio = tl.where(value < scale[:, None], value * (1.0 / scale)[:, None], 1.0)
    bits = ratio.to(tl.int32, bitcast=True) + (noise << (7 - MANTISSA))
    code = (bits >> (23 - MANTISSA)) - ((127 << MANTISSA) - LAST)
    if KEEP:
        return tl.where(value > 0.0, tl.maximum(code, 1), 0)
    else:  # between zero and the smallest code, which stands for 2^-16 x 1.25
        small = tl.where(noise.to(tl.float32) < ratio * (65536.0 * 52428.8), 1, 0)
        return tl.where(code < 1, small, code)


@jit
def _decode(code, scale, MANTISSA: tl.constexpr, LAST: tl.constexpr):
    bits = (code + ((127 << MANTISSA) - LAST)) << (23 - MANTISSA)
    return tl.where(code > 0, scale[:, None] * bits.to(tl.float32, bitcast=True), 0.0)


@jit
def _load(address, at, mask, MASKED: tl.constexpr):
    """Without a mask the compiler moves 16 bytes at a time."""
    if MASKED:
        return tl.load(address + at, mask=mask, other=0)
    else:
        return tl.load(address + at)


@jit
def _small_update(
    param, grad, mean, mean_scales, second, root_scales, weight, first, start, length, seed,
    clip, keep, beta1, beta2, eps, step_size, inverse_root,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, HAS_WEIGHT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """SIZE groups of WIDTH elements, from element `start` of the chunk."""
    row = tl.arange(0, SIZE)
    at = start + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    group = start // WIDTH + row
    mask = at < length if MASKED else None
    there = group * WIDTH < length if MASKED else None
    p = _load(param, at, mask, MASKED)
    g = _load(grad, at, mask, MASKED) * clip
    noise = _hash(first + at, seed)
    if BITS == 8:
        code = _load(mean, at, mask, MASKED).to(tl.int32)
        m = _decode(code & 127, _load(mean_scales, group, there, MASKED), 3, 127)
        m = tl.where(code > 127, -m, m)
        u = _decode(_load(second, at, mask, MASKED).to(tl.int32), _load(root_scales, group, there, MASKED), 4, 255)
        v = u * u
    else:
        m = _load(mean, at, mask, MASKED).to(tl.float32)
        v = _load(second, at, mask, MASKED).to(tl.float32)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    u = tl.sqrt(v)
    p = p * keep - step_size * m / (u * inverse_root + eps)
    tl.store(param + at, p, mask=mask)
    if HAS_WEIGHT:
        tl.store(weight + at, p.to(tl.bfloat16), mask=mask)
    low, high = (noise & 0xFFFF).to(tl.int32), (noise >> 16).to(tl.int32)
    if BITS == 8:
        size = tl.abs(m)
        scale = tl.max(size, axis=1)
        tl.store(mean_scales + group, scale, mask=there)
        code = _encode(size, scale, low, 3, 127, False)
        tl.store(mean + at, tl.where((m < 0.0) & (code > 0), code + 128, code).to(tl.uint8), mask=mask)
        scale = tl.max(u, axis=1)
        tl.store(root_scales + group, scale, mask=there)
        tl.store(second + at, _encode(u, scale, high, 4, 255, True).to(tl.uint8), mask=mask)
    else:
        tl.store(mean + at, _round_bf16(m, low), mask=mask)
        tl.store(second + at, _round_bf16(v, high), mask=mask)


@jit
def small_adamw_kernel(
    table, factor, seed, lr, beta1, beta2, eps, decay, step_size, root,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """One program updates one chunk: row `program` of the table, which is
    length, first element, and the addresses of param, grad, mean, its scales, root, its scales, weight."""
    entry = table + tl.program_id(0).to(tl.int64) * 9
    length, first = tl.load(entry).to(tl.int32), tl.load(entry + 1).to(tl.int32)
    param = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), 16)
    grad = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(tl.float32)), 16)
    if BITS == 8:
        mean = tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(tl.uint8)), 16)
        second = tl.multiple_of(tl.load(entry + 6).to(tl.pointer_type(tl.uint8)), 16)
    else:
        mean = tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(tl.bfloat16)), 16)
        second = tl.multiple_of(tl.load(entry + 6).to(tl.pointer_type(tl.bfloat16)), 16)
    mean_scales = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    root_scales = tl.load(entry + 7).to(tl.pointer_type(tl.float32))
    weight = tl.multiple_of(tl.load(entry + 8).to(tl.pointer_type(tl.bfloat16)), 16)
    clip = tl.load(factor)
    if tl.abs(clip) < float("inf"):  # false for NaN too
        whole = length // (SIZE * WIDTH) * (SIZE * WIDTH)
        for start in range(0, whole, SIZE * WIDTH):
            _small_update(
                param, grad, mean, mean_scales, second, root_scales, weight, first, start, length, seed,
                clip, 1.0 - lr * decay, beta1, beta2, eps, step_size, 1.0 / root, SIZE, WIDTH, BITS, HAS_WEIGHT, False,
            )  # fmt: skip
        if whole < length:
            _small_update(
                param, grad, mean, mean_scales, second, root_scales, weight, first, whole, length, seed,
                clip, 1.0 - lr * decay, beta1, beta2, eps, step_size, 1.0 / root, SIZE, WIDTH, BITS, HAS_WEIGHT, True,
            )  # fmt: skip


def new_moments(
    param: Tensor, kind: str, zeros: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None
) -> dict[str, Tensor]:
    """State of a parameter at step 0: "fp32", or of a flat one "bf16" or "8bit"; `zeros` makes its tensors."""
    make = zeros or (lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=param.device))
    names, shape = ("exp_avg", "exp_avg_sq"), tuple(param.shape)
    if kind != "8bit":
        return {name: make(shape, torch.float32 if kind == "fp32" else torch.bfloat16) for name in names}
    groups = -(-param.numel() // GROUP)
    state = {}
    for name in names:
        state[name] = make(shape, torch.uint8)
        state[f"{name}_scale"] = make((groups,), torch.float32)
    return state


def read_moments(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The two moments in fp32, in the parameter's shape."""
    if state["exp_avg"].dtype != torch.uint8:
        return state["exp_avg"].float(), state["exp_avg_sq"].float()
    code = state["exp_avg"].int()
    mean = _decoded(code & 127, state["exp_avg_scale"], MEAN_BITS, MEAN_LAST)
    root = _decoded(state["exp_avg_sq"].int(), state["exp_avg_sq_scale"], ROOT_BITS, ROOT_LAST)
    return torch.where(code > 127, -mean, mean), root * root


def write_moments(state: dict[str, Tensor], mean: Tensor, square: Tensor, noise: Tensor | None = None) -> None:
    """Keep two fp32 moments; without `noise` (32 random bits an element, int64) they are rounded to the nearest."""
    low = torch.full_like(mean, 0x8000, dtype=torch.int64) if noise is None else noise & 0xFFFF
    high = torch.full_like(mean, 0x8000, dtype=torch.int64) if noise is None else noise >> 16
    if state["exp_avg"].dtype != torch.uint8:
        state["exp_avg"].copy_(_rounded_bf16(mean, low))
        state["exp_avg_sq"].copy_(_rounded_bf16(square, high))
        return
    code = _encoded(mean.abs(), state["exp_avg_scale"], low, MEAN_BITS, MEAN_LAST, keep=False)
    state["exp_avg"].copy_(torch.where((mean < 0) & (code > 0), code + 128, code))
    state["exp_avg_sq"].copy_(_encoded(square.sqrt(), state["exp_avg_sq_scale"], high, ROOT_BITS, ROOT_LAST, keep=True))


def noise_of(count: int, step: int, device: torch.device) -> Tensor:
    """32 random bits for each element of a flat tensor, int64 [count]; the kernel's `_hash`."""
    x = (torch.arange(count, device=device) * 0x9E3779B1 + step) & 0xFFFFFFFF
    x ^= x >> 16
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x ^= x >> 15
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def small_adamw_twin(
    param: Tensor, grad: Tensor, state: dict[str, Tensor], weight: Tensor | None, *,
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, factor: Tensor,
) -> None:  # fmt: skip
    """One step of one flat tensor by plain operations: the CPU path, and what the kernel is tested against."""
    mean, square = read_moments(state)
    grad = grad * factor
    mean += (1.0 - betas[0]) * (grad - mean)
    square = betas[1] * square + (1.0 - betas[1]) * grad * grad
    step_size, root = lr / (1.0 - betas[0] ** step), math.sqrt(1.0 - betas[1] ** step)
    param.mul_(1.0 - lr * weight_decay).sub_(step_size * mean / (square.sqrt() / root + eps))
    if weight is not None:
        weight.copy_(param)
    write_moments(state, mean, square, noise_of(param.numel(), step, param.device).view_as(param))


def _rounded_bf16(value: Tensor, noise: Tensor) -> Tensor:
    return ((value.view(torch.int32) + noise.int()) & -65536).view(torch.float32).bfloat16()


def _decoded(code: Tensor, scale: Tensor, mantissa: int, last: int) -> Tensor:
    each = scale.repeat_interleave(GROUP)[: code.numel()].view_as(code)
    bits = (code + (127 << mantissa) - last) << (23 - mantissa)
    return torch.where(code > 0, each * bits.view(torch.float32), 0.0)


def _encoded(value: Tensor, scale: Tensor, noise: Tensor, mantissa: int, last: int, keep: bool) -> Tensor:
    """Codes of magnitudes, int32; `scale` receives the groups' largest. The kernel's `_encode` says how."""
    flat = torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % GROUP)).view(-1, GROUP)
    scale.copy_(flat.amax(1))
    floor = scale.clamp_min(1e-30)[:, None]
    ratio = torch.where(flat < floor, flat * floor.reciprocal(), 1.0).view(-1)[: value.numel()].view_as(value)
    bits = ratio.view(torch.int32) + (noise.int() << (7 - mantissa))
    code = (bits >> (23 - mantissa)) - ((127 << mantissa) - last)
    if keep:
        return torch.where(value > 0, code.clamp_min(1), 0)
    smallest = torch.tensor(1 + (127 << mantissa) - last, dtype=torch.int32) << (23 - mantissa)
    small = noise.float() < ratio * (65536.0 / float(smallest.view(torch.float32)))
    return torch.where(code < 1, small.int(), code)
