"""RMSNorm, alone and with the residual addition, against fp64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.conftest import check, double, leaf

from megaswift.megatron.kernels.rms_norm import CENTRED, FORMS, ROUNDED, add_rms_norm, rms_norm, rms_norm_added, rms_norm_keep

SHAPES = [(5, 3, 48), (7, 1, 129), (3, 2, 896), (2, 3, 5, 16)]


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, form: str = ROUNDED) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight if form == CENTRED else weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_norm(case, shape, form):
    x, weight = leaf(*shape, like=case), leaf(shape[-1], like=case)
    y = rms_norm(x, weight, 1e-6, form)
    grad = torch.randn_like(y)
    y.backward(grad)
    a, b = double(x), double(weight)
    want = reference(a, b, 1e-6, form)
    want.backward(grad.double())
    check(y, want, case[1])
    check(x.grad, a.grad, case[1])
    check(weight.grad, b.grad, case[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_norm_with_residual(case, shape, form, add):
    x, delta, weight = leaf(*shape, like=case), leaf(*shape, like=case), leaf(shape[-1], like=case)
    total, y = add_rms_norm(x, delta, weight, 1e-5, form) if add else rms_norm_keep(x, weight, 1e-5, form)
    gy, gt = torch.randn_like(y), torch.randn_like(y)
    torch.autograd.backward([y, total], [gy, gt])
    a, d, b = double(x), double(delta), double(weight)
    want_total = a + d if add else a
    want = reference(want_total, b, 1e-5, form)
    torch.autograd.backward([want, want_total], [gy.double(), gt.double()])
    check(y, want, case[1])
    check(total, want_total, case[1])
    check(x.grad, a.grad, case[1])
    check(weight.grad, b.grad, case[1])
    if add:
        check(delta.grad, d.grad, case[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_norm_that_is_added(case, shape, form):
    residual, x, weight = leaf(*shape, like=case), leaf(*shape, like=case), leaf(shape[-1], like=case)
    y = rms_norm_added(residual, x, weight, 1e-5, form)
    grad = torch.randn_like(y)
    y.backward(grad)
    r, a, b = double(residual), double(x), double(weight)
    want = r + reference(a, b, 1e-5, form)
    want.backward(grad.double())
    check(y, want, case[1])
    assert torch.equal(residual.grad, grad)
    check(x.grad, a.grad, case[1])
    check(weight.grad, b.grad, case[1])


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("added", [False, True])
def test_roundings_are_those_of_transformers(case, form, added):
    x, weight = leaf(9, 4, 64, like=case).detach(), leaf(64, like=case).detach()
    full = x.float()
    normal = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-6)
    gain = weight.float() + (1.0 if form == CENTRED else 0.0)
    want = weight * normal.to(x.dtype) if form == ROUNDED else (normal * gain).to(x.dtype)
    want = x + want if added else want
    got = rms_norm_added(x, x, weight, 1e-6, form) if added else rms_norm(x, weight, 1e-6, form)
    different = (got != want).float().mean()
    assert different < (0.01 if case[1] == torch.bfloat16 else 1.0)
    check(got, want, torch.float32, slack=100 if case[1] == torch.bfloat16 else 1)
