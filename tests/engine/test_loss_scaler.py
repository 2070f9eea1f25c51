"""fp16: gradients that overflow on one rank skip the update on all, the loss scale recovers, and a hopeless run stops."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megaswift.commands import sft
from megaswift.train.trainer import INITIAL_LOSS_SCALE, MIN_LOSS_SCALE
from tests.engine.test_training import options
from tests.ranks import RankFailed, RankPool
from tests.training import run_job, tiny_start, train, write_rows, written_job


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("fp16")
    return tiny_start(root), write_rows(root / "rows.jsonl")


@pytest.fixture(scope="module")
def job(llama: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(tp, pp, sp) -> the file that `swift sft` hands to two ranks in fp16."""

    def make(tp: int, pp: int) -> str:
        root = tmp_path_factory.mktemp("job")
        more = options(
            *llama,
            tp,
            pp,
            tp > 1,
            dtype="fp16",
            max_steps=8,
            output_dir=str(root),
            learning_rate=1e-3,
            gradient_accumulation_steps=4,
        )
        return str(written_job(2, **more))

    return make


def steps(path: str, bad: dict[int, int], initial: float, window: int) -> list[dict[str, Any]]:
    """On one rank: eight steps; at step k the rank bad[k] gets an infinite gradient. What each step gave here.

    `initial` is the first loss scale, and after `window` good steps it doubles.
    """
    import torch
    import torch.distributed as dist

    from megaswift.megatron import process_groups as ranks
    from megaswift.run.spec import Run
    from megaswift.train.setup import open_batches, restore_trainer

    job = Run.read(Path(path))
    found = []
    with ranks.joined(job.parallel, job.seed) as rank:
        trainer = restore_trainer(job)[0]
        scalers = [part.grad_scaler for part in trainer.optimizer.chained_optimizers]
        for scaler in scalers:
            scaler._scale.fill_(initial)
            scaler.growth_interval = window
        batches, _ = open_batches(job, rank)
        for place in range(job.schedule.train_iters):
            sums = trainer.gradients(batches.step(place))
            if bad.get(place + 1) == dist.get_rank():
                for weight in trainer.bare_model.parameters():  # a data-parallel rank owns a part of the buffers only
                    weight.main_grad.view(-1)[0] = math.inf
            result = trainer.update(sums)
            weights = torch.cat([weight.detach().reshape(-1) for weight in trainer.bare_model.parameters()])
            digest = hashlib.sha256(weights.view(torch.uint8).numpy().tobytes()).hexdigest()
            found.append(
                {"skipped": result.skipped, "scale": result.loss_scale, "loss": result.loss, "norm": result.grad_norm,
                 "nonfinite": result.nonfinite, "weights": digest}
            )  # fmt: skip
        trainer.close()
    return found


LAYOUTS = pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)], ids=["dp2", "tp2", "pp2"])


@LAYOUTS
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_overflows_and_none_updates(tp: int, pp: int, rank: int, job: Any, pool: RankPool) -> None:
    """Overflow at steps 2, 4 and 5 of one rank: the same decision, loss, norm and scale on both; then training goes on."""
    first, second = pool.run(2, steps, job(tp, pp), {2: rank, 4: rank, 5: rank}, INITIAL_LOSS_SCALE, 1000)
    for a, b in zip(first, second):
        assert {name: a[name] for name in a if name != "weights"} == {name: b[name] for name in b if name != "weights"}
    assert [row["skipped"] for row in first] == [k in (2, 4, 5) for k in range(1, 9)]
    assert [row["norm"] is None for row in first] == [row["skipped"] for row in first]
    assert not any(row["nonfinite"] for row in first)
    # Megatron-Core forgives one overflow; from the second on each halves the scale.
    assert [row["scale"] / INITIAL_LOSS_SCALE for row in first] == [1, 1, 1, 0.5, 0.25, 0.25, 0.25, 0.25]
    for side in (first, second):
        for before, row in zip(side, side[1:]):
            assert (before["weights"] == row["weights"]) == row["skipped"]
    assert first[-1]["loss"] < first[0]["loss"]


def test_a_scale_that_is_too_high_comes_down_by_itself(job: Any, pool: RankPool) -> None:
    """Real overflow of real fp16 gradients: steps are skipped until the scale fits, and only then the weights move."""
    first, second = pool.run(2, steps, job(1, 2), {}, 2.0**13, 1000)
    assert [row["skipped"] for row in first] == [row["skipped"] for row in second]
    skipped = [row["skipped"] for row in first]
    assert skipped[0] and not skipped[-1]
    assert skipped == sorted(skipped, reverse=True)  # no overflow after the first good step
    assert first[-1]["loss"] < first[0]["loss"]


def test_the_scale_grows_after_good_steps(job: Any, pool: RankPool) -> None:
    first, _ = pool.run(2, steps, job(2, 1), {}, 8.0, 3)
    assert [row["scale"] for row in first] == [8, 8, 16, 16, 16, 32, 32, 32]
    assert not any(row["skipped"] for row in first)
    losses = [row["loss"] for row in first]
    other, _ = pool.run(2, steps, job(2, 1), {}, 64.0, 1000)
    assert losses == pytest.approx([row["loss"] for row in other], abs=2e-3)  # the scale itself changes nothing but rounding


def overflow_always(path: str) -> None:
    """The loop of one rank, in which rank 1's gradients are infinite from step 2 on."""
    import os

    from megaswift.train.trainer import Trainer

    plain, count = Trainer.gradients, [0]

    def bad(self: Any, batches: Any) -> Any:
        sums = plain(self, batches)
        count[0] += 1
        if count[0] > 1 and os.environ["RANK"] == "1":
            next(iter(self.bare_model.parameters())).main_grad.fill_(math.inf)
        return sums

    with mock.patch.object(Trainer, "gradients", bad):
        run_job(path)


def test_what_the_user_sees(llama: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """A run whose gradients never fit lowers the scale to its floor, says so in every line, and then stops with a reason."""

    def start_ranks(place: Any, path: Path, *_: Any) -> None:
        pool.run(place.world_size, overflow_always, str(path))

    with (
        mock.patch("tests.training.run_job", overflow_always),
        mock.patch("megaswift.launch.agent.start_ranks", start_ranks),
        pytest.raises(RankFailed) as caught,
    ):
        more = options(
            *llama, 1, 2, dtype="fp16", max_steps=40, output_dir=str(tmp_path), logging_steps=1, gradient_accumulation_steps=1
        )
        with mock.patch.dict("os.environ", {"NPROC_PER_NODE": "2"}):
            sft.sft_main(sft.SftArguments(**more))
    text = str(caught.value)
    assert "NonFiniteError" in text
    assert "gradient norm inf at step" in text
    assert "use --dtype bf16 in place of fp16" in text
    import json

    log = next(tmp_path.rglob("logging.jsonl"))
    rows = [row for row in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0] + [1] * (len(rows) - 1)
    scales = [row["loss_scale"] for row in rows]
    assert scales[0] == INITIAL_LOSS_SCALE and scales[-1] == MIN_LOSS_SCALE
    assert scales == sorted(scales, reverse=True)


def test_the_scale_is_part_of_a_checkpoint(llama: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """Five steps in fp16 equal three and two."""
    more = options(*llama, 1, 2, dtype="fp16", save_steps=3)
    straight = train(pool, tmp_path / "straight", 2, **more)
    (straight.directory / "iter_0000005").rename(tmp_path / "set_aside")
    resumed = train(pool, tmp_path / "unused", 2, **options(straight.directory, llama[1], 1, 2, save_steps=3))
    assert resumed.losses == straight.losses
    assert [row["loss_scale"] for row in resumed.rows if "loss" in row] == [INITIAL_LOSS_SCALE] * 5
