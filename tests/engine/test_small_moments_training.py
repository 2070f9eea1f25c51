"""`--optim adamw_bf16` and `adamw_8bit` in whole runs: the loss of fp32 moments, less memory, resume at any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megaswift.errors import UserError
from tests.ranks import RankPool
from tests.training import Trained, tiny_start, train, write_rows


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("small_moments")
    return tiny_start(root, dtype="float32"), write_rows(root / "rows.jsonl")


def six_steps(pool: RankPool, start: tuple[Path, Path], output: Path, world_size: int, **options: object) -> Trained:
    release, rows = start
    common = dict(batch_size=1, gradient_accumulation_steps=8 // world_size, max_steps=6, save_steps=3)
    return train(
        pool, output, world_size, **{"resume_from_checkpoint": str(release), "dataset": [str(rows)], **common, **options}
    )


@pytest.mark.parametrize("optim", ["adamw_bf16", "adamw_8bit"])
def test_same_loss_and_resume(optim: str, start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    plain = six_steps(pool, start, tmp_path / "plain", 2)
    small = six_steps(pool, start, tmp_path / "small", 2, optim=optim)
    assert small.losses[0] == plain.losses[0] and small.losses != plain.losses
    assert all(abs(a / b - 1) < 2e-3 for a, b in zip(small.losses, plain.losses))
    memory = [json.loads((run.directory / "plan.json").read_text())["rank_bytes"]["optimizer"] for run in (plain, small)]
    assert memory[1] == memory[0] * {"adamw_bf16": 4, "adamw_8bit": 2}[optim] // 8  # of fp32 weights, which need no copy

    shutil.rmtree(small.directory / "iter_0000006")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "small", other)
    again = six_steps(pool, start, tmp_path / "small", 2, optim=optim, resume=True)
    assert again.losses == small.losses  # bit for bit at the same layout
    moved = six_steps(pool, start, other, 2, optim=optim, resume=True, resume_from_checkpoint=str(other_run(other)), pp=2)
    assert all(abs(a / b - 1) < 2e-3 for a, b in zip(moved.losses, plain.losses))  # other groups share a scale now
    shutil.rmtree(moved.directory / "iter_0000006")
    back = six_steps(pool, start, other, 2, resume_from_checkpoint=str(other_run(other)), resume=True)  # with fp32 moments
    assert len(back.losses) == 6 and back.losses[3:] != small.losses[3:]
    assert all(abs(a / b - 1) < 2e-3 for a, b in zip(back.losses, plain.losses))


def other_run(root: Path) -> Path:
    return next(path.parent for path in root.rglob("plan.json"))


def test_fp16_is_refused(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--optim adamw_8bit does not work with fp16"):
        six_steps(pool, start, tmp_path, 1, optim="adamw_8bit", dtype="fp16")
    assert not any(tmp_path.rglob("plan.json"))
