"""SwiGLU and SwiGLU with the product after it, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.conftest import check, double, leaf

from megaswift.megatron.kernels import swiglu_linear as module
from megaswift.megatron.kernels.swiglu import GATES, GELU_TANH, SILU, backward_in_place, swiglu
from megaswift.megatron.kernels.swiglu_linear import FirstProduct, swiglu_linear
from megaswift.megatron.kernels.triton_support import HAS_TRITON, use_triton
from megaswift.megatron.kernels.weight_grad import linear

SHAPES = [(5, 3, 33), (2, 1, 1030), (1, 4, 7)]


def reference(x: torch.Tensor, gated_by: str = SILU) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return (F.silu(gate) if gated_by == SILU else F.gelu(gate, approximate="tanh")) * up


@pytest.mark.parametrize("gated_by", GATES.values())
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(case, shape, gated_by):
    source = leaf(*shape[:2], 2 * shape[2], like=case)
    y = swiglu(source * 3, gated_by)  # where both halves of the curve are
    grad = torch.randn_like(y)
    a = double(source)
    want = reference(a * 3, gated_by)
    want.backward(grad.double())
    check(y, want, case[1])
    y.backward(grad)
    check(source.grad, a.grad, case[1])


@pytest.mark.parametrize("gated_by", GATES.values())
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_linear(case, shape, recompute, main, add, gated_by):
    source, weight = leaf(*shape[:2], 2 * shape[2], like=case), leaf(11, shape[2], like=case)
    residual = leaf(*shape[:2], 11, like=case) if add else None
    if main:
        weight.main_grad = torch.zeros(11, shape[2], device=case[0])
        weight.grad_added_to_main_grad = False
    y = swiglu_linear(source * 1, weight, recompute=recompute, residual=residual, gated_by=gated_by)
    grad = torch.randn_like(y)
    a, b = double(source), double(weight)
    want = reference(a, gated_by) @ b.t() + (residual.detach().double() if add else 0.0)
    want.backward(grad.double())
    check(y, want, case[1])
    y.backward(grad)
    check(source.grad, a.grad, case[1], slack=2)
    check(weight.main_grad if main else weight.grad, b.grad, case[1])
    if add:
        assert torch.equal(residual.grad, grad)


@pytest.mark.parametrize("main", [True, False])
def test_the_first_product_again(case, main):
    """The same bits, and [gate, up] is not kept."""
    start, one, two = leaf(7, 2, 24, like=case), leaf(66, 24, like=case), leaf(24, 33, like=case)
    residual, grads, kept = torch.randn_like(start), [], []
    for again in (False, True):
        for tensor in (start, one, two):
            tensor.grad = None
        if main:
            for weight in (one, two):
                weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
                weight.grad_added_to_main_grad = False
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            inputs = start * 1
            first = FirstProduct(inputs, one) if again else None
            y = swiglu_linear(linear(inputs, one), two, residual=residual, first=first)
        y.backward(torch.ones_like(y))
        grads.append([start.grad, *(weight.main_grad if main else weight.grad for weight in (one, two))])
        kept.append(sizes)
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert kept[0].count(7 * 2 * 66) == 1 and kept[1].count(7 * 2 * 66) == 0


@pytest.mark.parametrize("recompute", [True, False])
def test_backward_beside_the_weight_product(case, recompute, monkeypatch):
    """The two-stream order of work; without a GPU the same order on one."""
    monkeypatch.setattr(module, "can_run_beside", lambda tensor: True)
    source, weight = leaf(37, 3, 2 * 40, like=case), leaf(24, 40, like=case)
    weight.main_grad, weight.grad_added_to_main_grad = torch.full((24, 40), float("nan"), device=case[0]), False
    weight.main_grad_stale = True
    y = swiglu_linear(source * 1, weight, recompute=recompute, overlap=True)
    grad = torch.randn_like(y)
    y.backward(grad)
    a, b = double(source), double(weight)
    (reference(a) @ b.t()).backward(grad.double())
    check(source.grad, a.grad, case[1], slack=2)
    check(weight.main_grad, b.grad, case[1])
    assert weight.grad_added_to_main_grad and not weight.main_grad_stale


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("recompute", [True, False])
def test_kernel_on_a_few_processors(case, recompute):
    dy, x = leaf(13, 1100, like=case).detach(), leaf(13, 2200, like=case).detach()
    if not use_triton(x):
        pytest.skip("kernels run on a GPU or in the interpreter")
    other_dy, other_x = dy.clone(), x.clone()
    backward_in_place(dy, x, recompute=recompute, gated_by=GELU_TANH)
    backward_in_place(other_dy, other_x, recompute=recompute, share=3, gated_by=GELU_TANH)
    assert torch.equal(x, other_x) and torch.equal(dy, other_dy)


def test_second_backward_is_refused(case):
    source = leaf(2, 2, 8, like=case)
    y = swiglu(source * 1).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
