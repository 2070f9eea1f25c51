"""The same losses at every layout, and what a run writes: checkpoints, logs, args, plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPool
from tests.training import Trained, tiny_start, train, write_rows

# world size, tp, pp, sequence parallel; global batch 16 in each
LAYOUTS = [(2, 2, 1, True), (2, 2, 1, False), (2, 1, 2, False), (2, 1, 1, False), (4, 2, 2, True)]


def options(start: Path, rows: Path, tp: int = 1, pp: int = 1, sp: bool = False, **more: Any) -> dict[str, Any]:
    return (
        dict(
            resume_from_checkpoint=str(start),
            dataset=[str(rows)],
            tp=tp,
            pp=pp,
            sequence_parallel=sp,
            max_steps=5,
            eval_steps=3,
            dataset_test_ratio=0.1,
        )
        | more
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    return tiny_start(root), write_rows(root / "rows.jsonl")


@pytest.fixture(scope="module")
def plain(llama: tuple[Path, Path], pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run of one process that others are compared with."""
    return reference(pool, tmp_path_factory.mktemp("plain"), llama)


def reference(pool: RankPool, tmp_path: Path, llama: tuple[Path, Path], **more: Any) -> Trained:
    return train(pool, tmp_path / "reference", 1, **options(*llama, **more))


def test_losses_do_not_depend_on_the_layout(llama: tuple[Path, Path], plain: Trained, pool: RankPool, tmp_path: Path) -> None:
    """5 steps at each layout: losses, validation losses and gradient norms equal to 1e-5 (other families: test_golden.py)."""
    for number, (processes, *layout) in enumerate(LAYOUTS):
        run = train(pool, tmp_path / str(number), processes, **options(*llama, *layout))
        assert run.losses == pytest.approx(plain.losses, abs=1e-5), layout
        assert run.eval_losses == pytest.approx(plain.eval_losses, abs=1e-5), layout
        assert run.norms == pytest.approx(plain.norms, rel=2e-5), layout


@pytest.mark.parametrize(
    "changes",
    [
        dict(padding_free=False),
        dict(batch_size=4, gradient_accumulation_steps=4),
        dict(batch_size=4, gradient_accumulation_steps=4, padding_free=False),
        dict(gradient_checkpointing=True),
        dict(use_flash_attn=False),
        dict(dataloader_num_workers=0),
        dict(deterministic=True),
    ],
    ids=str,
)
def test_losses_do_not_depend_on_how_it_is_computed(
    changes: dict[str, Any], llama: tuple[Path, Path], plain: Trained, pool: RankPool, tmp_path: Path
) -> None:
    other = train(pool, tmp_path / "other", 1, **options(*llama, **changes))
    assert other.losses == pytest.approx(plain.losses, abs=1e-5)
    assert other.norms == pytest.approx(plain.norms, rel=2e-5)


def test_recompute_under_pipeline_and_packed_micro_batches(llama: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    plain = reference(pool, tmp_path, llama, batch_size=2, gradient_accumulation_steps=8)
    more = dict(batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True)
    other = train(pool, tmp_path / "other", 4, **options(*llama, 2, 2, True, **more))
    assert other.losses == pytest.approx(plain.losses, abs=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precisions_train(dtype: str, llama: tuple[Path, Path], plain: Trained, pool: RankPool, tmp_path: Path) -> None:
    """bf16 and fp16 (with Megatron's loss scaler) stay near the fp32 losses."""
    half = train(pool, tmp_path / dtype, 2, **options(*llama, 1, 2, dtype=dtype))
    assert half.losses == pytest.approx(plain.losses, abs=0.08)
    assert half.losses[-1] < half.losses[0]


def test_what_a_run_writes(llama: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    run = train(pool, tmp_path, 2, **options(*llama, 1, 2, save_steps=2, save_total_limit=2))
    assert run.directory.parent == tmp_path / "tiny-chat-tp1-pp2"
    assert run.directory.name.startswith("v0-")
    names = {path.name for path in run.directory.iterdir()}
    assert {"sft_args.json", "plan.json", "logging.jsonl", "runs", "images", "config.json", "tokenizer.json"} <= names
    assert {"iter_0000004", "iter_0000005"} <= names
    assert "iter_0000002" not in names  # save_total_limit
    assert (run.directory / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "5"
    assert json.loads((run.directory / "sft_args.json").read_text(encoding="utf-8"))["model_type"] == "tiny-chat"
    row = next(row for row in run.rows if "loss" in row)
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "consumed_samples",
        "global_step/max_steps",
        "tokens_per_second",
        "memory_gb",
        "elapsed_s",
        "remaining_s",
    } <= set(row)
    second = train(pool, tmp_path, 1, **options(*llama, 1, 1, model_type="tiny-chat"))
    assert second.directory.name.startswith("v0-")
    assert second.directory.parent.name == "tiny-chat-tp1-pp1"
    third = train(pool, tmp_path, 2, **options(*llama, 1, 2))
    assert third.directory.name.startswith("v1-")


@pytest.mark.parametrize("layout", [(2, 1, 2, False), (1, 1, 1, False), (4, 2, 2, True)])
def test_a_run_goes_on_where_it_was_saved(
    layout: tuple[int, int, int, bool], llama: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    """Five steps equal three and two, at the same and at other layouts."""
    straight = train(pool, tmp_path / "straight", 2, **options(*llama, 1, 2, save_steps=3, save_total_limit=5))
    last = straight.directory / "iter_0000005"
    last.rename(tmp_path / "set_aside")
    more = options(straight.directory, llama[1], *layout[1:], save_steps=3)
    resumed = train(pool, tmp_path / "unused", layout[0], **more)
    assert resumed.directory == straight.directory
    exact = layout == (2, 1, 2, False)
    assert resumed.losses == (straight.losses if exact else pytest.approx(straight.losses, abs=1e-5))


def test_no_conversion_is_needed(llama: tuple[Path, Path], plain: Trained, pool: RankPool, tmp_path: Path) -> None:
    """Training from the Hugging Face folder itself gives the losses of training from its converted weights."""
    start, rows = llama
    more = options(start, rows, 2, 2, True, model_type="tiny-chat", model_id_or_path=str(start.parent / "hf"))
    direct = train(pool, tmp_path / "direct", 4, **{**more, "resume_from_checkpoint": None})
    assert direct.losses == pytest.approx(plain.losses, abs=1e-5)


def test_a_run_leaves_nothing_in_its_process(llama: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """A notebook may train again and again: model, process groups and their threads of an earlier run are gone."""
    counts = []
    for k in range(3):
        reference(pool, tmp_path / str(k), llama, max_steps=1)
        counts.append(pool.run(1, left_behind)[0])
    assert [models for models, _ in counts] == [0, 0, 0]
    assert counts[2][1] <= counts[0][1]


def left_behind() -> tuple[int, int]:
    """Models that are alive in this process, and its threads."""
    import gc
    import os

    gc.collect()
    return sum(type(item).__name__ == "ChatModel" for item in gc.get_objects()), len(os.listdir("/proc/self/task"))
