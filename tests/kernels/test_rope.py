"""The fused split and rotation against a plain one in fp64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.conftest import check, double, leaf

from megaswift.megatron.kernels.rope import rotate, split_rotate_qkv


def tables(positions: torch.Tensor, dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as transformers makes them, [s, b, dim], for positions [s, b]."""
    speed = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions.double().unsqueeze(-1) * speed
    angle = torch.cat((angle, angle), -1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos.double().unsqueeze(2) + torch.cat((-second, first), -1) * sin.double().unsqueeze(2)


@pytest.mark.parametrize(
    ("s", "b", "heads", "groups", "dim", "shared"), [(7, 2, 6, 2, 16, False), (9, 1, 3, 3, 8, True), (70, 3, 4, 1, 80, True)]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_split_rotate(case, s, b, heads, groups, dim, shared, with_bias):
    positions = torch.randint(0, 500, (s, 1 if shared else b))
    cos, sin = tables(positions, dim, case[0])
    mixed = leaf(s, b, (heads + 2 * groups) * dim, like=case)
    bias = leaf((heads + 2 * groups) * dim, like=case) if with_bias else None
    parts = split_rotate_qkv(mixed, cos.unsqueeze(2), sin.unsqueeze(2), heads=heads, groups=groups, bias=bias)
    grads = [torch.randn_like(part) for part in parts]
    # one gradient comes in another memory order, as attention kernels hand it over
    given = [grads[0].permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3), *grads[1:]]
    torch.autograd.backward(parts, given)
    a = double(mixed)
    add = double(bias) if with_bias else torch.zeros((), dtype=torch.float64, device=case[0])
    view = (a + add).view(s, b, groups, -1, dim)
    want = (
        plain(view[..., :-2, :].reshape(s, b, heads, dim), cos, sin),
        plain(view[..., -2, :], cos, sin),
        view[..., -1, :],
    )
    torch.autograd.backward(want, [grad.double() for grad in grads])
    for got, expected in zip(parts, want):
        assert got.is_contiguous()
        check(got, expected, case[1])
    check(mixed.grad, a.grad, case[1])
    if with_bias:
        check(bias.grad, add.grad, case[1])


def test_rotate_a_slice(case):
    cos, sin = tables(torch.arange(11).unsqueeze(1), 16, case[0])
    whole = leaf(11, 2, 5, 32, like=case)
    part = whole[..., :3, :16]
    y = rotate(part, cos, sin)
    grad = torch.randn_like(y)
    y.backward(grad)
    a = double(whole)
    want = plain(a[..., :3, :16], cos, sin)
    want.backward(grad.double())
    check(y, want, case[1])
    check(whole.grad, a.grad, case[1])


def test_partial_rotation_leaves_the_rest(case):
    cos, sin = tables(torch.arange(5).unsqueeze(1), 8, case[0])
    x = leaf(5, 1, 2, 20, like=case)
    y = rotate(x, cos, sin)
    assert torch.equal(y[..., 8:], x[..., 8:])
    check(y[..., :8], plain(double(x)[..., :8], cos, sin), case[1])
