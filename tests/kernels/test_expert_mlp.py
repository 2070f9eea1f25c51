"""Experts' products beside a loop over the experts: results and gradients, experts without a row, and none with any."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megaswift.megatron.kernels.expert_mlp import expert_mlp, sum_rows, take_rows

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
