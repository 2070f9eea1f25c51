"""Golden runs: 50 steps of every family at three layouts, four with experts, give the losses that stand in tests/golden.

A change that moves a loss edits these files (`python -m tests.make_golden [family ...]`) and says why in CHANGELOG.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megaswift.models import families
from tests import tiny
from tests.ranks import RankPool
from tests.training import tiny_start, train, write_rows

GOLDEN = Path(__file__).parent.parent / "golden"
# name -> processes, options; the global batch is 4 rows in each
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {"gradient_accumulation_steps": 4}),
    "tp2,sp": (2, {"tp": 2, "sequence_parallel": True, "gradient_accumulation_steps": 2}),
    "pp2": (2, {"pp": 2, "gradient_accumulation_steps": 2}),
}
WITH_EXPERTS = LAYOUTS | {"ep2": (2, {"ep": 2, "gradient_accumulation_steps": 2})}
EVERYWHERE = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)  # whose layouts the default suite walks; the others': make test-long
STEPS = 50
# Relative: what another processor's order of summation may change in 50 steps. Norms have no mean to hide in.
LIMITS = {"loss": 1e-5, "eval_loss": 1e-5, "grad_norm": 1e-4}


def layouts_of(name: str) -> dict[str, tuple[int, dict[str, Any]]]:
    """The layouts of a family."""
    family = next(family for family in families().values() if family.name == name)
    return WITH_EXPERTS if any(kind.experts for kind in family.layers(tiny.tiny_config(name))) else LAYOUTS


def golden_run(pool: RankPool, start: Path, rows: Path, output: Path, layout: str) -> dict[str, list[float]]:
    """Losses, validation losses and gradient norms of a golden run."""
    world, options = WITH_EXPERTS[layout]
    run = train(
        pool, output, world, resume_from_checkpoint=str(start), dataset=[str(rows)], dataset_test_ratio=0.1, max_steps=STEPS,
        eval_steps=25, save_steps=1000, save_only_model=True, **options,
    )  # fmt: skip
    return {"loss": run.losses, "eval_loss": run.eval_losses, "grad_norm": run.norms}


def difference(found: dict[str, list[float]], golden: dict[str, list[float]]) -> str | None:
    """The first figure that is not the golden one, in words; None if all are."""
    for kind, limit in LIMITS.items():
        if len(found[kind]) != len(golden[kind]):
            return f"{len(found[kind])} values of {kind} instead of {len(golden[kind])}"
        for number, (value, wanted) in enumerate(zip(found[kind], golden[kind]), start=1):
            if not abs(value - wanted) <= limit * abs(wanted):
                return f"{kind} number {number} is {value}, the golden file has {wanted} (allowed: {limit:g} relative)"
    return None


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    root = tmp_path_factory.mktemp(request.param)
    return request.param, tiny_start(root, request.param), write_rows(root / "rows.jsonl")


@pytest.mark.parametrize("layout", WITH_EXPERTS)
def test_losses_are_golden(family: tuple[str, Path, Path], layout: str, pool: RankPool, tmp_path: Path) -> None:
    name, start, rows = family
    if layout not in layouts_of(name):
        pytest.skip("a model without experts")
    if layout != "tp1" and name not in EVERYWHERE and "MEGASWIFT_LONG" not in os.environ:
        pytest.skip("a part of make test-long")
    path = GOLDEN / f"losses_{name}.json"
    problem = difference(golden_run(pool, start, rows, tmp_path, layout), json.loads(path.read_text(encoding="utf-8"))[layout])
    assert problem is None, (
        f"{name} at {layout}: {problem}. If this change is meant, edit tests/golden/{path.name} "
        f"(python -m tests.make_golden {name}) and say in CHANGELOG.md why the loss moved."
    )


def test_the_files_are_whole() -> None:
    """Every family, three layouts, 50 steps; the layouts agree with each other."""
    for name in tiny.FAMILIES:
        golden = json.loads((GOLDEN / f"losses_{name}.json").read_text(encoding="utf-8"))
        assert list(golden) == list(layouts_of(name)), name
        assert all(len(run["loss"]) == len(run["grad_norm"]) == STEPS and len(run["eval_loss"]) == 2 for run in golden.values())
        assert golden["tp1"]["loss"][-1] < golden["tp1"]["loss"][0]
        for layout in layouts_of(name):
            assert difference(golden[layout], golden["tp1"]) is None, f"{name} at {layout}"


def test_a_moved_loss_is_told() -> None:
    golden = json.loads((GOLDEN / "losses_llama.json").read_text(encoding="utf-8"))["tp1"]
    moved = {**golden, "loss": [*golden["loss"][:-1], golden["loss"][-1] * 1.00002]}
    assert difference(golden, golden) is None
    assert str(difference(moved, golden)).startswith("loss number 50 is")
    assert str(difference({**golden, "loss": golden["loss"][:-1]}, golden)).startswith("49 values of loss")
