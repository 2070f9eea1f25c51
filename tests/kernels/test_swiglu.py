"""SwiGLU and SwiGLU with the product after it, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.conftest import check, double, leaf

from megaswift.engine.kernels.swiglu import swiglu
from megaswift.engine.kernels.swiglu_linear import swiglu_linear

SHAPES = [(5, 3, 33), (2, 1, 1030), (1, 4, 7)]


def reference(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(case, shape):
    source = leaf(*shape[:2], 2 * shape[2], like=case)
    y = swiglu(source * 1)
    grad = torch.randn_like(y)
    a = double(source)
    want = reference(a)
    want.backward(grad.double())
    check(y, want, case[1])
    y.backward(grad)
    check(source.grad, a.grad, case[1])


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_linear(case, shape, recompute, main, add):
    source, weight = leaf(*shape[:2], 2 * shape[2], like=case), leaf(11, shape[2], like=case)
    residual = leaf(*shape[:2], 11, like=case) if add else None
    if main:
        weight.main_grad = torch.zeros(11, shape[2], device=case[0])
        weight.grad_added_to_main_grad = False
    y = swiglu_linear(source * 1, weight, recompute=recompute, residual=residual)
    grad = torch.randn_like(y)
    a, b = double(source), double(weight)
    want = reference(a) @ b.t() + (residual.detach().double() if add else 0.0)
    want.backward(grad.double())
    check(y, want, case[1])
    y.backward(grad)
    check(source.grad, a.grad, case[1], slack=2)
    check(weight.main_grad if main else weight.grad, b.grad, case[1])
    if add:
        assert torch.equal(residual.grad, grad)


def test_second_backward_is_refused(case):
    source = leaf(2, 2, 8, like=case)
    y = swiglu(source * 1).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
