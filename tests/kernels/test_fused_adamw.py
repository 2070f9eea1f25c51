"""The one-pass AdamW against torch.optim.AdamW over several steps, with clipping and with a bad factor."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.kernels.conftest import check

from megaswift.megatron.kernels.fused_adamw import AddressTable, FusedAdamW, sum_of_squares
from megaswift.megatron.kernels.triton_support import INTERPRETED

SIZES = (1, 17, 4096, 40000)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def params(device):
    return [torch.randn(n, device=device) for n in SIZES]


@pytest.mark.parametrize("factor", [None, 0.3])
def test_three_steps(device, factor):
    mine = params(device)
    theirs = copy.deepcopy(mine)
    for p in mine[1:]:
        p.low_precision_weight = torch.zeros(p.shape, dtype=torch.bfloat16, device=device)

    def groups(ps):
        return [{"params": ps[:2], "weight_decay": 0.1}, {"params": ps[2:], "weight_decay": 0.0, "lr": 3e-2}]

    one = FusedAdamW(groups(mine), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    two = torch.optim.AdamW(groups(theirs), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(3):
        for a, b in zip(mine, theirs):
            grad = torch.randn_like(a)
            a.grad, b.grad = grad.clone(), grad * (1.0 if factor is None else factor)
        one.gradient_factor = None if factor is None else torch.tensor(factor, device=device)
        one.step()
        two.step()
    for a, b in zip(mine, theirs):
        check(a, b, torch.float32)
        check(one.state[a]["exp_avg"], two.state[b]["exp_avg"], torch.float32)
        check(one.state[a]["exp_avg_sq"], two.state[b]["exp_avg_sq"], torch.float32)
    for a in mine[1:]:
        if INTERPRETED:  # the interpreter cuts bf16 off instead of rounding it
            check(a.low_precision_weight, a, torch.bfloat16)
        else:
            assert torch.equal(a.low_precision_weight, a.to(torch.bfloat16))
    assert all(group["step"] == 3 for group in one.param_groups)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_factor_that_is_not_finite_changes_nothing(device, factor):
    mine = params(device)
    before = copy.deepcopy(mine)
    optimizer = FusedAdamW(mine, lr=1e-2)
    for p in mine:
        p.grad = torch.randn_like(p)
    optimizer.gradient_factor = torch.tensor(factor, device=device)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, before))
    assert all(not state["exp_avg"].any() for state in optimizer.state.values())


def test_sum_of_squares(device):
    tensors, table = params(device), AddressTable()
    for _ in range(2):
        check(sum_of_squares(tensors, table), sum(t.double().pow(2).sum() for t in tensors), torch.float32)
        tensors = params(device)  # other addresses: the table follows
    assert float(sum_of_squares([])) == 0.0


def test_sum_of_squares_of_a_large_table(device):
    """As an embedding's gradient: rows of common tokens are large, of all others small. No square is lost in the sum."""
    torch.manual_seed(0)
    table = torch.randn(4096, 1024, device=device) * 1e-3
    table[:2048] *= 1e-3
    assert float(sum_of_squares([table])) == pytest.approx(float(table.double().square().sum()), rel=1e-6)
