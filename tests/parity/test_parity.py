"""`swift parity` holds where the engine is right, and names what is wrong where it is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megaswift.arguments import ParityArguments
from megaswift.errors import DataError, UserError
from megaswift.parity.command import parity_main
from megaswift.parity.layouts import parse_layouts
from tests import tiny
from tests.parity.planted import run_rank
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("parity")
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}  # a base so small that one more matters
    return tiny_start(root, "qwen2", **config), write_rows(root / "rows.jsonl")


def parity(
    pool: RankPool, start: tuple[Path, Path], output: Path, world: int, fault: str = "", **options: Any
) -> dict[str, Any]:
    """Run `swift parity` on pooled ranks; what parity.json says."""
    folder, rows = start
    options = {"steps": 3, "learning_rate": 1e-3, "gradient_accumulation_steps": 8 // world, **options}
    args = ParityArguments(resume_from_checkpoint=str(folder), dataset=[str(rows)], output_dir=str(output), **options)

    def start_ranks(place: Any, job: Path, module: str = "") -> None:
        pool.run(place.world_size, run_rank, str(job), fault)

    with (
        mock.patch("megaswift.engine.launch.start_ranks", start_ranks),
        mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world)}),
    ):
        parity_main(args)
    return json.loads(next(output.rglob("parity.json")).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, {"tp": 1, "pp": 1}),
        (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
        (2, {"tp": 1, "pp": 1, "packing": True, "max_length": 48}),
        (2, {"tp": 1, "pp": 2, "packing": True, "max_length": 48}),
    ],
    ids=str,
)
def test_the_engine_is_transformers(
    world: int, options: dict[str, Any], pool: RankPool, start: tuple[Path, Path], tmp_path: Path
) -> None:
    """Losses, norms, every gradient and every weight after three steps, packed rows included."""
    found = parity(pool, start, tmp_path, world, **options)
    assert found["problem"] is None
    assert len(found["reference"]) == 3
    assert all(step["loss_difference"] < 1e-6 for step in found["reference"])
    assert set(found["reference"][0]["gradient_groups"]) == {"embedding", "attention", "mlp", "norm"}


@pytest.mark.parametrize(
    ("fault", "world", "options", "message"),
    [
        ("label shifted by one", 1, {}, "step 1: the loss"),
        ("mean over micro batches", 1, {}, "step 1: the loss"),
        (
            "norm gradient not reduced under sequence parallelism",
            2,
            {"tp": 2, "sequence_parallel": True},
            "norm.weight differs",
        ),
        ("untied head", 1, {}, "step 1: the gradient of model.embed_tokens.weight"),
        ("RoPE base off by one", 1, {}, "step 1: the loss"),
    ],
)
def test_planted_faults_are_named(
    fault: str, world: int, options: dict[str, Any], message: str, pool: RankPool, start: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        parity(pool, start, tmp_path, world, fault, **{"tp": 1, "pp": 1, **options})
    assert message in caught.value.what


def test_layouts_are_compared(pool: RankPool, start: tuple[Path, Path], tmp_path: Path) -> None:
    layouts = "tp1 tp2,sp pp2,mbs2 dp2,padded tp2,pp2,recompute pp2,resume"
    found = parity(pool, start, tmp_path, 1, layouts=layouts, gradient_accumulation_steps=8, steps=6)
    assert found["problem"] is None
    assert list(found["layouts"]) == layouts.split()
    with pytest.raises(DataError, match=r"layout tp2, step \d"):
        # The head of tied models is what differs: at tp 1 both layouts would have the same fault.
        _one_faulty(pool, start, tmp_path / "faulty")


def _one_faulty(pool: RankPool, start: tuple[Path, Path], output: Path) -> None:
    folder, rows = start
    args = ParityArguments(
        resume_from_checkpoint=str(folder), dataset=[str(rows)], output_dir=str(output), steps=2, learning_rate=1e-3,
        gradient_accumulation_steps=8, layouts="tp1 tp2",
    )  # fmt: skip

    def start_ranks(place: Any, job: Path, module: str = "") -> None:
        pool.run(place.world_size, run_rank, str(job), "RoPE base off by one" if place.world_size == 2 else "")

    with mock.patch("megaswift.engine.launch.start_ranks", start_ranks):
        parity_main(args)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_families(name: str, pool: RankPool, tmp_path: Path) -> None:
    made = tiny_start(tmp_path, name), write_rows(tmp_path / "rows.jsonl")
    assert parity(pool, made, tmp_path / "out", 2, tp=2, pp=1, steps=2)["problem"] is None


def test_layout_names() -> None:
    first, second = parse_layouts("tp1 tp2,pp2,dp2,sp,mbs4")
    assert (second.world_size, second.mbs, second.switches) == (8, 4, ("sp",))
    assert first.world_size == 1
    for text, message in (("tp1", "at least two"), ("tp1 tp2,xx", "'xx' is not known"), ("tp1 tp0", "not known")):
        with pytest.raises(UserError, match=message):
            parse_layouts(text)
