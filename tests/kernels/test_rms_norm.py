"""RMSNorm, alone and with the residual addition, against fp64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.conftest import check, double, leaf

from megaswift.megatron.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_keep

SHAPES = [(5, 3, 48), (7, 1, 129), (3, 2, 896), (2, 3, 5, 16)]


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("shape", SHAPES)
def test_norm(case, shape):
    x, weight = leaf(*shape, like=case), leaf(shape[-1], like=case)
    y = rms_norm(x, weight, 1e-6)
    grad = torch.randn_like(y)
    y.backward(grad)
    a, b = double(x), double(weight)
    want = reference(a, b, 1e-6)
    want.backward(grad.double())
    check(y, want, case[1])
    check(x.grad, a.grad, case[1])
    check(weight.grad, b.grad, case[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("add", [True, False])
def test_norm_with_residual(case, shape, add):
    x, delta, weight = leaf(*shape, like=case), leaf(*shape, like=case), leaf(shape[-1], like=case)
    total, y = add_rms_norm(x, delta, weight, 1e-5) if add else rms_norm_keep(x, weight, 1e-5)
    gy, gt = torch.randn_like(y), torch.randn_like(y)
    torch.autograd.backward([y, total], [gy, gt])
    a, d, b = double(x), double(delta), double(weight)
    want_total = a + d if add else a
    want = reference(want_total, b, 1e-5)
    torch.autograd.backward([want, want_total], [gy.double(), gt.double()])
    check(y, want, case[1])
    check(total, want_total, case[1])
    check(x.grad, a.grad, case[1])
    check(weight.grad, b.grad, case[1])
    if add:
        check(delta.grad, d.grad, case[1])


def test_gradient_of_the_residual_alone(case):
    x, weight = leaf(4, 2, 32, like=case), leaf(32, like=case)
    total, _ = rms_norm_keep(x, weight, 1e-5)
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_weight_gradient_goes_to_main_grad(case):
    x, weight = leaf(6, 2, 40, like=case), leaf(40, like=case)
    weight.main_grad = torch.ones(40, device=case[0])
    weight.grad_added_to_main_grad = False
    y = rms_norm(x, weight, 1e-6)
    grad = torch.randn_like(y)
    y.backward(grad)
    a, b = double(x), double(weight)
    reference(a, b, 1e-6).backward(grad.double())
    assert weight.grad_added_to_main_grad
    check(weight.main_grad - 1, b.grad, case[1])


def test_roundings_are_those_of_transformers(case):
    x, weight = leaf(9, 4, 64, like=case).detach(), leaf(64, like=case).detach()
    full = x.float()
    want = weight * (full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    got = rms_norm(x, weight, 1e-6)
    different = (got != want).float().mean()
    assert different < (0.01 if case[1] == torch.bfloat16 else 1.0)
    check(got, want, torch.float32, slack=100 if case[1] == torch.bfloat16 else 1)
