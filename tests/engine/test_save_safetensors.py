"""--save_safetensors: a Hugging Face model beside each checkpoint, equal to it, gone with it, proven at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megaswift.arguments import ExportArguments, VerifyArguments
from megaswift.export import export_main
from megaswift.verify import verify_main
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


def test_a_copy_that_fails_is_named_and_training_goes_on(
    start: tuple[Path, Path], pool: RankPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from megaswift.engine.hf_copies import HFCopies

    copies = HFCopies(tmp_path, active=True)
    copies.begin(3)  # there is no such checkpoint
    line = copies.wait()
    assert line is not None and "iter_0000003-hf could not be made, the checkpoint is safe: " in line
    assert copies.wait() is None and not list(tmp_path.iterdir())
