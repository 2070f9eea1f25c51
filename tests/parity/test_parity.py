"""`swift parity` holds where the engine is right, and names what is wrong where it is not."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.commands.parity import parity_main
from megaswift.config.options import ParityArguments, SftArguments
from megaswift.errors import DataError, UserError
from megaswift.parity import noise
from megaswift.parity.compare import StepDifference, beyond, verdict, worst
from megaswift.parity.layouts import parse_layouts
from tests import tiny
from tests.parity.planted import CASES, run_rank, run_sft_rank
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
        mock.patch("megaswift.launch.agent.start_ranks", start_ranks),
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
        (4, {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True, "packing": True, "max_length": 48}),
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


@pytest.mark.parametrize("fault", CASES)
def test_planted_faults_are_named(fault: str, pool: RankPool, start: tuple[Path, Path], tmp_path: Path) -> None:
    world, options, message = CASES[fault]
    options = {"tp": 1, "pp": 1, **options}
    with pytest.raises(DataError) as caught:
        parity(pool, start, tmp_path / "bad", world, fault, **options)
    assert message in caught.value.what
    assert parity(pool, start, tmp_path / "good", world, **options)["problem"] is None


def test_layouts_are_compared(pool: RankPool, start: tuple[Path, Path], tmp_path: Path) -> None:
    layouts = "tp1 tp2,sp pp2,mbs2 dp2,padded tp2,pp2,recompute pp2,vpp2,resume"
    found = parity(pool, start, tmp_path, 1, layouts=layouts, gradient_accumulation_steps=8, steps=6)
    assert found["problem"] is None
    assert list(found["layouts"]) == layouts.split()
    assert all(milliseconds > 0 for milliseconds in found["milliseconds"].values())
    with pytest.raises(DataError, match=r"layout tp2, step 1: the loss differs by .* from tp1, allowed 1.0e-06"):
        one_faulty(pool, start, tmp_path / "faulty", "RoPE base off by one")


def one_faulty(pool: RankPool, start: tuple[Path, Path], output: Path, fault: str, **options: Any) -> None:
    """Compare a layout of two processes that has a fault with one of one process that has none."""
    folder, rows = start
    options = {"steps": 2, "learning_rate": 1e-3, "gradient_accumulation_steps": 8, "layouts": "tp1 tp2", **options}
    args = ParityArguments(resume_from_checkpoint=str(folder), dataset=[str(rows)], output_dir=str(output), **options)

    def start_ranks(place: Any, job: Path, module: str = "") -> None:
        pool.run(place.world_size, run_rank, str(job), fault if place.world_size == 2 else "")

    with mock.patch("megaswift.launch.agent.start_ranks", start_ranks):
        parity_main(args)


def test_in_bf16_the_noise_is_measured(pool: RankPool, start: tuple[Path, Path], tmp_path: Path) -> None:
    """The limit of each step comes from two seeds; honest layouts are within it, a fault is not."""
    more = {"dtype": "bf16", "gradient_accumulation_steps": 8}
    found = parity(pool, start, tmp_path / "good", 1, layouts="tp1 tp2,sp pp2 mbs4,padded", steps=5, **more)
    assert found["problem"] is None
    assert len(found["noise"]) == 2 and found["noise"][0] != found["noise"][1]
    limits, plain = found["limits"], found["layouts"]["tp1"]
    assert limits == sorted(limits) and limits[0] > 1e-6 and limits[-1] < 0.05
    for noisy in found["noise"]:
        assert all(3 * abs(a - b) / b <= limit * (1 + 1e-9) for a, b, limit in zip(noisy, plain, limits))
    for fault in ("label shifted by one", "mean over micro batches"):
        with pytest.raises(DataError, match=r"layout tp2, step \d: the loss differs"):
            one_faulty(pool, start, tmp_path / fault, fault, **more)


def test_a_whole_run_both_ways(pool: RankPool, start: tuple[Path, Path], tmp_path: Path) -> None:
    """--learning true: every step's loss and the validation losses, packed, on two pipeline stages; both models are kept."""
    found = learning(pool, start, tmp_path, "", keep_dumps=True)
    assert found["problem"] is None
    curves = found["learning"]
    assert len(curves["loss"]) == 6 and list(curves["eval_loss"]) == ["3", "6"]
    assert all(engine == pytest.approx(reference, rel=2e-6) for engine, reference in curves["loss"])
    assert curves["difference"] < 1e-5 and curves["limit"] == 5e-3
    assert curves["eval_loss"]["6"][0] < curves["loss"][0][0]
    assert list(tmp_path.rglob("reference/model.safetensors")) and list(tmp_path.rglob("engine/iter_0000006"))


def test_a_run_that_learns_something_else_is_told(pool: RankPool, start: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the validation loss is .* in the engine and .* in transformers: they differ by"):
        learning(pool, start, tmp_path, "label shifted by one")
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("iter_*"))  # no --keep_dumps
    with pytest.raises(UserError, match="no validation rows"):
        learning(pool, start, tmp_path / "other", "", dataset_test_ratio=0.0)


def learning(pool: RankPool, start: tuple[Path, Path], output: Path, fault: str, **options: Any) -> dict[str, Any]:
    """Run `swift parity --learning true` on two pooled ranks; what parity.json says."""
    folder, rows = start
    options = {"dataset_test_ratio": 0.2, "packing": True, "max_length": 64, "eval_steps": 3, **options}
    args = ParityArguments(
        resume_from_checkpoint=str(folder), dataset=[str(rows)], output_dir=str(output), learning=True, pp=2, max_steps=6,
        learning_rate=1e-3, gradient_accumulation_steps=2, **options,
    )  # fmt: skip

    def start_ranks(place: Any, job: Path, *_: Any) -> None:
        pool.run(place.world_size, run_sft_rank, str(job), fault)

    with (
        mock.patch("megaswift.launch.agent.start_ranks", start_ranks),
        mock.patch.dict(os.environ, {"NPROC_PER_NODE": "2"}),
    ):
        parity_main(args)
    return json.loads(next(output.rglob("parity.json")).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_families(name: str, pool: RankPool, tmp_path: Path) -> None:
    made = tiny_start(tmp_path, name), write_rows(tmp_path / "rows.jsonl")
    assert parity(pool, made, tmp_path / "out", 2, tp=2, pp=1, steps=2)["problem"] is None


def test_stages_of_different_sizes(pool: RankPool, tmp_path: Path) -> None:
    """Hidden states are those of the layers that a stage has."""
    made = tiny_start(tmp_path, "llama", num_hidden_layers=3), write_rows(tmp_path / "rows.jsonl")
    assert parity(pool, made, tmp_path / "out", 2, tp=1, pp=2, steps=1)["problem"] is None


def test_layout_names() -> None:
    first, second = parse_layouts("tp1 tp2,pp2,dp2,sp,mbs4")
    assert (second.world_size, second.mbs, second.switches) == (8, 4, ("sp",))
    assert first.world_size == 1
    three, shared = parse_layouts("tp3,pp2 dp3")
    assert three.apply(SftArguments(), 16).tp == 3  # one data-parallel rank runs all 16 rows, whatever the number of processes
    with pytest.raises(UserError, match="16 rows does not divide into 3 = 1 rows x 3 data-parallel ranks"):
        shared.apply(SftArguments(), 16)
    for text, message in (("tp1", "at least two"), ("tp1 tp2,xx", "'xx' is not known"), ("tp1 tp0", "not known")):
        with pytest.raises(UserError, match=message):
            parse_layouts(text)


def test_ranks_of_a_comparison_leave_nothing(pool: RankPool, start: tuple[Path, Path], tmp_path: Path) -> None:
    """Models, process groups and their threads are gone when it is over."""
    from tests.engine.test_training import left_behind

    before, threads = pool.run(2, left_behind)[0][0], []  # other tests may have left a model in the ranks that all share
    for k in range(3):
        parity(pool, start, tmp_path / str(k), 2, tp=2, pp=1, steps=1)
        models, count = pool.run(2, left_behind)[0]
        assert models <= before
        threads.append(count)
    assert threads[2] <= threads[0]


@pytest.mark.parametrize("found", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["hidden", "loss", "gradient", "grad_norm", "weight"])
def test_each_difference_is_judged(what: str, found: float) -> None:
    """The first that is beyond its limit is told; a number that is none is beyond every limit."""

    def of(**changes: float) -> StepDifference:
        values = dict.fromkeys(("hidden", "loss", "gradient", "grad_norm", "weight"), 0.0) | changes
        return StepDifference(
            1, (1.0, 1.0), (1.0, 1.0), values["loss"], values["grad_norm"], {},
            (values["gradient"], "g"), (values["weight"], "w"), [("layer 0", values["hidden"])],
        )  # fmt: skip

    assert verdict([of(), of()], "fp32") is None
    problem = verdict([of(), of(**{what: found})], "fp32")
    assert problem is not None and (what.replace("_", " ") in problem)


def test_a_layout_whose_loss_is_no_number_is_told() -> None:
    table = [("dp1", [0.0, 0.0]), ("tp2", [1e-9, float("nan")])]
    assert beyond(table[:1], [1e-6, 1e-6]) is None
    assert "layout tp2, step 2" in str(beyond(table, [1e-6, 1e-6]))


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("wrong", [1.5, float("nan"), float("inf")])
def test_the_tensor_that_differs_most_is_named(place: int, wrong: float) -> None:
    """Wherever it stands in the list, and above all where it is no number."""
    one = torch.ones(3)
    values = [one * (wrong if number == place else 1.001) for number in range(3)]
    groups: dict[str, float] = {}
    difference, where = worst(((f"mlp.{number}", value, one) for number, value in enumerate(values)), groups)
    assert where == f"mlp.{place}" and groups == {"mlp": difference}
    assert difference == pytest.approx(0.5 if wrong == 1.5 else math.inf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_moves_weights_by_one_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    reloaded: list[int] = []
    found = []
    for seed in (1, 1, 2):
        model = torch.nn.Linear(64, 64, dtype=dtype)
        torch.nn.init.constant_(model.weight, 1.5)
        optimizer = SimpleNamespace(reload_model_params=lambda: reloaded.append(1))
        noise.perturb(SimpleNamespace(bare_model=model, optimizer=optimizer), seed)
        found.append(model.weight.detach())
    assert len(reloaded) == 3, "masters of the optimizer follow"
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    moved = (found[0].float() - 1.5).abs()
    assert 0.1 < (moved > 0).float().mean() < 1 and moved.max() <= 2 * torch.finfo(dtype).eps


def test_experts_spread_beside_transformers_and_beside_each_other(pool: RankPool, tmp_path: Path) -> None:
    """Gradients and weights of every expert, by the names of the folder; a layout that spreads them has the same losses."""
    made = tiny_start(tmp_path, "granitemoe"), write_rows(tmp_path / "rows.jsonl")
    assert parity(pool, made, tmp_path / "out", 2, tp=1, pp=1, ep=2, steps=2)["problem"] is None
    (layout,) = parse_layouts("tp2,ep2,etp2,dp2 tp1")[:1]
    assert (layout.world_size, layout.apply(SftArguments(), 16).ep, layout.apply(SftArguments(), 16).etp) == (4, 2, 2)
