"""--save_safetensors: a Hugging Face model beside each checkpoint, equal to it, gone with it, proven at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megaswift.commands.export import export_main
from megaswift.commands.verify import verify_main
from megaswift.config.options import ExportArguments, VerifyArguments
from megaswift.train.hf_copies import HFCopies
from tests.ranks import RankPool
from tests.training import tiny_start, train, write_rows


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("save_safetensors")
    return tiny_start(root), write_rows(root / "rows.jsonl")


def test_each_checkpoint_has_its_model(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    release, rows = start
    run = train(
        pool,
        tmp_path,
        2,
        resume_from_checkpoint=str(release),
        dataset=[str(rows)],
        pp=2,
        batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=6,
        save_steps=2,
        save_total_limit=2,
        save_safetensors=True,
    )
    names = sorted(path.name for path in run.directory.iterdir() if path.name.startswith(("iter_", ".", "trash")))
    assert [name for name in names if name != ".lock"] == [
        "iter_0000004", "iter_0000004-hf", "iter_0000006", "iter_0000006-hf",
    ]  # fmt: skip
    for step, proven in ((4, False), (6, True)):
        copy = run.directory / f"iter_{step:07d}-hf"
        manifest = json.loads((copy / "manifest.json").read_text())
        assert manifest["iteration"] == step and bool(manifest["verified"]) == proven
        made = export_main(
            ExportArguments(ckpt_dir=str(run.directory), iteration=step, to_hf=True, verify=False, hf_output_dir=str(tmp_path / str(step)))
        )  # fmt: skip
        left, right = load_file(copy / "model.safetensors"), load_file(made / "model.safetensors")
        assert left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)
        verify_main(VerifyArguments(directory=str(copy), deep=True))


def test_a_copy_that_fails_is_named(tmp_path: Path) -> None:
    copies = HFCopies(tmp_path, active=True)
    copies.begin(3)  # there is no such checkpoint
    line = copies.wait()
    assert line is not None and "iter_0000003-hf could not be made, the checkpoint is safe: " in line
    assert copies.wait() is None and not list(tmp_path.iterdir())


def test_a_copy_that_is_stopped_leaves_no_process(tmp_path: Path) -> None:
    copies = HFCopies(tmp_path, active=True)
    copies.begin(3)
    process = copies._process
    assert process is not None and process.poll() is None
    copies.stop()
    assert process.returncode == -signal.SIGTERM and copies.wait() is None


def test_a_stopped_run_begins_no_copy_and_does_not_wait_for_one(
    start: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    """Whoever sends SIGTERM gives seconds: the checkpoint is saved, the copy of the one before is given up."""
    release, rows = start
    done = pool.run(1, stop_after_first_copy, str(release), str(rows), str(tmp_path))
    assert done == [["begin 1", "stop", "stop"]]
    run_dir = next(tmp_path.rglob("iter_0000002")).parent
    assert (run_dir / "iter_0000002" / "manifest.json").is_file()


def stop_after_first_copy(release: str, rows: str, output: str) -> list[str]:
    """A run on one rank that is told to stop in its second step; what it asked of the copies."""
    from unittest import mock

    from megaswift.commands import sft
    from megaswift.config.options import SftArguments
    from megaswift.errors import Stopped
    from megaswift.train import hf_copies
    from megaswift.train import saving as checkpoints
    from megaswift.train.callbacks import Callbacks, Verdict

    asked: list[str] = []

    class Noted(hf_copies.HFCopies):
        def begin(self, iteration: int) -> None:
            asked.append(f"begin {iteration}")

        def wait(self) -> str | None:
            assert asked[-1:] != ["begin 1"], "a stopped run waited for a copy"
            return None

        def stop(self) -> None:
            asked.append("stop")

    steps = [0]

    def agree(self: Callbacks) -> Verdict:
        steps[0] += 1
        return Verdict(stop=steps[0] > 2)  # before step 1, after step 1, after step 2

    args = SftArguments(
        resume_from_checkpoint=release, dataset=[rows], output_dir=output, max_length=128, batch_size=1,
        gradient_accumulation_steps=2, max_steps=6, save_steps=1, save_safetensors=True, dataset_test_ratio=0.0,
    )  # fmt: skip
    alone = {name: value for name, value in os.environ.items() if name not in hf_copies._DISTRIBUTED}
    with (
        mock.patch.dict(os.environ, alone, clear=True),
        mock.patch.object(checkpoints, "HFCopies", Noted),
        mock.patch.object(Callbacks, "agree", agree),
        contextlib.suppress(Stopped),
    ):
        sft.sft_main(args)
    return asked
