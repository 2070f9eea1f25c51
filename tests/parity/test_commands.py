"""docs/parity.md keeps its word: its commands, as they stand, hold on a small model of SmolLM2's kind, and its norm is the log's."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megaswift.commands.parity import parity_main
from tests.parity.planted import run_rank, run_sft_rank
from tests.ranks import RankPool
from tests.test_readme import blocks, commands
from tests.training import tiny_start, write_rows

TEXT = (Path(__file__).parent.parent.parent / "docs" / "parity.md").read_text(encoding="utf-8")
MODEL = "smollm2-135m-instruct"
# Like SmolLM2: nine heads, tied, and the pad token is the one that ends every turn.
SHAPE = dict(
    num_attention_heads=9, num_key_value_heads=3, head_dim=8, hidden_size=72, intermediate_size=96, num_hidden_layers=2,
    tie_word_embeddings=True, eos_token_id=1, pad_token_id=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the commands name."""
    root = tmp_path_factory.mktemp("commands")
    tiny_start(root, **SHAPE).rename(root / f"{MODEL}-tp1-pp2")
    (root / "hf").rename(root / MODEL)
    write_rows(root / "rows.jsonl")
    return root


@pytest.fixture(scope="module")
def done(work: Path, pool: RankPool) -> list[tuple[list[str], Path, str]]:
    """Words, directory and output of each command of the document."""

    def start_ranks(place: Any, job: Path, *_: Any, module: str = "") -> None:
        pool.run(place.world_size, run_rank if module else run_sft_rank, str(job), "")

    found = []
    for environment, words in commands(blocks("shell", TEXT)[0]):
        said = io.StringIO()
        with (
            contextlib.chdir(work),
            contextlib.redirect_stdout(said),
            mock.patch("megaswift.launch.agent.start_ranks", start_ranks),
            mock.patch.dict(os.environ, {"NPROC_PER_NODE": "1", "COLUMNS": "300", **environment}),
        ):
            found.append((words[1:], parity_main([*words[1:], "--output_dir", f"out{len(found)}"]), said.getvalue()))
    return found


def test_they_hold(done: list[tuple[list[str], Path, str]]) -> None:
    """With the pad token in every row; what the reference has other than transformers is said in one line."""
    assert len(done) == 3
    for words, directory, said in done:
        assert json.loads((directory / "parity.json").read_text(encoding="utf-8"))["problem"] is None, words
        assert "parity holds" in said, words
        lines = [line for line in said.splitlines() if "padding_idx" in line]
        assert len(lines) == ("--layouts" not in words), lines
        assert all("the embedding of token 1, the pad token, gets its gradient too" in line for line in lines)


def test_the_norm_is_the_one_that_transformers_gives(done: list[tuple[list[str], Path, str]], work: Path) -> None:
    """The document's own lines of Python: what they print is parity's norm, the one in its table, and that of the log."""
    (_, directory, said), (_, learned, _) = done[0], done[2]
    samples = [json.loads(line) for line in (directory / "step1.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 16 and any(1 in sample["input_ids"] for sample in samples)
    (work / "step1.jsonl").write_bytes((directory / "step1.jsonl").read_bytes())
    printed = io.StringIO()
    with contextlib.chdir(work), contextlib.redirect_stdout(printed):
        exec(compile(blocks("python", TEXT)[0], "docs/parity.md", "exec"), {})
    norm = float(printed.getvalue())
    step = json.loads((directory / "parity.json").read_text(encoding="utf-8"))["reference"][0]
    assert step["grad_norm"] == pytest.approx([norm, norm], rel=2e-6)
    assert said.count(f"  {norm:.6f}"[:7]) >= 2, "both norms are shown, not only how far they are apart"
    log = (learned / "engine" / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(log[0])["grad_norm"] == pytest.approx(norm, rel=2e-6)
