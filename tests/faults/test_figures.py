"""How long saving and going on take for a state of 1 GB, and what a checkpoint written in the background costs a step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.megatron import process_groups as ranks
from megaswift.run.resume import newest_whole
from megaswift.run.spec import Run
from megaswift.train.checkpoint.optimizer_state import shards as shards_of
from megaswift.train.checkpoint.save import CONTENT
from megaswift.train.setup import restore_trainer
from tests.faults import table
from tests.faults.conftest import ALL, make_base
from tests.faults.harness import FaultRun
from tests.ranks import RankPool
from tests.runs import changed
from tests.training import tiny_start, write_rows

pytestmark = pytest.mark.skipif(not ALL, reason="a part of make faults")
SHAPE = dict(
    hidden_size=512, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=8, head_dim=64
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of a model of 82 million parameters: weights and two moments in fp32 are 1 GB."""
    root = tmp_path_factory.mktemp("large")
    start = tiny_start(root, **SHAPE), write_rows(root / "rows.jsonl")
    return make_base(
        start,
        root / "base",
        pp=2,
        gradient_accumulation_steps=1,
        save_steps=2,
        eval_steps=100,
        start_timeout=300.0,
        step_timeout=300.0,
    )


def test_a_state_of_one_gigabyte(large: Run, pool: RankPool, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in Path(large.saving.run_dir, "iter_0000002").iterdir())
    job = changed(large, save_steps=3, train_iters=9)
    rows: dict[bool, list[dict[str, Any]]] = {}
    for background in (False, True):
        case = FaultRun(job, tmp_path / str(background), in_background=background)
        ended = case.run()
        assert ended.codes == [0, 0], ended.output
        rows[background] = case.rows()
    saves = {kind: [row for row in found if "checkpoint" in row][1:] for kind, found in rows.items()}  # the first is the base's
    plain, hidden = saves[False][0], saves[True][0]
    began = time.perf_counter()
    newest, _ = newest_whole(tmp_path / "False" / "run", verify=True)
    hashed = time.perf_counter() - began
    times = pool.run(2, _load, str(tmp_path / "False" / "run.json"), str(newest))
    loaded, copied = max(time[0] for time in times), max(time[1] for time in times)
    table.figure("one checkpoint: weights and optimizer in fp32, two processes", f"{size / 1e9:.2f} GB")
    table.figure(
        "saving it: written, hashed, synced, published",
        f"{plain['save_seconds']:.2f} s, {size / 1e9 / plain['save_seconds']:.2f} GB/s",
    )
    table.figure(
        "with --async_save true, training waits for", f"{hidden['save_waited_seconds']:.2f} s of {hidden['save_seconds']:.2f} s"
    )
    table.figure("copying the same state in memory, on both processes at once", f"{copied:.2f} s")
    table.figure("going on: every byte hashed", f"{hashed:.2f} s, {size / 1e9 / hashed:.2f} GB/s")
    table.figure("going on: loaded into model and optimizer", f"{loaded:.2f} s, {size / 1e9 / loaded:.2f} GB/s")
    assert hidden["save_waited_seconds"] < plain["save_waited_seconds"]


def _load(path: str, checkpoint: str) -> tuple[float, float]:
    """Seconds for loading the whole state, and for one copy of it to memory that was not in use."""
    job = changed(Run.read(Path(path)), checkpoint=checkpoint)
    with ranks.joined(job.parallel, 42):
        began = time.perf_counter()
        trainer, _ = restore_trainer(job)
        loaded = time.perf_counter() - began
        shards = list(shards_of(trainer.optimizer, trainer.bare_model.sharded_state_dict(prefix="", metadata=dict(CONTENT))))
        torch.distributed.barrier()
        began = time.perf_counter()
        kept = [value.clone() for shard in shards for value in shard.read().values()]
        kept += [parameter.detach().clone() for parameter in trainer.bare_model.parameters()]
        return loaded, time.perf_counter() - began
