"""Whole training runs for tests: a tiny chat model as Megatron weights, and `train`, which runs the real loop on pooled ranks."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megaswift.commands import sft
from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments, SftArguments
from megaswift.store.cache import cache_root
from tests import tiny
from tests.ranks import RankPool

ROWS = 48
long = pytest.mark.skipif("MEGASWIFT_LONG" not in os.environ, reason="a part of make test-long")


def write_rows(path: Path, count: int = ROWS) -> Path:
    """Rows of different lengths, some with two turns."""
    words = "who are you what is this a good day to learn new things about large models and small ones".split()
    with path.open("w", encoding="utf-8") as file:
        for k in range(count):
            say = lambda n, k=k: " ".join(words[(k * 7 + j) % len(words)] for j in range(n))  # noqa: E731
            row: dict[str, Any] = {"query": say(1 + k % 4), "response": say(1 + k % 6)}
            if k % 5 == 0:
                row["history"] = [[say(2), say(1 + k % 3)]]
            file.write(json.dumps(row) + "\n")
    return path


def tiny_start(root: Path, name: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A tiny chat model with a tokenizer, converted by `swift export`; the Megatron directory."""
    config = {"vocab_size": 300, "eos_token_id": 1, "pad_token_id": 2, **changes}
    tiny.save_tiny(root / "hf", name, seed, **config)
    tiny.write_tokenizer(root / "hf")
    return export_main(
        ExportArguments(
            model_type="tiny-chat",
            model_id_or_path=str(root / "hf"),
            to_megatron=True,
            verify=False,
            megatron_output_dir=str(root / "start"),
            language_model_only=(root / "hf" / "config.json").read_text().count('"vision_config"') > 0,
        )
    )


@dataclass
class Trained:
    """What a run left behind."""

    directory: Path
    rows: list[dict[str, Any]]  # of logging.jsonl

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows if "loss" in row]

    @property
    def eval_losses(self) -> list[float]:
        return [row["eval_loss"] for row in self.rows if "eval_loss" in row]

    @property
    def norms(self) -> list[float]:
        return [row["grad_norm"] for row in self.rows if "loss" in row]


def train(
    pool: RankPool, output: Path, world_size: int, arguments: type[SftArguments] = SftArguments, **options: Any
) -> Trained:
    """Run `swift sft`, or what else `arguments` are those of, with its loop on pooled ranks in place of fresh processes."""
    options = {"logging_steps": 1, "learning_rate": 1e-3, "output_dir": str(output), "max_length": 128, **options}

    def start_ranks(place: Any, job: Path, *_: Any) -> None:
        pool.run(place.world_size, run_job, str(job))

    with (
        mock.patch("megaswift.launch.agent.start_ranks", start_ranks),
        mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world_size)}),
    ):
        if world_size == 1:
            with mock.patch(
                "megaswift.train.loop.train", lambda run: pool.run(1, run_job, str(Path(run.saving.run_dir) / "run.json"))
            ):
                directory = sft.sft_main(arguments(**options))
        else:
            directory = sft.sft_main(arguments(**options))
    lines = (directory / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained(directory, [json.loads(line) for line in lines])


def written_job(world_size: int, **options: Any) -> Path:
    """Do what `swift sft` does before it starts ranks; the file that it hands to them."""
    with (
        mock.patch("megaswift.commands.sft._start", lambda run_dir, job, *_: job.write(run_dir / "run.json")),
        mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world_size)}),
    ):
        return sft.sft_main(SftArguments(**options)) / "run.json"


def run_job(path: str) -> None:
    """The loop of one rank."""
    from megaswift.run.spec import Run
    from megaswift.train.loop import train as train_rank

    train_rank(Run.read(Path(path)))


__all__ = ["Trained", "cache_root", "tiny_start", "train", "write_rows", "written_job"]
