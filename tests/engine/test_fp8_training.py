"""`--fp8 true` in whole runs: the losses of bf16, any layout, and what is refused before a process starts.

The command line refuses it on a CPU; with that check replaced the same code runs with the twins of the kernels.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.errors import UserError
from megaswift.launch import versions
from tests import tiny
from tests.ranks import RankPool
from tests.runs import resolved_run
from tests.training import Trained, long, tiny_start, train, write_rows

STEPS = 12


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("fp8")
    return tiny_start(root, "qwen2", dtype="float32"), write_rows(root / "rows.jsonl")


def run(pool: RankPool, start: tuple[Path, Path], output: Path, world: int, **options: Any) -> Trained:
    release, rows = start
    common = dict(dtype="bf16", gradient_accumulation_steps=4 // world, max_steps=STEPS, eval_steps=6, save_steps=1000)
    with mock.patch.object(versions, "check_fp8"):
        return train(
            pool, output, world, resume_from_checkpoint=str(release), dataset=[str(rows)], dataset_test_ratio=0.1,
            save_only_model=True, **{**common, **options},
        )  # fmt: skip


def apart(one: Trained, two: Trained) -> float:
    """The largest relative difference of two runs' losses, validation included."""
    pairs = [*zip(one.losses, two.losses), *zip(one.eval_losses, two.eval_losses)]
    assert len(pairs) == STEPS + 2
    return max(abs(a / b - 1) for a, b in pairs)


@pytest.fixture(scope="module")
def plain(start: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Trained:
    return run(pool, start, tmp_path_factory.mktemp("bf16"), 1)


@pytest.fixture(scope="module")
def fp8(start: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Trained:
    return run(pool, start, tmp_path_factory.mktemp("fp8"), 1, fp8=True)


def test_losses_are_those_of_bf16(plain: Trained, fp8: Trained) -> None:
    assert fp8.losses[-1] < 0.9 * fp8.losses[0]
    assert 1e-5 < apart(fp8, plain) < 0.01


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, dict(tp=2, sequence_parallel=True)),
        pytest.param(2, dict(pp=2, gradient_checkpointing=True), marks=long),
        pytest.param(2, dict(cp=2), marks=long),
        (1, dict(batch_size=4, gradient_accumulation_steps=1, padding_free=False)),  # one micro batch: nothing is kept
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_layouts(start: tuple[Path, Path], fp8: Trained, pool: RankPool, tmp_path: Path, world: int, options: dict) -> None:
    if torch.cuda.is_available() and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    assert apart(run(pool, start, tmp_path, world, fp8=True, **options), fp8) < 0.005


def test_a_cpu_and_an_old_gpu_are_refused(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--fp8 needs a GPU"):
            train(pool, tmp_path, 1, resume_from_checkpoint=str(start[0]), dataset=[str(start[1])], fp8=True)
    card = SimpleNamespace(
        is_available=lambda: True, get_device_capability=lambda index: (9, 8 * index), get_device_name=lambda index: "NVIDIA X"
    )
    with mock.patch.object(torch, "cuda", card):
        versions.check_fp8(2)
        card.get_device_capability = lambda index: (9 - index, 0)
        with pytest.raises(UserError, match=r"compute capability 8.9 or above.*GPU 1, NVIDIA X, has 8.0"):
            versions.check_fp8(2)


@pytest.mark.parametrize(("options", "message"), [({}, "this is fp32"), (dict(dtype="fp16"), "this is fp16")])
def test_other_precisions_are_refused(
    start: tuple[Path, Path], pool: RankPool, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=f"--fp8 goes with bf16 training; {message}"):
        run(pool, start, tmp_path, 1, fp8=True, **{"dtype": "fp32", **options})
    assert not any(tmp_path.rglob("plan.json"))


def test_sides_of_matrices(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    if torch.cuda.is_available() and torch.cuda.device_count() < 4:
        pytest.skip("needs 4 GPUs, or none")
    with pytest.raises(UserError, match="linear_fc2 is 64 x 24 on each rank of --tp 4"):
        run(pool, start, tmp_path, 4, fp8=True, tp=4)
    resolved_run(dtype="bf16", fp8=True, tp=2)
    with pytest.raises(UserError, match="linear_qkv is 192 x 72"):
        resolved_run(config=tiny.tiny_config("llama", hidden_size=72, head_dim=12), dtype="bf16", fp8=True)


def test_parity_refuses_it(start: tuple[Path, Path], tmp_path: Path) -> None:
    from megaswift.commands.parity import parity_main
    from megaswift.config.options import ParityArguments

    with pytest.raises(UserError, match="more than parity allows"):
        parity_main(ParityArguments(resume_from_checkpoint=str(start[0]), output_dir=str(tmp_path), fp8=True))
