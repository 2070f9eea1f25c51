"""Experts with biases and clamped gates against each expert by itself in fp64, and against transformers' formula."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.kernels.conftest import check, double, leaf

from megaswift.megatron.kernels.biased_experts import biased_expert_mlp, clamped_swiglu


@pytest.mark.parametrize("counts", [[5, 0, 8, 1], [0, 0, 3, 0]], ids=str)
def test_is_each_expert_by_itself(case, counts):
    hidden, ffn, clamp = 16, 24, (0.7, 1.7)
    shapes = {
        "x": (sum(counts), hidden),
        "first": (4, 2 * ffn, hidden),
        "bias": (4, 2 * ffn),
        "second": (4, hidden, ffn),
        "last": (4, hidden),
    }
    leaves = {name: leaf(*shape, like=case, scale=0.5) for name, shape in shapes.items()}
    weights = torch.rand(sum(counts), device=case[0]).requires_grad_()
    exact = {name: double(one) for name, one in leaves.items()} | {"weights": double(weights)}
    ends = torch.tensor(counts, dtype=torch.int32, device=case[0]).cumsum(0, dtype=torch.int32)
    got = biased_expert_mlp(
        leaves["x"], weights, (leaves["first"], leaves["bias"]), (leaves["second"], leaves["last"]), ends, clamp
    )
    parts = []
    for number, (rows, each) in enumerate(zip(exact["x"].split(counts), exact["weights"].split(counts), strict=True)):
        both = rows @ exact["first"][number].t() + exact["bias"][number]
        parts.append((clamped_swiglu(both, *clamp) @ exact["second"][number].t() + exact["last"][number]) * each[:, None])
    want = torch.cat(parts)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    check(got, want, case[1])
    for name, one in (leaves | {"weights": weights}).items():
        if exact[name].grad.any():
            check(one.grad, exact[name].grad, case[1], slack=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_that_of_transformers(dtype):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    both = 3 * torch.randn(7, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = GptOssExperts._apply_gate(
        SimpleNamespace(limit=2.0, alpha=1.702), both.view(7, 2, 10).transpose(1, 2).reshape(7, 20)
    )
    assert torch.equal(clamped_swiglu(both, 2.0, 1.702), theirs)
