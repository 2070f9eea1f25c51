"""Offload to the host on a GPU: whole runs with the optimizer there, and passes with activations there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_offload import LAYERS, equal, job_of, model, options, passes, same_checkpoints, state_lies_on_the_host
from tests.ranks import RankPool
from tests.training import train

__all__ = ["model"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bf16", "adamw_8bit"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_with_its_optimizer_on_the_host(
    dtype: str, optim: str, model: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    common = options(model, dtype=dtype, optim=optim, gradient_accumulation_steps=4, deterministic=True, async_save=True)
    plain = train(pool, tmp_path / "plain", 1, **common)
    offloaded = train(pool, tmp_path / "host", 1, optimizer_cpu_offload=True, **common)
    assert (offloaded.losses, offloaded.norms) == (plain.losses, plain.norms)
    same_checkpoints(plain, offloaded, 4)
    (offloaded.directory / "iter_0000004").rename(tmp_path / "away")
    again = train(
        pool, tmp_path, 1, **common | dict(resume_from_checkpoint=str(offloaded.directory), optimizer_cpu_offload=True)
    )
    assert again.losses == plain.losses
    same_checkpoints(plain, again, 4)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_where_the_state_lies(optim: str, model: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    job = job_of(model, tmp_path, 1, dtype="bf16", optim=optim, optimizer_cpu_offload=True)
    job.write(tmp_path / "run.json")
    [(inside, tensors, _)] = pool.run(1, state_lies_on_the_host, str(tmp_path / "run.json"))
    assert inside == tensors > 50


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("more", [{"packing": True}, {"padding_free": False, "batch_size": 4}], ids=["packed", "padded"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_activations_on_the_host(
    recompute: str, more: dict[str, Any], deterministic: bool, model: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    """Bit for bit with deterministic kernels; with the fast ones, whose additions have no order, to bf16's rounding."""
    job = job_of(model, tmp_path, 1, gradient_accumulation_steps=4, dtype="bf16", deterministic=deterministic, **more)
    job.write(tmp_path / "run.json")
    plain, *offloaded = (
        pool.run(1, passes, str(tmp_path / "run.json"), layers, recompute)[0] for layers in (0, 1, LAYERS - 1, LAYERS)
    )
    for run in offloaded:
        assert run["kept"] < plain["kept"]
        if deterministic:
            equal(plain, run)
            continue
        for one, other in zip(plain["gradients"][0][1:], run["gradients"][0][1:], strict=True):
            assert float((one - other).norm()) <= 1e-2 * float(one.norm())
