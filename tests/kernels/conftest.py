"""Shared by the kernel tests: devices, types, and the comparison with references in fp64.

The same tests cover three ways: the PyTorch twins (no GPU), the Triton kernels in Triton's interpreter
(`TRITON_INTERPRET=1`, where Triton is installed), and the kernels themselves on a GPU.
"""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)
CASES = [("cpu", torch.float32)] + ([("cuda", torch.float32), ("cuda", torch.bfloat16)] if torch.cuda.is_available() else [])
LIMITS = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1]).split('.')[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """A device and the activation type to test on it."""
    torch.manual_seed(torch.seed() % 2**31)  # fresh input every run; the seed is in the failure's captured output
    print("seed", torch.initial_seed())
    return request.param


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative distance in the Euclidean norm, in fp64."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape and torch.isfinite(got).all()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def check(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Fail unless `got` is `want` up to the rounding of `dtype`."""
    assert off(got, want) < LIMITS[dtype] * slack


def leaf(*shape: int, like: tuple[str, torch.dtype], scale: float = 1.0) -> torch.Tensor:
    """A random tensor that wants a gradient."""
    return (torch.randn(*shape, device=like[0]) * scale).to(like[1]).requires_grad_()


def double(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in fp64, as a new leaf."""
    return tensor.detach().double().requires_grad_()
