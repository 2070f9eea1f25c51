"""Pictures of a run from its files, whole or torn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaswift.errors import DataError
from megaswift.report.curves import draw, read_log, read_series, smoothed, write_images


def write_run(path: Path, rows: list[dict], tail: str = "") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "logging.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def rows_of(steps: int) -> list[dict]:
    return [
        {
            "loss": 3 / step,
            "grad_norm": 1.0,
            "learning_rate": 1e-5,
            "tokens_per_second": 900.0 + step,
            "global_step/max_steps": f"{step}/{steps}",
        }
        for step in range(1, steps + 1)
    ]


def test_one_picture_for_each_tag_that_is_there(tmp_path) -> None:
    run = write_run(tmp_path / "run", [*rows_of(12), {"eval_loss": 0.5, "step": 12}, {"train_runtime": 3.0}])
    files = write_images(run)
    assert [file.name for file in files] == [
        "train_loss.png",
        "eval_loss.png",
        "learning_rate.png",
        "grad_norm.png",
        "tokens_per_second.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.parent == run / "images" for file in files)
    assert sorted(file.name for file in (run / "images").iterdir()) == sorted(file.name for file in files)
    assert [file.name for file in write_images(write_run(tmp_path / "less", [{"loss": 1.0, "step": 1}]))] == ["train_loss.png"]


def test_a_run_that_crashed_in_the_middle_of_a_line(tmp_path) -> None:
    run = write_run(tmp_path, rows_of(3), '{"loss": 0.5, "global_st')
    (run / "plan.json").write_text('{"model_type": "x')
    assert read_series(run)["train_loss"].steps == (1, 2, 3)
    assert len(write_images(run)) == 4


def test_torn_and_foreign_lines_are_left_out(tmp_path) -> None:
    run = write_run(
        tmp_path,
        [{"loss": 1.0, "step": 1}],
        "[1, 2]\n\x00\x00\nnull\n" + '{"loss": NaN, "step": 2}\n{"loss": true, "step": 3}\n{"loss": 2.0, "step": 4}\n',
    )
    assert (read_series(run)["train_loss"].steps, read_series(run)["train_loss"].values) == ((1, 4), (1.0, 2.0))


def test_a_resumed_run_shows_the_later_value(tmp_path) -> None:
    run = write_run(
        tmp_path, [{"loss": value, "step": step} for step, value in ((1, 5.0), (2, 4.0), (3, 9.0), (2, 3.5), (3, 3.0))]
    )
    assert (read_series(run)["train_loss"].steps, read_series(run)["train_loss"].values) == ((1, 2, 3), (5.0, 3.5, 3.0))


def test_nothing_logged(tmp_path) -> None:
    assert read_log(tmp_path) == []
    assert write_images(tmp_path) == []
    assert not (tmp_path / "images").exists()
    with pytest.raises(DataError):
        write_images(tmp_path / "missing")


def test_tensorboard_files_stand_in_for_a_missing_log(tmp_path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "runs")) as writer:
        for step in (1, 2):
            writer.add_scalar("loss", 1.0 / step, step)
    assert read_series(tmp_path)["train_loss"].values == (1.0, 0.5)


def test_long_curves_are_smoothed_and_short_ones_are_not(tmp_path) -> None:
    long = read_series(write_run(tmp_path / "long", rows_of(40)))["train_loss"]
    short = read_series(write_run(tmp_path / "short", rows_of(5)))["train_loss"]
    assert [line.get_label() for line in draw(long).axes[0].get_lines()] == ["as logged", "smoothed"]
    assert len(draw(short).axes[0].get_lines()) == 1


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert smoothed((2.0,) * 20) == pytest.approx([2.0] * 20)
    assert smoothed((5.0, 1.0, 1.0))[0] == 5.0


def test_the_subtitle_tells_model_and_layout(tmp_path) -> None:
    run = write_run(tmp_path, rows_of(3))
    figure = draw(read_series(run)["train_loss"], "qwen2-7b-instruct   bf16   tp 2, pp 1, dp 2")
    assert "tp 2" in figure.axes[0].texts[-1].get_text() or any("tp 2" in text.get_text() for text in figure.axes[0].texts)
