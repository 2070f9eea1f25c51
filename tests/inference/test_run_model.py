"""Talking to a Megatron directory: the newest complete checkpoint, through an export in the cache that is made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.tiny import save_tiny, write_tokenizer

from megaswift.arguments import ExportArguments, InferArguments
from megaswift.errors import DataError, UserError
from megaswift.export import export_main
from megaswift.infer import infer_main, prepare
from megaswift.run_model import KEPT_EXPORTS, exported


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory made by --to_megatron; do not write into it."""
    root = tmp_path_factory.mktemp("megatron")
    save_tiny(root / "model", "llama", vocab_size=512)
    write_tokenizer(root / "model")
    arguments = ExportArguments(
        model_id_or_path=str(root / "model"),
        model_type="my-tiny",
        to_megatron=True,
        megatron_output_dir=str(root / "my-tiny-tp1-pp1"),
    )
    return export_main(arguments)


@pytest.fixture
def run(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as a run that has written one checkpoint."""
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))
    path = shutil.copytree(converted, tmp_path / "v0-run")
    (path / "release").rename(path / "iter_0000002")
    (path / "latest_checkpointed_iteration.txt").write_text("2")
    return path


def ask(run: Path) -> str:
    question = run.parent / "q.jsonl"
    question.write_text('{"query": "who are you"}\n')
    [row] = infer_main(["--ckpt_dir", str(run), "--val_dataset", str(question), "--temperature", "0", "--max_new_tokens", "6"])
    return row["response"]


def test_a_run_answers_as_its_export_does(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    answer = ask(run)
    said = capsys.readouterr()
    assert f"{run.resolve()}/iter_0000002" in said.err
    assert said.out.startswith("[QUERY]who are you"), "the export is told on stderr"
    [result] = (run / "infer_result").glob("*.jsonl")
    assert json.loads(result.read_text(encoding="utf-8"))["response"] == answer
    assert not list(run.glob("*-hf"))
    folder = export_main(ExportArguments(ckpt_dir=str(run), to_hf=True, hf_output_dir=str(tmp_path / "hf")))
    assert ask(folder) == answer
    shutil.copy(run / "latest_checkpointed_iteration.txt", folder)
    assert not prepare(InferArguments(ckpt_dir=str(folder))).chosen.megatron, "a folder with safetensors is what it is"


def test_the_export_is_made_once_for_each_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, name = exported(run, "my-tiny")
    assert name == "iter_0000002"
    with monkeypatch.context() as patch:
        patch.setattr("megaswift.export.export_main", lambda *_: pytest.fail("it was exported again"))
        assert exported(run, "my-tiny")[0] == first
    (first / "config.json").unlink()
    assert (exported(run, "my-tiny")[0] / "config.json").is_file(), "a damaged export is made again"
    newer = shutil.copytree(run / "iter_0000002", run / "iter_0000004")
    (newer / "manifest.json").unlink()  # still being written
    assert exported(run, "my-tiny")[1] == "iter_0000002"
    for iteration in (4, 6, 8):
        path = run / f"iter_{iteration:07d}"
        if not path.exists():
            shutil.copytree(run / "iter_0000002", path)
        manifest = json.loads((run / "iter_0000002" / "manifest.json").read_text(encoding="utf-8"))
        (path / "manifest.json").write_text(json.dumps(manifest | {"iteration": iteration}), encoding="utf-8")
        assert exported(run, "my-tiny")[1] == path.name
    assert len(list((first.parent.parent).iterdir())) == KEPT_EXPORTS


def test_a_directory_without_a_complete_checkpoint_is_told(run: Path) -> None:
    (run / "iter_0000002" / "manifest.json").unlink()
    with pytest.raises(DataError, match="no checkpoint in this directory is complete"):
        ask(run)
    shutil.rmtree(run / "iter_0000002")
    with pytest.raises(UserError, match="holds no Megatron checkpoint"):
        ask(run)
    with pytest.raises(UserError) as caught:
        prepare(InferArguments(ckpt_dir=str(run.parent)))
    assert f"--ckpt_dir {run}" in caught.value.fix
