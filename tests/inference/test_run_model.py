"""Talking to a Megatron directory: the newest complete checkpoint, through an export in the cache that is made once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny, write_tokenizer

from megaswift.commands.export import export_main
from megaswift.commands.infer import infer_main, prepare
from megaswift.config.options import ExportArguments, InferArguments
from megaswift.errors import DataError, UserError
from megaswift.inference import model_ref as run_model
from megaswift.inference.model_ref import KEPT, exported


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
        patch.setattr("megaswift.commands.export.export_main", lambda *_: pytest.fail("it was exported again"))
        assert exported(run, "my-tiny")[0] == first
    (first / "config.json").unlink()
    assert (exported(run, "my-tiny")[0] / "config.json").is_file(), "a damaged export is made again"
    newer = shutil.copytree(run / "iter_0000002", run / "iter_0000004")
    (newer / "manifest.json").unlink()  # still being written
    assert exported(run, "my-tiny")[1] == "iter_0000002"
    for iteration in (4, 6, 8):
        save(run, iteration)
        assert exported(run, "my-tiny")[1] == f"iter_{iteration:07d}"


def save(run: Path, iteration: int) -> None:
    """One more checkpoint of the run."""
    path = run / f"iter_{iteration:07d}"
    if not path.exists():
        shutil.copytree(run / "iter_0000002", path)
    manifest = json.loads((run / "iter_0000002" / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(manifest | {"iteration": iteration}), encoding="utf-8")


def exports(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache" / "exports").iterdir() if path.is_dir())


def test_the_newest_exports_of_a_run_stay(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for iteration in (2, 4, 6, 8):
        monkeypatch.setattr(run_model, "_handed_out", set())  # each by a process of its own
        save(run, iteration)
        made.append(exported(run, "my-tiny")[0].parent)
        for age, path in enumerate(reversed(made)):  # the clock of the disk may be too coarse for this test
            if path.exists():
                os.utime(path, (1e9 - age, 1e9 - age))
    assert exports(tmp_path) == sorted(made[-KEPT:])
    shutil.rmtree(run / "iter_0000008")
    assert exported(run, "my-tiny")[0].parent == made[-2]
    monkeypatch.setattr(run_model, "_handed_out", set())
    save(run, 10)
    newest = exported(run, "my-tiny")[0].parent
    assert exports(tmp_path) == sorted([made[-2], newest]), "what was used last stays longest"


def test_one_process_keeps_what_it_uses_and_runs_of_one_name_do_not_meet(run: Path, tmp_path: Path) -> None:
    """Three directories of one name in a comparison, and three checkpoints of one run."""
    runs = [Path(shutil.copytree(run, tmp_path / name / run.name)) for name in "abc"]
    for iteration, one in enumerate(runs, 3):
        save(one, iteration)  # else the three are one and the same checkpoint
    found = [exported(one, "my-tiny")[0] for one in runs]
    assert len(set(found)) == 3 and all((folder / "config.json").is_file() for folder in found)
    for iteration in (6, 8, 10):
        save(runs[0], iteration)
        found.append(exported(runs[0], "my-tiny")[0])
    assert all((folder / "config.json").is_file() for folder in found)


def test_a_checkpoint_that_goes_while_another_process_is_waited_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_model.alone

    def alone(*words: Any) -> Any:
        if (run / "iter_0000002").exists():
            save(run, 4)
            shutil.rmtree(run / "iter_0000002")
        return plain(*words)

    monkeypatch.setattr(run_model, "alone", alone)
    assert exported(run, "my-tiny")[1] == "iter_0000004"


RACE = """
import os, sys
import torch
torch.set_num_threads(1)
import megaswift.export.to_hf, megaswift.weights.convert, megaswift.proof.prove, megaswift.weights.convert.lora
from megaswift.commands.infer import infer_main
print("ready", flush=True)
os.read(0, 1)
infer_main(sys.argv[1:])
"""


def race(words: list[str], count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """The same `swift infer` in several processes, which begin at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, *words], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(count)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=180) for process in processes]
    return [
        subprocess.CompletedProcess(words, process.returncode, *texts) for process, texts in zip(processes, said, strict=True)
    ]


def test_several_first_questions_at_once_share_one_export(run: Path, tmp_path: Path) -> None:
    question = tmp_path / "q.jsonl"
    question.write_text('{"query": "who are you"}\n')
    results = race(
        ["--ckpt_dir", str(run), "--val_dataset", str(question), "--temperature", "0", "--max_new_tokens", "6", "--save_result", "false"],
        3,
    )  # fmt: skip
    assert [result.returncode for result in results] == [0, 0, 0], [result.stderr[-500:] for result in results]
    assert len({result.stdout for result in results}) == 1 and "[QUERY]who are you" in results[0].stdout
    said = "".join(result.stderr for result in results)
    assert said.count("-> Hugging Face model") == 1, "it is converted once"
    assert f"waiting for another process, which makes a model of {run.resolve()}" in said
    [place] = exports(tmp_path)
    assert [path.name for path in place.iterdir()] == ["my-tiny"]


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
