"""Which run and which checkpoint a resumed run takes, what is deleted, and who may write in a directory."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megaswift.commands.sft import new_run_dir
from megaswift.config.options import SftArguments
from megaswift.errors import DataError, ExitCode, UserError
from megaswift.run import resume
from megaswift.store import retention as keep
from megaswift.store.lock import LOCK, in_use, locked
from megaswift.store.manifest import MANIFEST, digest_files, read_manifest, write_manifest
from megaswift.store.paths import TRACKER, candidates, find_checkpoint, iteration_of
from tests.ranks import RankPool
from tests.training import tiny_start, train, write_rows

RESUME = {"seed": 42, "global_batch": 16, "data_fingerprint": "abc-42-10", "train_iters": 9}


def checkpoint(run: Path, step: int, eval_loss: float | None = None, optimizer: bool = True, track: bool = True) -> Path:
    """A directory that looks like a checkpoint; its files hold anything."""
    path = run / f"iter_{step:07d}"
    path.mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata", "common.pt"):
        (path / name).write_bytes(os.urandom(2000))
    write_manifest(path, {"files": digest_files(path), "optimizer": optimizer, "eval_loss": eval_loss, "resume": RESUME})
    if track:
        (run / TRACKER).write_text(str(step))
    return path


def flip(path: Path, place: int = 1000) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def name_of(run: Path, **more: Any) -> str:
    return resume.newest_whole(run, verify=True, **more)[0].name


@pytest.mark.parametrize("text", ["", "garbage \0", "7", "release", None])
def test_the_tracker_is_only_a_hint(text: str | None, tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    (tmp_path / TRACKER).unlink() if text is None else (tmp_path / TRACKER).write_text(text)
    path, notes = resume.newest_whole(tmp_path, verify=True)
    assert path.name == "iter_0000002"
    assert len(notes) == 1
    assert TRACKER in notes[0]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt"])
@pytest.mark.parametrize("harm", ["flip", "shorten", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_said(name: str, harm: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    file = checkpoint(tmp_path, 2) / name
    if harm == "flip":
        flip(file)
    elif harm == "shorten":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    path, notes = resume.newest_whole(tmp_path, verify=True)
    assert path.name == "iter_0000001"
    assert len(notes) == 1
    assert "iter_0000002" in notes[0]
    assert name in notes[0]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt"])
def test_a_file_that_was_cut_off_is_seen_by_its_size(name: str, tmp_path: Path) -> None:
    """Where nothing is read whole: to find a checkpoint, and to choose which ones may be deleted."""
    checkpoint(tmp_path, 1)
    file = checkpoint(tmp_path, 2) / name
    file.write_bytes(file.read_bytes()[:-1])
    assert find_checkpoint(tmp_path).name == "iter_0000001"
    checkpoint(tmp_path, 3)
    keep.delete_beyond(tmp_path, 2, 3)
    assert (tmp_path / "iter_0000001").is_dir()


def test_none_good_stops_with_3(tmp_path: Path) -> None:
    flip(checkpoint(tmp_path, 1) / "common.pt")
    (checkpoint(tmp_path, 2) / MANIFEST).unlink()
    with pytest.raises(DataError, match="no checkpoint of this run is good") as caught:
        resume.newest_whole(tmp_path, verify=True)
    assert caught.value.exit_code is ExitCode.DATA
    assert "iter_0000001" in caught.value.what
    assert "iter_0000002" in caught.value.what


def test_weights_alone_cannot_be_gone_on_with(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2, optimizer=False)
    assert name_of(tmp_path) == "iter_0000001"
    assert name_of(tmp_path, need_optimizer=False) == "iter_0000002"


def test_the_newest_run_of_any_layout(tmp_path: Path) -> None:
    runs = [
        "tiny-tp1-pp1/v0-20260101-000000",
        "tiny-tp2-pp1/v0-20260102-000000",
        "tiny-tp1-pp1/v1-20260103-000000",
        "other-tp1-pp1/v0-20270101-000000",
    ]
    for run in runs[:2] + runs[3:]:
        checkpoint(tmp_path / run, 3)
    (tmp_path / runs[2]).mkdir(parents=True)  # it never saved
    (tmp_path / "tiny-tp1-pp1" / "v9-notes").mkdir()
    assert resume.newest_run(tmp_path, "tiny", True) == tmp_path / runs[1]
    with locked(tmp_path / runs[2]):  # it has not saved yet
        assert resume.newest_run(tmp_path, "tiny", True) == tmp_path / runs[2]
    assert resume.newest_run(tmp_path, "absent", True) is None
    assert resume.newest_run(tmp_path / "nowhere", "tiny", True) is None
    assert resume.newest_run(tmp_path / runs[0], "tiny", False) == tmp_path / runs[0]


@pytest.mark.parametrize(
    ("losses", "limit", "kept"),
    [
        ([3, 1, 2, 4], 2, [2, 4]),
        ([3, 1, 2, 4], 1, [2, 4]),
        ([4, 3, 2, 1], 1, [4]),
        ([None, None, None, None], 2, [3, 4]),
        ([1, None, None, None], 3, [1, 3, 4]),
        ([float("inf"), 2, 2, 3], 2, [3, 4]),
    ],
)
def test_the_newest_and_the_best_stay(losses: list[float | None], limit: int, kept: list[int], tmp_path: Path) -> None:
    for step, loss in enumerate(losses, 1):
        checkpoint(tmp_path, step, loss)
    keep.delete_beyond(tmp_path, limit, len(losses))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [f"iter_{step:07d}" for step in kept]


def test_the_only_good_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    for step in (2, 3):
        (checkpoint(tmp_path, step) / "common.pt").unlink()
    keep.delete_beyond(tmp_path, 1, 3)
    assert name_of(tmp_path) == "iter_0000001"


def test_what_was_passed_over_does_not_outlive_what_was_just_saved(tmp_path: Path) -> None:
    """A flipped byte shows in the hash alone; the run went on from step 2 and has saved step 3."""
    for step, loss in ((2, 5.0), (4, 1.0)):
        checkpoint(tmp_path, step, loss)
    checkpoint(tmp_path, 3, 4.0)
    keep.delete_beyond(tmp_path, 1, 3)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["iter_0000003", "iter_0000004"]


def test_a_deletion_cut_short_leaves_nothing_that_is_chosen(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    with mock.patch("shutil.rmtree", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        keep.delete_beyond(tmp_path, 2, 3)
    assert name_of(tmp_path) == "iter_0000003"
    assert not (tmp_path / "iter_0000001").exists()
    assert len(keep.clean(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["iter_0000002", "iter_0000003"]


def test_cleaning_takes_only_what_a_save_leaves(tmp_path: Path) -> None:
    for name in ("iter_0000003.tmp-0a1b2c3d", "trash-iter_0000001-00", "iter_0000004", "images", "my.tmp-notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in candidates(tmp_path)] == ["iter_0000004"], "what is being written is no checkpoint yet"
    assert keep.clean(tmp_path) == ["iter_0000003.tmp-0a1b2c3d", "trash-iter_0000001-00"]


def _hold(directory: str, ready: Any) -> None:
    with locked(Path(directory)):
        ready.set()
        signal.pause()


def test_a_directory_has_one_live_run_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(60)
    assert in_use(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {holder.pid}") as caught, locked(tmp_path):
        pass
    assert caught.value.exit_code == 2
    holder.kill()
    holder.join()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not in_use(tmp_path)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize(
    ("options", "world", "note"),
    [
        ({}, 2, ""),
        ({}, 4, ""),
        ({"batch_size": 2}, 4, ""),
        ({"gradient_accumulation_steps": 8}, 2, ""),
        ({"gradient_accumulation_steps": 8}, 4, "on 4 processes that is --gradient_accumulation_steps 4, not --gradient_accum"),
        ({"gradient_accumulation_steps": 8}, 1, "on 1 processes that is --gradient_accumulation_steps 16, not"),
        ({"gradient_accumulation_steps": 8, "batch_size": 4}, 2, "with --batch_size 4 on 2 processes that is"),
        ({"gradient_accumulation_steps": 3}, 2, "steps 8, not --gradient_accumulation_steps 3"),
        ({"gradient_accumulation_steps": 8, "tp": 2, "pp": 2}, 8, "on 8 processes that is --gradient_accumulation_steps 2"),
        ({"gradient_accumulation_steps": 1, "tp": 4, "pp": 8}, 32, "16 micro batches a step on each of 1 data-parallel ranks"),
        ({"batch_size": 2, "cp": 4}, 16, "2 micro batches a step on each of 4 data-parallel ranks"),
    ],
)
def test_the_global_batch_is_kept(options: dict[str, Any], world: int, note: str) -> None:
    """On any number of processes that can share it; what the options say differently is told."""
    batch, said = resume.kept_batch(SftArguments(**options), {"resume": RESUME}, world, "run")
    assert batch == 16
    assert bool(said) == bool(note) and note in said
    assert not said or said.startswith("the run's global batch of 16 rows stays: ")


@pytest.mark.parametrize(
    ("options", "world", "fix"),
    [
        ({"batch_size": 3}, 2, "use --batch_size 1 or 2 or 4 or 8"),
        ({}, 5, "use 1 or 2 or 4 or 8 or 16 processes"),
        ({"batch_size": 8}, 4, "use --batch_size 1 or 2 or 4, or 1 or 2 processes"),
        ({"batch_size": 8, "tp": 2, "cp": 2}, 16, "use --batch_size 1 or 2 or 4, or 4 or 8 processes"),
        ({"batch_size": 3, "pp": 2}, 10, "use --batch_size 1 and 2 or 4 or 8 or 16 or 32 processes"),
        ({"gradient_accumulation_steps": 3}, 5, "use 1 or 2 or 4 or 8 or 16 processes"),
    ],
)
def test_a_global_batch_that_cannot_be_kept_is_refused(options: dict[str, Any], world: int, fix: str) -> None:
    """With the numbers that would do, and each of them does."""
    with pytest.raises(UserError) as caught:
        resume.kept_batch(SftArguments(**options), {"resume": RESUME}, world, "run")
    assert "a global batch of 16 rows, which" in caught.value.what
    assert caught.value.fix == fix
    model = SftArguments(**options).tp * SftArguments(**options).pp * SftArguments(**options).cp
    numbers = re.search(r"((?:\d+ or )*\d+) processes", fix)
    for number in numbers[1].split(" or ") if numbers else ():
        size = {"batch_size": 1} if "--batch_size 1 and" in fix else {}
        assert int(number) % model == 0
        assert resume.kept_batch(SftArguments(**options | size), {"resume": RESUME}, int(number), "run")[0] == 16


def test_what_differs_is_named() -> None:
    manifest = {"resume": RESUME}
    assert resume.check_unchanged(SftArguments(), manifest, "abc-42-10", "run") == []
    with pytest.raises(UserError, match="the seed was 42 and is 7"):
        resume.check_unchanged(SftArguments(seed=7), manifest, "abc-7-10", "run")
    with pytest.raises(UserError, match="training rows"):
        resume.check_unchanged(SftArguments(), manifest, "other-42-10", "run")
    with pytest.raises(UserError, match="--group_by_length was false and is true"):
        resume.check_unchanged(SftArguments(group_by_length=True), manifest, "abc-42-11", "run")
    assert resume.check_unchanged(SftArguments(allow_data_change=True), manifest, "other-42-10", "run")
    with pytest.raises(UserError, match="dtype fp32, not bf16"):
        resume.check_same_model(SftArguments(dtype="bf16"), {"model_type": "a"}, {"dtype": "fp32"}, "run")
    with pytest.raises(UserError, match="model_type a, not b"):
        resume.check_same_model(SftArguments(model_type="b"), {"model_type": "a"}, {"dtype": "fp32"}, "run")


def test_a_machine_that_comes_later_finds_the_directory_begun(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    args = SftArguments(output_dir=str(tmp_path), add_output_dir_suffix=False)
    assert new_run_dir(args, leads=False) == new_run_dir(args) == tmp_path  # a dry run leaves its plan
    (tmp_path / "config.json").write_text("{}")
    assert new_run_dir(args, leads=False) == tmp_path
    with pytest.raises(UserError, match="not empty"):
        new_run_dir(args)


def test_a_run_keeps_its_best_checkpoint(pool: RankPool, tmp_path: Path) -> None:
    """By the validation losses that the run itself wrote into its manifests; the rate is so high that the newest is not it."""
    start, rows = tiny_start(tmp_path, num_hidden_layers=2), write_rows(tmp_path / "rows.jsonl")
    run = train(
        pool, tmp_path / "out", 1, resume_from_checkpoint=str(start), dataset=[str(rows)], dataset_test_ratio=0.2, max_steps=4, eval_steps=1,
        save_steps=1, save_total_limit=1, gradient_accumulation_steps=4, learning_rate=0.3, lr_scheduler_type="constant",
    )  # fmt: skip
    best = run.eval_losses.index(min(run.eval_losses)) + 1
    assert len(run.eval_losses) == 4 and best < 4, run.eval_losses
    kept = {iteration_of(path): read_manifest(path)["eval_loss"] for path in candidates(run.directory)}
    assert set(kept) == {best, 4}
    assert kept == {step: pytest.approx(run.eval_losses[step - 1], abs=1e-7) for step in kept}
