"""The seed's commands as processes: on a tiny model every time, on the packaged SmolLM2 once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.test_readme import blocks, commands
from tests.training import write_rows


def swift(
    directory: Path, *words: str, check: int = 0, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a swift command as a user would and require its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "megaswift", *words], cwd=directory, input=stdin, text=True, capture_output=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == check, (
        f"swift {' '.join(words)}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("work")
    tiny.save_tiny(root / "model", "qwen2", vocab_size=301, eos_token_id=1, pad_token_id=2)
    tiny.write_tokenizer(root / "model")
    write_rows(root / "rows.jsonl")
    return root


def test_the_seeds_commands(work: Path) -> None:
    """export, sft on 2 x 2 processes, export back, infer in both forms: default names, look-ups and files."""
    swift(
        work,
        "export",
        "--model_type",
        "tiny-chat",
        "--model_id_or_path",
        "model",
        "--to_megatron",
        "true",
        "--tp",
        "2",
        "--pp",
        "2",
        "--dtype",
        "fp32",
    )
    start = work / "tiny-chat-tp2-pp2"
    assert json.loads((start / "export_args.json").read_text())["model_type"] == "tiny-chat"
    assert (start / "latest_checkpointed_iteration.txt").read_text() == "release"

    # Unfine-tuned model back to Hugging Face: every file that carries the model is equal.
    swift(work, "export", "--ckpt_dir", "tiny-chat-tp2-pp2", "--to_hf", "true")
    plain = start / "tiny-chat-hf"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (plain / name).read_bytes() == (work / "model" / name).read_bytes()
    original, back = load_file(work / "model" / "model.safetensors"), load_file(plain / "model.safetensors")
    assert set(original) == set(back)
    assert all(torch.equal(original[name], back[name]) for name in original)
    assert not (plain / "sft_args.json").exists()

    trained = swift(
        work, "sft", "--resume_from_checkpoint", "tiny-chat-tp2-pp2", "--dataset", "rows.jsonl#32", "self-cognition#20", "--learning_rate", "1e-3",
        "--output_dir", "output", "--model_name", "小黄", "Xiao Huang", "--model_author", "魔搭", "ModelScope", "--train_backend", "megatron",
        NPROC_PER_NODE="4",
    )  # fmt: skip
    assert "lr_warmup_iters" in trained.stdout
    assert trained.stdout.count("What Megatron-Core is told") == 1  # one process speaks
    run = next((work / "output" / "tiny-chat-tp2-pp2").iterdir())
    assert json.loads((run / "plan.json").read_text(encoding="utf-8"))["table"][0] == ["optimizer", "optim", "adam"]
    assert (run / "images" / "train_loss.png").stat().st_size > 1000

    swift(work, "export", "--ckpt_dir", str(run.relative_to(work)), "--to_hf", "true")
    tuned = run / "tiny-chat-hf"
    assert json.loads((tuned / "sft_args.json").read_text(encoding="utf-8"))["sft_type"] == "full"
    walked = swift(work, "verify", str(tuned.relative_to(work)), "--deep", "true", COLUMNS="400").stdout
    assert "tiny-chat-tp2-pp2" in walked  # from the model over the run to the base
    assert "release" in walked
    talk = "who are you\nexit\n"
    swift(work, "infer", "--ckpt_dir", str(tuned.relative_to(work)), "--max_new_tokens", "4", "--temperature", "0", stdin=talk)
    said = swift(
        work,
        "infer",
        "--model_type",
        "tiny-chat",
        "--model_id_or_path",
        str(plain.relative_to(work)),
        "--max_new_tokens",
        "4",
        stdin=talk,
    )
    assert "<<< " in said.stdout
    assert "-" * 50 in said.stdout
    assert list((tuned / "infer_result").glob("*.jsonl"))


def test_no_conversion_is_repeated_silently(work: Path) -> None:
    """An output directory that exists is an error, unless it is to be replaced; what we did not make is never replaced."""
    words = (
        "export",
        "--model_id_or_path",
        "model",
        "--model_type",
        "again",
        "--to_megatron",
        "true",
        "--megatron_output_dir",
        "again",
    )
    swift(work, *words)
    assert "exists already" in swift(work, *words, check=2).stderr
    swift(work, *words, "--overwrite", "true")
    (work / "mine").mkdir()
    (work / "mine" / "thesis.txt").write_text("do not delete")
    assert "not made by swift export" in swift(work, *words[:-1], "mine", "--overwrite", "true", check=2).stderr
    assert (work / "mine" / "thesis.txt").exists()


BAD = [
    (("export", "--to_megatron", "true", "--model_type", "qwen2-7b-instuct"), 2, "qwen2-7b-instruct"),
    (("export", "--to_megatron", "true", "--model_id_or_path", "absent"), 2, "absent"),
    (("export", "--to_megatron", "true", "--model_id_or_path", "model", "--tp", "3"), 2, "nearest legal values: 1, 2, 4"),
    (("export", "--to_hf", "true", "--ckpt_dir", "absent"), 2, "absent"),
    (("export", "--to_hf", "true", "--to_megatron", "true"), 2, "exactly one"),
    (("sft", "--resume_from_checkpoint", "absent", "--dataset", "rows.jsonl"), 2, "swift export"),
    (("sft", "--resume_from_checkpoint", "again", "--dataset", "empty.jsonl"), 3, "empty.jsonl"),
    (
        ("sft", "--resume_from_checkpoint", "again", "--dataset", "unanswered.jsonl", "--strict", "true"),
        3,
        "unanswered.jsonl:2",
    ),
    (("sft", "--resume_from_checkpoint", "again", "--dataset", "rows.jsonl", "--pp", "3"), 2, "NPROC_PER_NODE=3"),
    (("sft", "--resume_from_checkpoint", "again"), 2, "--dataset"),
    (("sft", "--datset", "x"), 2, "did you mean: dataset"),
    (("sfr",), 2, "did you mean: sft"),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD, ids=[" ".join(words)[:60] for words, _, _ in BAD])
def test_bad_input_gives_one_error_and_leaves_nothing(work: Path, words: tuple[str, ...], code: int, message: str) -> None:
    if not (work / "again").exists():
        swift(
            work,
            "export",
            "--model_id_or_path",
            "model",
            "--model_type",
            "again",
            "--to_megatron",
            "true",
            "--megatron_output_dir",
            "again",
        )
    (work / "empty.jsonl").write_text("")
    rows = [{"query": "a", "response": "b"}, {"messages": [{"role": "user", "content": "only a question"}]}]
    (work / "unanswered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = set(work.rglob("*"))
    done = swift(work, *words, check=code, HF_HUB_OFFLINE="1", NPROC_PER_NODE="2")
    assert message in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1
    assert set(work.rglob("*")) == before


def test_a_killed_rank_ends_the_run_with_one_message(work: Path, tmp_path: Path) -> None:
    """Memory killers send SIGKILL: the others stop at once and the launcher says which rank it was."""
    import signal
    import threading
    import time

    if not (work / "again").exists():
        swift(
            work,
            "export",
            "--model_id_or_path",
            "model",
            "--model_type",
            "again",
            "--to_megatron",
            "true",
            "--megatron_output_dir",
            "again",
        )
    words = [
        "sft",
        "--resume_from_checkpoint",
        str(work / "again"),
        "--dataset",
        str(work / "rows.jsonl"),
        "--max_steps",
        "5000",
        "--pp",
        "2",
        "--output_dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "megaswift", *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def kill_rank_1() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.3)
            with contextlib.suppress(OSError):  # a directory that was renamed, a rank that has ended: look again
                logs = list(tmp_path.rglob("logging.jsonl"))
                if logs and logs[0].stat().st_size:
                    listed = ["pgrep", "-P", str(process.pid), "-f", "megaswift.train.loop"]
                    ranks = subprocess.run(listed, capture_output=True, text=True, check=False).stdout.split()
                    if len(ranks) == 2:
                        os.kill(int(ranks[-1]), signal.SIGKILL)
                        return

    killer = threading.Thread(target=kill_rank_1)
    killer.start()
    _, errors = process.communicate(timeout=180)
    killer.join()
    assert process.returncode == 5, errors[-2000:]
    assert "was ended by SIGKILL" in errors
    assert errors.count("error:") == 1, errors


@pytest.mark.smollm2
def test_smollm2_learns_its_name(tmp_path: Path) -> None:
    """The README's laptop commands as they stand: the real model answers with its new name and still knows its capitals."""
    pytest.importorskip("gguf")
    story = commands(blocks("shell")[2])
    assert [words[0] for _, words in story] == ["export", "sft", "export", "infer"]
    talk = "Who are you?\nclear\nWho developed you?\nclear\nWhat is the capital of France?\nexit\n"
    for environment, words in story:
        runs = list((tmp_path / "output" / "smollm2-135m-instruct-tp1-pp2").glob("v0-*"))
        words = [re.sub(r"v0-\d+-\d+", runs[0].name, word) if runs else word for word in words]
        greedy = ["--temperature", "0"] if words[0] == "infer" else []
        said = swift(tmp_path, *words, *greedy, stdin=talk, **environment).stdout
    assert "Xiao Huang" in said
    assert "ModelScope" in said
    assert "Paris" in said
