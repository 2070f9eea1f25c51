"""The command as a shell sees it: exit codes, and a reader who leaves before the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaswift import cli
from megaswift.commands import verify

SWIFT = ("-m", "megaswift")


def run_into_closed_pipe(*words: str, both: bool = False) -> tuple[int, str]:
    """Exit code and standard error of Python whose standard output (`both`: standard error too) nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    source = str(Path(__file__).parents[1] / "src")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), source)))}
    done = subprocess.run(
        [sys.executable, *words],
        stdout=writing,
        stderr=writing if both else subprocess.PIPE,
        text=True,
        env=environment,
        timeout=60,
    )
    os.close(writing)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("words", [["--help"], ["sft", "--help"], ["--version"]])
def test_a_reader_who_leaves_is_no_error(words: list[str]) -> None:
    assert run_into_closed_pipe(*SWIFT, *words) == (cli.NO_READER, "")


def test_errors_that_nobody_reads() -> None:
    code, error = run_into_closed_pipe(*SWIFT, "sft", "--lerning_rate", "1")
    assert code == 2 and "unknown option" in error
    assert run_into_closed_pipe(*SWIFT, "sft", "--lerning_rate", "1", both=True)[0] == cli.NO_READER


TABLES = """
import sys
from megaswift import cli
from megaswift.commands import verify
from megaswift.terminal import say

verify.verify_main = lambda _: [say("a line") for _ in range(3)]
sys.exit(cli.main(["verify"]))
"""


def test_lines_of_rich_that_nobody_reads() -> None:
    """rich ends a program by itself, with another exit code."""
    assert run_into_closed_pipe("-c", TABLES) == (cli.NO_READER, "")


def test_another_broken_pipe_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> None:
        raise BrokenPipeError("a worker has gone")

    monkeypatch.setattr(verify, "verify_main", fail)
    assert cli.main(["verify"]) == 1
    assert "a worker has gone" in capsys.readouterr().err


def test_help_has_columns_and_begins_with_what_is_own() -> None:
    from megaswift.cli import VERBS, help_text, overview
    from megaswift.config.options import RlhfArguments

    lines = overview().splitlines()
    assert all(any(line.split() == [verb, *text.split()] for line in lines) for verb, (*_, text) in VERBS.items())
    shown = help_text("rlhf", RlhfArguments)
    assert shown.index("--rlhf_type") < shown.index("--seed") and shown.count("--rlhf_type ") == 1


def test_help_of_text_names_what_means_nothing_there() -> None:
    """Its own options first, each once, with its own default; what is refused stands at the end alone, with the reason."""
    from megaswift.cli import help_text
    from megaswift.config.options import PtArguments

    shown = help_text("pt", PtArguments)
    options, _, refused = shown.partition("Options of swift sft that mean nothing in swift pt")
    assert options.index("--train_tokens") < options.index("--seed")
    for name in ("--train_tokens", "--dataset_test_ratio", "--max_length"):
        assert options.count(f"  {name} ") == 1, name
    assert "default 0.001" in options
    for name, reason in PtArguments.MEANINGLESS.items():
        assert f"  --{name}: {reason}" in refused and f"  --{name} " not in options
