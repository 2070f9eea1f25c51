"""A hundred steps of our AdamW, in both of its forms, against torch.optim.AdamW in fp64 on the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaswift.megatron.kernels.fused_adamw import FusedAdamW
from megaswift.megatron.optimizer import AdamW
from tests.kernels.conftest import off

SIZES = (7, 4096, 33000)
STEPS, LIMIT = 100, 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def groups(params: list[torch.Tensor]) -> list[dict[str, Any]]:
    """As in a run: weights decay, norms and biases do not."""
    return [{"params": params[1:], "weight_decay": 0.1}, {"params": params[:1], "weight_decay": 0.0}]


@pytest.mark.parametrize(
    ("kind", "factor"),
    [(FusedAdamW, None), (FusedAdamW, 0.37), (AdamW, None)],  # AdamW's gradients are clipped before it is called
    ids=["fused", "fused, clipped", "with loss scaler"],
)
def test_a_hundred_random_steps(kind: Any, factor: float | None) -> None:
    """Weights and both moments within 1e-6 of fp64; rates change, gradients span nine orders of magnitude, some are zero."""
    torch.manual_seed(7)
    ours = [torch.randn(size, device=DEVICE) for size in SIZES]
    torch32, torch64 = [p.clone() for p in ours], [p.double() for p in ours]
    options = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    one = kind(groups(ours), **options)
    two, three = torch.optim.AdamW(groups(torch32), **options), torch.optim.AdamW(groups(torch64), **options)
    for step in range(STEPS):
        rate = 1e-3 * (1.0 - 0.9 * step / STEPS)
        for optimizer in (one, two, three):
            for group in optimizer.param_groups:
                group["lr"] = rate
        for p, q, r in zip(ours, torch32, torch64):
            grad = torch.randn_like(p) * 10.0 ** torch.empty_like(p).uniform_(-8, 1)
            grad[:: step % 5 + 2] = 0.0
            p.grad = grad.clone()
            q.grad = grad * (1.0 if factor is None else factor)
            r.grad = grad.double() * (1.0 if factor is None else float(torch.tensor(factor)))
        if factor is not None:
            one.gradient_factor = torch.tensor(factor, device=DEVICE)
        one.step()
        two.step()
        three.step()
    for p, q, r in zip(ours, torch32, torch64):
        assert off(p, r) < LIMIT
        assert off(p, q) < LIMIT
        for moment in ("exp_avg", "exp_avg_sq"):
            assert off(one.state[p][moment], three.state[r][moment]) < LIMIT, moment
    assert all(group["step"] == STEPS for group in one.param_groups)


def test_a_wrong_update_would_be_seen() -> None:
    """The limit is tight: bias correction that is one step late is far beyond it."""
    torch.manual_seed(7)
    right, late = torch.randn(4096, device=DEVICE), None
    late = right.clone()
    one, two = FusedAdamW([right], lr=1e-3), FusedAdamW([late], lr=1e-3)
    two.param_groups[0]["step"] = 1
    for _ in range(STEPS):
        grad = torch.randn_like(right)
        right.grad, late.grad = grad.clone(), grad.clone()
        one.step()
        two.step()
    assert off(late, right) > 10 * LIMIT
