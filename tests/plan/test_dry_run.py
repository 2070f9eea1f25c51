"""`--dry_run true` and `swift plan` as users type them: what is checked, what is written, what is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megaswift.commands.plan import plan_main
from megaswift.commands.rlhf import rlhf_main
from megaswift.commands.sft import sft_main
from megaswift.config.options import PlanArguments, RlhfArguments, SftArguments
from megaswift.errors import DataError, UserError
from megaswift.run.cards import card_of
from megaswift.run.memory import first_rank
from megaswift.run.planner import Place
from megaswift.run.spec import Run
from megaswift.train.shape import rank_shape
from tests import tiny
from tests.plan.shapes import run_of
from tests.runs import resolved_run
from tests.training import tiny_start, write_rows


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dry")
    tiny_start(root)
    write_rows(root / "rows.jsonl")
    return root


def dry(start: Path, output: Path, processes: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    monkeypatch.setenv("NPROC_PER_NODE", str(processes))
    args = SftArguments(
        resume_from_checkpoint=str(start / "start"), dataset=[str(start / "rows.jsonl")], output_dir=str(output), max_length=128,
        max_steps=3, dry_run=True, **options,
    )  # fmt: skip
    return sft_main(args)


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, {}),
        (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
        (2, {"cp": 2}),
        (2, {"tp": 2, "sft_type": "lora", "lora_rank": 4}),
    ],
    ids=["one", "tp2 pp2 sp", "cp2", "lora tp2"],
)
def test_nothing_is_trained_or_written_but_the_plan(
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    processes: int,
    options: Any,
) -> None:
    before = sorted(path for path in (start / "start").rglob("*"))
    made = dry(start, tmp_path / "out", processes, monkeypatch, **options)
    assert sorted(path.name for path in made.iterdir()) == ["plan.json", "run.json"]
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == sorted(["plan.json", "run.json"])
    assert sorted(path for path in (start / "start").rglob("*")) == before
    told = json.loads((made / "plan.json").read_text(encoding="utf-8"))
    assert told["world_size"] == processes and told["peak_bytes"] > sum(told["rank_bytes"].values())
    run = Run.read(made / "run.json")
    assert run.data.train_rows and run.schedule.train_iters == 3
    assert told["working_bytes"]["activations"] > 0
    said = capsys.readouterr().out
    assert "as planned" in said and "nothing was trained" in said


def test_a_run_may_follow_in_the_same_directory(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dry run leaves does not stand in the way of the run, or of another dry run."""
    for _ in range(2):
        assert dry(start, tmp_path / "out", 1, monkeypatch, add_output_dir_suffix=False) == tmp_path / "out"
    (tmp_path / "out" / "other").touch()
    with pytest.raises(UserError, match="is not empty"):
        dry(start, tmp_path / "out", 1, monkeypatch, add_output_dir_suffix=False)
    (tmp_path / "out" / "plan.json").write_text("mine", encoding="utf-8")
    dry(start, tmp_path / "out", 1, monkeypatch, add_output_dir_suffix=False, overwrite=True)
    assert (tmp_path / "out" / "plan.json").read_text(encoding="utf-8") == "mine", "what holds a run is not touched"


def test_what_would_fail_later_fails_now(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match="what this run saves needs"):
        dry(start, tmp_path / "out", 1, monkeypatch)
    with pytest.raises(UserError, match="--tp 3 does not divide"):
        dry(start, tmp_path / "out", 3, monkeypatch, tp=3)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_swift_sft_refuses_before_a_process_starts(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a card that is too small nothing starts and nothing is left; what `--fit true` takes stands in run.json."""
    card = card_of("0.6")
    monkeypatch.setattr("megaswift.commands.sft.place_here", lambda gpus, local, batch: Place(gpus, card, 0, local, 1, batch))
    monkeypatch.setattr("megaswift.commands.sft._start", lambda *_: pytest.fail("a rank was started"))
    options = {"batch_size": 32, "gradient_accumulation_steps": 1}
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    words = {
        "resume_from_checkpoint": str(start / "start"),
        "dataset": [str(start / "rows.jsonl")],
        "max_length": 128,
        "max_steps": 3,
    }
    with pytest.raises(UserError, match="the fullest rank needs about") as caught:
        sft_main(SftArguments(output_dir=str(tmp_path / "out"), **words, **options))
    assert "--batch_size" in caught.value.fix and not (tmp_path / "out").exists()
    made = dry(start, tmp_path / "out", 1, monkeypatch, fit="true", **options)
    assert "--fit true takes --batch_size" in capsys.readouterr().out
    batch = Run.read(made / "run.json").batch
    assert batch.micro_batch_size < 32 and batch.global_batch_size == 32


def test_a_model_that_is_not_the_planned_one_is_told(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaswift.commands.sft.first_rank", lambda *_: (5, 5))
    with pytest.raises(DataError, match="the plan says 5 and 5"):
        dry(start, tmp_path / "out", 1, monkeypatch)


def test_preferences_too(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "pairs.jsonl"
    row = {"query": "who are you", "response": "a good model", "rejected_response": "small"}
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(40)), encoding="utf-8")
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    made = rlhf_main(
        RlhfArguments(
            resume_from_checkpoint=str(start / "start"), dataset=[str(rows)], output_dir=str(tmp_path / "out"), max_length=128,
            max_steps=2, dry_run=True, rlhf_type="dpo",
        )
    )  # fmt: skip
    assert sorted(path.name for path in made.iterdir()) == ["plan.json", "run.json"]


LAYOUTS: list[dict[str, Any]] = [
    {}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2, "sequence_parallel": True}, {"pp": 2, "vpp": 2}, {"ep": 2}, {"tp": 2, "ep": 2, "etp": 2},
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "qwen3_moe", "deepseek_v3"])
def test_the_plan_counts_what_the_engine_builds(family: str) -> None:
    """Exactly, at every layout: vocabulary padding, copies of tied embeddings, experts and buffers included."""
    config = tiny.tiny_config(family)
    experts = family in ("qwen3_moe", "deepseek_v3")
    for layout in LAYOUTS:
        if "ep" in layout and not experts:
            continue
        run = resolved_run(config=config, gradient_accumulation_steps=4, **layout)
        assert rank_shape(run, config) == first_rank(run, config), layout


def test_the_same_of_real_shapes() -> None:
    """Without a byte for weights: Qwen3-30B-A3B at 8 GPUs, and adapters of 7B."""
    for run, config in (
        run_of("moe-48", gpus=8, ep=4, tp=2, etp=2),
        run_of("7b", lora=("all-linear",), gpus=8, tp=2, pp=2),
    ):
        assert rank_shape(run, config) == first_rank(run, config)


def config_folder(place: Path, **values: Any) -> Path:
    """A folder with config.json and nothing else."""
    place.mkdir()
    content = tiny.tiny_config("qwen2", **values).to_dict()
    (place / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return place


def test_a_plan_needs_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_folder(tmp_path / "model")
    found = plan_main(
        PlanArguments(
            model_id_or_path=str(folder), gpus=4, card="H100", price=2.0, train_rows=1000, max_length=64, save_total_limit=1
        )
    )
    text = capsys.readouterr().out
    for words in ("Memory of the fullest rank", "of 79.1: fits", "GPU hours", "at 2 a GPU hour", "Layouts that fit"):
        assert words in text
    assert found["fits"] and found["run"]["steps"] == 63 and found["best"]
    assert found["run"]["money"] == pytest.approx(2 * found["run"]["gpu_hours"])
    assert found["run"]["gpu_hours"] == pytest.approx(4 * 63 * found["step_seconds"] / 3600)
    assert found["disk_bytes"] == found["checkpoint_bytes"], "63 steps are saved once"
    assert found["needed_bytes"] == found["peak_bytes"] + sum(found["outside_bytes"].values())
    assert list(folder.iterdir()) == [folder / "config.json"]


def test_a_plan_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_folder(tmp_path / "model")
    words = f"--model_id_or_path {folder} --card 1 --gpus 1 --json true --max_length 64 --sft_type lora --quantization_bit 8".split()
    plan_main(words)
    told = json.loads(capsys.readouterr().out)
    assert told["trainable"] < told["parameters"] and told["change"] is not None and told["card"]["bytes"] == 2**30


def test_a_plan_of_preferences_counts_both_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_folder(tmp_path / "model")
    plain, pairs = (
        plan_main(PlanArguments(model_id_or_path=str(folder), gpus=1, card="H100", max_length=64, **more))
        for more in ({}, {"rlhf_type": "dpo"})
    )
    assert pairs["tokens"] == 2 * plain["tokens"]
    assert pairs["working_bytes"]["activations"] == 2 * plain["working_bytes"]["activations"]


def test_how_to_get_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    with pytest.raises(UserError) as caught:
        plan_main(PlanArguments(model_type="qwen2_5-7b-instruct", card="H100"))
    assert "a plan fetches nothing" in caught.value.what
    assert "hf download Qwen/Qwen2.5-7B-Instruct config.json --local-dir DIR" in caught.value.fix
    with pytest.raises(UserError, match="no model is named"):
        plan_main(PlanArguments(card="H100"))
    place = tmp_path / "hf" / "models--Qwen--Qwen2.5-7B-Instruct" / "snapshots"
    place.mkdir(parents=True)
    config_folder(place / "main")
    found = plan_main(PlanArguments(model_type="qwen2_5-7b-instruct", card="H100", gpus=1, max_length=64))
    assert found["model_type"] == "qwen2_5-7b-instruct"


def test_a_layout_that_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model")
    with pytest.raises(UserError, match="--tp 3 does not divide"):
        plan_main(PlanArguments(model_id_or_path=str(folder), card="H100", tp=3, gpus=3))
    with pytest.raises(UserError, match="3 processes cannot hold tp 2"):
        plan_main(PlanArguments(model_id_or_path=str(folder), card="H100", tp=2, gpus=3))
