"""Stages in several chunks that take turns (--vpp): what is trained is what one stage trains, and every layout reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments, SftArguments
from megaswift.config.parse import parse
from megaswift.errors import UserError
from megaswift.models.stages import by_rank, group_of_micro_batches, passes_in_flight
from megaswift.run.problems import layout_problems
from megaswift.run.spec import Parallel
from tests import tiny
from tests.engine.test_stages import STEPS, equal, run
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows, written_job


def test_chunks_train_as_one_stage(pool: RankPool, tmp_path: Path) -> None:
    """Six layers in four and six chunks, rows of different lengths end to end, tied; every weight and moment is compared."""
    write_rows(tmp_path / "rows.jsonl")
    start = str(tiny_start(tmp_path, "qwen3", num_hidden_layers=6, tie_word_embeddings=True))
    one = run(pool, tmp_path, "one", 1, resume_from_checkpoint=start)
    two = run(pool, tmp_path, "pp2 vpp2", 2, resume_from_checkpoint=start, pp=2, vpp=2)
    assert json.loads((two.directory / "plan.json").read_text())["stages"] == [1, 2, 2, 1]
    equal(one, two, "pp2 vpp2")
    three = run(pool, tmp_path, "pp3 vpp2", 3, resume_from_checkpoint=start, pp=3, vpp=2, gradient_checkpointing=True)
    equal(one, three, "pp3 vpp2, recomputed")
    packed: dict[str, Any] = {"resume_from_checkpoint": start, "packing": True, "dataset": [f"{tmp_path / 'rows.jsonl'}#200"]}
    equal(
        run(pool, tmp_path, "one packed", 1, **packed),
        run(pool, tmp_path, "packed", 4, tp=2, pp=2, vpp=2, sequence_parallel=True, **packed),
        "tp2 pp2 vpp2, packed",
    )


def test_a_run_goes_on_with_and_without_chunks(pool: RankPool, tmp_path: Path) -> None:
    """Optimizer state too; the model that it leaves is exported and proven. The rows of a step do not change: 3 micro batches of 4."""
    write_rows(tmp_path / "rows.jsonl")
    start = str(tiny_start(tmp_path, num_hidden_layers=5))
    one = run(pool, tmp_path, "one", 1, resume_from_checkpoint=start)
    split = run(
        pool, tmp_path, "split", 2, resume_from_checkpoint=start, pp=2, vpp=2, batch_size=2, gradient_accumulation_steps=3
    )
    equal(one, split, "pp2 vpp2, two rows in a micro batch")
    hf = export_main(ExportArguments(ckpt_dir=str(split.directory), to_hf=True))
    assert (hf / "model.safetensors").is_file()
    for before, name, world, options in (
        (split, "split", 2, {"tp": 2}),
        (one, "one", 2, {"pp": 2, "vpp": 2, "batch_size": 4}),
    ):
        again = tmp_path / f"{name} again"
        shutil.copytree(before.directory, again)
        shutil.rmtree(again / f"iter_{STEPS:07d}")
        (again / "latest_checkpointed_iteration.txt").write_text("2")
        went_on = run(pool, tmp_path, "x", world, resume_from_checkpoint=str(again), **options)
        equal(one, went_on, f"{name} gone on with {options}")


@pytest.mark.parametrize("overlapped", [False, True])
def test_chunks_on_data_parallel_ranks(overlapped: bool, pool: RankPool, tmp_path: Path) -> None:
    """Layers that differ, padded rows, from a Hugging Face folder; gradients are reduced, and weights gathered, chunk by chunk."""
    write_rows(tmp_path / "rows.jsonl")
    tiny_start(tmp_path, "smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 1])  # only the second one does not rotate
    options: dict[str, Any] = {
        "model_type": "tiny-chat", "model_id_or_path": str(tmp_path / "hf"), "batch_size": 2, "padding_free": False,
        "overlap_grad_reduce": overlapped, "overlap_param_gather": overlapped,
    }  # fmt: skip
    one = run(pool, tmp_path, "one", 1, gradient_accumulation_steps=8, **options)
    more = run(pool, tmp_path, "more", 4, pp=2, vpp=2, gradient_accumulation_steps=2, **options)
    equal(one, more, "dp2 pp2 vpp2")


@pytest.mark.parametrize(
    ("pp", "vpp", "fix"),
    [(1, 2, "use --pp 2"), (2, 3, "use --vpp 2"), (5, 2, "leave it out, or use --pp 2"), (1, 6, "leave it out"), (2, 2, None)],
)
def test_stages_that_cannot_have_chunks(pp: int, vpp: int, fix: str | None) -> None:
    """Five layers; the nearest legal values are told."""
    found = list(layout_problems(tiny.tiny_config("llama", num_hidden_layers=5), Parallel(world_size=pp, pp=pp, vpp=vpp)))
    assert [problem.where for problem in found] == ([] if fix is None else ["--vpp"])
    assert fix is None or found[0].fix.endswith(fix)


def test_too_few_micro_batches_are_told_before_ranks_start(pool: RankPool, tmp_path: Path) -> None:
    """A run that goes on keeps its global batch of 12 rows, which --batch_size 12 makes one micro batch."""
    write_rows(tmp_path / "rows.jsonl")
    start = str(tiny_start(tmp_path))
    before = run(pool, tmp_path, "one", 1, resume_from_checkpoint=start)
    shutil.rmtree(before.directory / f"iter_{STEPS:07d}")
    with pytest.raises(UserError) as caught:
        run(pool, tmp_path, "x", 2, resume_from_checkpoint=str(before.directory), pp=2, vpp=2, batch_size=12)
    assert "--vpp 2 at --pp 2 needs 2 micro batches a step on each data-parallel rank, there are 1" in caught.value.what
    assert caught.value.fix == "use --batch_size 6, or leave --vpp out"


def test_cuda_graphs_and_other_names(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    start = str(tiny_start(tmp_path))
    with pytest.raises(UserError, match="--cuda_graphs true does not work with --tp, --pp"):
        written_job(
            2,
            pp=2,
            vpp=2,
            cuda_graphs="true",
            resume_from_checkpoint=start,
            dataset=[str(tmp_path / "rows.jsonl")],
            max_steps=1,
        )
    for name in ("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"):
        with pytest.raises(UserError) as caught:
            parse(SftArguments, [f"--{name}", "2"])
        assert "--vpp" in (caught.value.fix or "")


def test_a_chunk_has_its_turn_after_so_many_micro_batches() -> None:
    assert [group_of_micro_batches(count, 4) for count in (4, 5, 6, 7, 8, 9, 12, 15)] == [4, 5, 6, 7, 4, 5, 4, 5]
    assert by_rank([2, 2, 1, 3], 2) == [3, 5]
    assert passes_in_flight(4, 1, 8) == 4
    assert passes_in_flight(2, 2, 8) == 3  # the first two micro batches pass both chunks, and a third one the first
    assert passes_in_flight(2, 2, 2) == 2
