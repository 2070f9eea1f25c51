"""Six steps are three and three: the same losses, rates and rows, at the same layout to the bit, at any other to 1e-5."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaswift.config.options import SftArguments
from megaswift.config.parse import parse
from megaswift.data.batches import Batches
from megaswift.data.store import TokenRows
from megaswift.errors import DataError, MegaswiftError, UserError
from megaswift.store.manifest import older_links, read_manifest, sha256_of
from megaswift.weights.torch_dist.reader import Reader
from tests.faults import table
from tests.ranks import RankPool
from tests.runs import changed
from tests.training import Trained, tiny_start, train

# world size, tp, pp, sequence parallel
LAYOUTS = [(2, 1, 2, False), (1, 1, 1, False), (2, 2, 1, True), (2, 1, 1, False), (4, 2, 2, True)]


def options(start: tuple[Path, Path], **more: Any) -> dict[str, Any]:
    return (
        dict(
            resume_from_checkpoint=str(start[0]),
            dataset=[str(start[1])],
            max_steps=6,
            save_steps=3,
            eval_steps=3,
            dataset_test_ratio=0.1,
            model_type="tiny-chat",
        )
        | more
    )


@pytest.fixture(scope="module")
def whole(start: tuple[Path, Path], pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Six steps without a break."""
    return train(pool, tmp_path_factory.mktemp("whole"), 2, **options(start, pp=2))


def half(whole: Trained, output: Path) -> Path:
    """A copy of the run as it was after its third step, under another --output_dir."""
    run = output / whole.directory.parent.name / whole.directory.name
    shutil.copytree(whole.directory, run)
    shutil.rmtree(run / "iter_0000006")
    (run / "latest_checkpointed_iteration.txt").write_text("3")
    return run


def figures(run: Trained) -> list[tuple[Any, ...]]:
    return [
        (row["global_step/max_steps"], row["loss"], row["grad_norm"], row["learning_rate"], row["consumed_samples"])
        for row in run.rows
        if "loss" in row
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_three_and_three_are_six(
    layout: tuple[int, int, int, bool], whole: Trained, start: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    run = half(whole, tmp_path)
    world, tp, pp, sequence_parallel = layout
    again = train(pool, tmp_path, world, **options(start, resume=True, tp=tp, pp=pp, sequence_parallel=sequence_parallel))
    assert again.directory == run, "the same command goes on in the same run, whatever its layout"
    exact = layout == LAYOUTS[0]
    if exact:
        assert figures(again) == figures(whole)
        assert again.eval_losses == whole.eval_losses
    else:
        assert again.losses == pytest.approx(whole.losses, abs=1e-5)
        assert again.norms == pytest.approx(whole.norms, rel=2e-5)
    worst = max(abs(a - b) for a, b in zip(again.losses, whole.losses, strict=True))
    table.add(
        f"6 steps = 3 + 3, tp {tp} x pp {pp} on {world} processes",
        "resumed from tp 1 x pp 2 on 2 processes",
        f"losses differ by at most {worst:.1e}",
    )


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (4, 1)])
def test_no_row_twice_and_none_lost(layout: tuple[int, int], start: tuple[Path, Path], whole: Trained) -> None:
    """Steps before the break on one data-parallel layout and after it on another see each row of the epoch once."""
    job = json.loads((whole.directory / "run.json").read_text())
    rows = TokenRows.open(job["data"]["train"])
    size = 8
    count = len(rows) // size

    def seen(steps: range, dp: int, micro: int) -> list[int]:
        found = []
        for rank in range(dp):
            batches = Batches(rows, micro_batch_size=micro, global_batch_size=size, dp_rank=rank, dp_size=dp, seed=42, pad_id=0)
            found += [row for step in steps for batch in batches.step(step) for row in batch.sample_ids]
        return found

    dp, micro = layout
    counts = Counter(seen(range(3), 1, 1) + seen(range(3, count), dp, micro))
    assert set(counts.values()) == {1}
    assert len(counts) == count * size


def test_moments_survive_another_layout(whole: Trained, start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """A state loaded at tp 2 x pp 2 and saved again at once has the same tensors, optimizer moments too, to the bit."""
    run = half(whole, tmp_path)
    pool.run(4, _load_and_save, str(run), str(tmp_path / "again"))
    before, after = Reader(run / "iter_0000003"), Reader(tmp_path / "again" / "iter_0000003")
    moments = [key for key in before.keys if "exp_avg" in key]
    assert len(moments) > 10
    assert set(before.keys) == set(after.keys)
    for key in before.keys:
        assert torch.equal(before.read(key), after.read(key)), key
    assert any(float(before.read(key).abs().max()) > 0 for key in moments)
    table.add(
        "reshard tp 1 x pp 2 to tp 2 x pp 2",
        f"{len(before.keys)} tensors, {len(moments)} of them optimizer moments",
        "equal to the bit",
    )


def _load_and_save(run: str, target: str) -> None:
    from megaswift.megatron import process_groups as ranks
    from megaswift.run.spec import Run
    from megaswift.train.checkpoint.save import save
    from megaswift.train.setup import restore_trainer

    spec = changed(Run.read(Path(run) / "run.json").going_on(3, Path(run, "iter_0000003")), tp=2, pp=2, world_size=4)
    with ranks.joined(spec.parallel, 42):
        trainer = restore_trainer(spec)[0]
        save(Path(target), 3, trainer, only_model=False, extra={}, manifest={})


def test_a_requeued_job_needs_one_command(
    start: tuple[Path, Path], pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing there: it starts, saying so. Finished: nothing to do. More steps asked for: it goes on, saying so."""
    command = options(start, resume=True, max_steps=2, eval_steps=2, save_steps=2)
    first = train(pool, tmp_path, 1, **command)
    assert "starting at step 0" in capsys.readouterr().out
    again = train(pool, tmp_path, 1, **command)
    assert again.directory == first.directory
    assert figures(again) == figures(first)
    assert "nothing left to do" in capsys.readouterr().out
    longer = train(pool, tmp_path, 1, **{**command, "max_steps": 3})
    assert longer.directory == first.directory
    assert len(longer.losses) == 3
    assert "now has 3 steps, it had 2" in capsys.readouterr().out


def test_a_run_goes_on_with_its_own_options(whole: Trained, pool: RankPool, tmp_path: Path) -> None:
    """The command that is named to somebody who gives the run and no data."""
    run = half(whole, tmp_path)
    with pytest.raises(UserError) as refused:
        train(pool, tmp_path, 2, resume_from_checkpoint=str(run), model_type="tiny-chat")
    words = str(refused.value.fix).split("swift sft ")[1].split()
    assert words == [f"{run}/sft_args.json", "--resume_from_checkpoint", str(run)]
    again = train(pool, tmp_path, 2, **dataclasses.asdict(parse(SftArguments, words)))
    assert again.directory == run
    assert figures(again) == figures(whole)


def test_the_base_is_known_when_older_checkpoints_are_gone(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """One command, requeued three times; --save_total_limit deletes what each time began from."""
    command = options(start, resume=True, eval_steps=100, save_steps=1, save_total_limit=1)
    for steps in (2, 4, 6):
        run = train(pool, tmp_path, 1, **{**command, "max_steps": steps})
    links = older_links(read_manifest(run.directory / "iter_0000006"))
    assert links[-1]["manifest_sha256"] == sha256_of(start[0] / "release" / "manifest.json")
    assert [path.name for path in run.directory.glob("iter_*")] == ["iter_0000006"]


def test_replacing_a_run_takes_nothing_else(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """Not what somebody put beside it, and not the weights that the new run is to begin from."""
    again = options(start, max_steps=1, add_output_dir_suffix=False, overwrite=True, save_only_model=True)
    run = train(pool, tmp_path / "out", 1, **again).directory
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="what swift sft did not make \\(notes.txt\\)"):
        train(pool, run, 1, **again)
    (run / "notes.txt").unlink()
    with pytest.raises(UserError, match="the weights that the run is to begin from"):
        train(pool, run, 1, **again | {"resume_from_checkpoint": str(run)})
    assert (run / "iter_0000001").is_dir()
    assert train(pool, run, 1, **again).directory == run


@pytest.fixture(scope="module")
def given(start: tuple[Path, Path], pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Four steps of six rows by two data-parallel ranks whose accumulation was given."""
    command = options(start, batch_size=1, gradient_accumulation_steps=3, max_steps=4, save_steps=2, eval_steps=100)
    return train(pool, tmp_path_factory.mktemp("given"), 2, **command)


@pytest.mark.parametrize(
    ("processes", "more", "said"),
    [
        (1, (), "on 1 processes that is --gradient_accumulation_steps 6, not --gradient_accumulation_steps 3"),
        (1, ("--batch_size", "2"), "with --batch_size 2 on 1 processes that is --gradient_accumulation_steps 3"),  # as given
        (4, ("--pp", "2"), "on 4 processes that is 3 micro batches a step on each of 2 data-parallel ranks"),
    ],
    ids=["fewer", "larger micro batches", "another dp"],
)
def test_a_given_accumulation_is_worked_out_anew(
    processes: int, more: tuple[str, ...], said: str, given: Trained, pool: RankPool, tmp_path: Path, capsys: Any
) -> None:
    """On another number of processes the global batch is what stays, with the options in a file that nobody typed."""
    run = tmp_path / given.directory.parent.name / given.directory.name
    shutil.copytree(given.directory, run)
    shutil.rmtree(run / "iter_0000004")
    words = [f"{run}/sft_args.json", "--resume_from_checkpoint", str(run), *more]
    again = train(pool, tmp_path, processes, **dataclasses.asdict(parse(SftArguments, words)))
    text = capsys.readouterr().out.replace("\n", " ")
    assert (said in text) == ("--batch_size" not in more), text
    assert again.directory == run
    assert [row["consumed_samples"] for row in again.rows if "loss" in row] == [6, 12, 18, 24]
    assert again.losses == pytest.approx(given.losses, abs=1e-5)
    kept = json.loads((run / "sft_args.json").read_text(encoding="utf-8"))
    assert kept["gradient_accumulation_steps"] == 3, "what was worked out for one machine is not kept as if it had been given"


def test_another_number_of_processes_after_a_resume(whole: Trained, pool: RankPool, tmp_path: Path) -> None:
    """One command for ever, with the default accumulation; each time from where the last one ended."""
    run = half(whole, tmp_path)
    for steps, processes in ((4, 1), (5, 2)):
        words = [f"{run}/sft_args.json", "--resume_from_checkpoint", str(run), "--max_steps", str(steps), "--pp", "1"]
        train(pool, tmp_path, processes, **dataclasses.asdict(parse(SftArguments, words)))


def test_a_template_that_writes_the_date_is_given_that_of_the_run(
    start: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    """Its rows would be others on every day, and the run could not go on."""
    model = shutil.copytree(start[0], tmp_path / "model")
    for file in (model / "tokenizer_config.json", model / "chat_template.jinja"):
        if file.exists():
            text = file.read_text(encoding="utf-8")
            file.write_text(
                text.replace("{% for message in messages %}", "{{ strftime_now('%d %b %Y') }}{% for message in messages %}")
            )
    command = options((model, start[1]), resume=True, save_steps=2, eval_steps=100)
    first = train(pool, tmp_path, 1, **command | {"max_steps": 2, "template_date": "2020-01-31"})
    again = train(pool, tmp_path, 1, **command | {"max_steps": 3})
    assert (again.directory, len(again.losses)) == (first.directory, 3)
    with pytest.raises(UserError, match="the training rows"):
        train(pool, tmp_path, 1, **command | {"max_steps": 4, "template_date": "2020-02-01"})


def test_a_damaged_checkpoint_is_gone_around(
    whole: Trained, start: tuple[Path, Path], pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / whole.directory.parent.name / whole.directory.name
    shutil.copytree(whole.directory, run)
    flip(run / "iter_0000006" / "__1_0.distcp")
    again = train(pool, tmp_path, 2, **options(start, resume=True, pp=2))
    assert figures(again) == figures(whole)
    assert "__1_0.distcp is not the file that was written" in capsys.readouterr().out.replace("\n", " ")
    for name in ("iter_0000003", "iter_0000006"):
        flip(run / name / "common.pt", 100)
    with pytest.raises(DataError, match="no checkpoint of this run is good"):
        train(pool, tmp_path, 2, **options(start, resume=True, pp=2))


def flip(path: Path, place: int = 5000) -> None:
    data = np.fromfile(path, np.uint8)
    data[place] ^= 1
    data.tofile(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 7}, "the seed was 42 and is 7"),
        ({"max_length": 24}, "the training rows"),
        ({"group_by_length": True}, "--group_by_length"),
        ({"batch_size": 3}, "global batch of 16 rows, which 1 data-parallel ranks x --batch_size 3 do not divide"),
        ({"dtype": "bf16"}, "dtype fp32, not bf16"),
        ({"model_type": "tiny-chat", "dataset": "shorter"}, "the training rows"),
    ],
    ids=str,
)
def test_another_run_is_refused_with_what_differs(
    changes: dict[str, Any], words: str, whole: Trained, start: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    run = half(whole, tmp_path)
    if changes.get("dataset") == "shorter":
        lines = start[1].read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "shorter.jsonl").write_text("".join(lines[:-2]), encoding="utf-8")
        changes = {**changes, "dataset": [str(tmp_path / "shorter.jsonl")]}
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        train(pool, tmp_path, 2, **options(start, resume=True, pp=2) | changes)
    assert words in caught.value.what
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def change_config(run: Path, start: Path) -> dict[str, Any]:
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.25}))
    return {}


def other_weights(run: Path, start: Path) -> dict[str, Any]:
    return {"resume_from_checkpoint": str(tiny_start(run.parent / "other", seed=1))}


def other_folder(run: Path, start: Path) -> dict[str, Any]:
    """A Hugging Face folder of another shape."""
    tiny_start(run.parent / "other", num_hidden_layers=2)
    return {"resume_from_checkpoint": None, "model_id_or_path": str(run.parent / "other" / "hf")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_config, "rms_norm_eps was .*, is 0.25"),
        (other_weights, "this run cannot go on with other weights: it began from .*release"),
        (other_folder, "this run cannot go on with other weights: num_hidden_layers was 4, is 2"),
    ],
)
def test_another_model_is_refused_with_what_differs(
    change: Any, words: str, whole: Trained, start: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    run = half(whole, tmp_path)
    changes = change(run, start[0])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(MegaswiftError, match=words) as caught:
        train(pool, tmp_path, 2, **options(start, resume=True, pp=2) | changes)
    assert caught.value.exit_code in (2, 3)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_weights_alone_begin_a_new_run_and_cannot_be_gone_on_with(
    start: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    command = options(start, max_steps=2, save_steps=2, eval_steps=2, save_only_model=True)
    first = train(pool, tmp_path, 1, **command)
    reader = Reader(first.directory / "iter_0000002")
    assert not [key for key in reader.keys if "exp_avg" in key]
    with pytest.raises(DataError, match="it has weights only"):
        train(pool, tmp_path, 1, **command, resume=True)
    second = train(pool, tmp_path / "new", 1, **command | {"resume_from_checkpoint": str(first.directory)})
    assert second.directory != first.directory
    assert len(second.losses) == 2
    manifest = json.loads((second.directory / "iter_0000002" / "manifest.json").read_text())
    assert [link["iteration"] for link in manifest["made_from"]] == [2, 0], "from the run's weights, and from their base"


def test_fewer_rows_than_a_global_batch(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """Told before any rank starts and before a directory is made."""
    rows = tmp_path / "few.jsonl"
    rows.write_text("".join(start[1].read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    with pytest.raises(DataError, match="3 training rows are fewer than one global batch of 16"):
        train(pool, tmp_path / "out", 2, **options(start, pp=2, dataset=[str(rows)], dataset_test_ratio=0.0))
    assert not (tmp_path / "out").exists()
