"""Experts' products beside a loop over the experts: results and gradients, experts without a row, and none with any."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megaswift.megatron.kernels.expert_mlp import expert_mlp, sum_rows, take_rows
from megaswift.megatron.kernels.expert_rows import put_gradient

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
CASES = {"some": [5, 0, 3, 8], "the first alone": [16, 0, 0, 0], "no row": [0, 0, 0, 0]}


def looped(
    x: torch.Tensor, weights: torch.Tensor, first: torch.Tensor, second: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """The same, expert by expert."""
    parts = []
    for rows, weight, one, two in zip(x.split(counts), weights.split(counts), first, second):
        gate, up = F.linear(rows, one).chunk(2, -1)
        parts.append(F.linear(F.silu(gate) * up * weight.unsqueeze(-1), two))
    return torch.cat(parts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_products_are_those_of_a_loop(device: str, name: str, dtype: torch.dtype, limit: float) -> None:
    counts, generator = CASES[name], torch.Generator().manual_seed(0)
    shapes = ((sum(counts), 32), (sum(counts),), (4, 48, 32), (4, 32, 24))
    made = [(torch.randn(shape, generator=generator) * 0.3).to(device) for shape in shapes]
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    exact = [part.clone().requires_grad_() for part in made]
    mine = [(part if place == 1 else part.to(dtype)).clone().requires_grad_() for place, part in enumerate(made)]
    wanted, found = looped(*exact, counts), expert_mlp(*mine, ends)
    grad = torch.randn(wanted.shape, generator=generator).to(device)
    wanted.backward(grad)
    found.backward(grad.to(dtype))
    pairs = [(found, wanted), *((one.grad, other.grad) for one, other in zip(mine, exact))]
    for value, right in pairs:
        assert value.shape == right.shape
        assert not right.numel() or (value.float() - right).abs().max() <= limit * right.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_go_out_and_come_back(device: str) -> None:
    """Each row as often as it is wanted; coming back they are added up, and gradients are the other direction."""
    places = torch.tensor([[3, 0], [1, 5], [2, 4]], device=device)
    source = torch.empty(6, dtype=torch.int64, device=device)
    source[places.flatten()] = torch.arange(3, device=device).repeat_interleave(2)
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.equal(take_rows(x, source, places), x[source])
    assert torch.allclose(sum_rows(take_rows(x, source, places), places, source), 2 * x)
    assert torch.autograd.gradcheck(lambda value: take_rows(value, source, places), x)
    assert torch.autograd.gradcheck(
        lambda value: sum_rows(value, places, source), torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overwrite", [True, False])
def test_gradients_are_put_into_fp32(device: str, overwrite: bool) -> None:
    gradient = torch.randn(3, 70, 41, device=device).bfloat16()
    target = torch.full(gradient.shape, torch.nan if overwrite else 0.5, device=device)
    put_gradient(target, gradient, overwrite=overwrite)
    assert torch.equal(target, gradient.float() + (0.0 if overwrite else 0.5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tensor cores")
def test_routers_multiply_in_fp32_on_tensor_cores() -> None:
    """bf16 in, fp32 out: the logits and both gradients as far from fp64 as fp32 is, not as bf16."""
    from megaswift.megatron.router import _RouterLogits

    torch.manual_seed(0)
    x, weight = torch.randn(500, 256, device="cuda").bfloat16(), torch.randn(64, 256, device="cuda").bfloat16()
    grad = torch.randn(500, 64, device="cuda")
    mine = [part.clone().requires_grad_() for part in (x, weight)]
    mine[1].main_grad, mine[1].grad_added_to_main_grad = torch.zeros(64, 256, device="cuda"), False
    exact = [part.double().requires_grad_() for part in (x, weight)]
    logits, wanted = _RouterLogits.apply(*mine, torch.float32, None), exact[0] @ exact[1].t()
    logits.backward(grad)
    wanted.backward(grad.double())
    off = lambda one, other: float((one.double() - other).norm() / other.norm())  # noqa: E731
    assert logits.dtype == torch.float32 and off(logits, wanted) < 1e-6
    assert off(mine[1].main_grad, exact[1].grad) < 1e-6
    assert off(mine[0].grad, exact[0].grad.bfloat16().double()) < 1e-4
