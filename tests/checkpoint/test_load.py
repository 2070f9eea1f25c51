"""What a load takes from a checkpoint, what from the options of the run, and that no weight stays as it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megaswift.run.spec import Parallel, Precision
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows, written_job

SAVED = {"learning_rate": 1e-3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.3}
GIVEN = {"learning_rate": 5e-4, "adam_beta1": 0.7, "adam_beta2": 0.99, "adam_epsilon": 1e-5, "weight_decay": 0.05}


def _groups(before: str, now: str, target: str) -> list[list[dict[str, Any]]]:
    """On one rank: the parameter groups of a run after a step, and those of a run of other options that loads what it saved."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.run.spec import Run
    from megaswift.train.checkpoint.load import load_training_state
    from megaswift.train.checkpoint.save import save
    from megaswift.train.setup import open_batches, restore_trainer

    names, found = ("betas", "eps", "max_lr", "min_lr", "wd_mult", "step"), []
    with ranks.joined(Parallel(), 42) as rank:
        for path in (before, now):
            job = Run.read(Path(path))
            trainer, _ = restore_trainer(job)
            if path == before:
                trainer.step(open_batches(job, rank)[0].step(0))
                save(Path(target), 1, trainer, only_model=False, extra={}, manifest={"layout": {}})
            else:
                load_training_state(trainer, Path(target, "iter_0000001"), layout={})
            found.append([{name: group.get(name) for name in names} for group in trainer.optimizer.param_groups])
            found[-1].append(
                {"rates": [trainer.scheduler.max_lr, trainer.scheduler.end_wd], "steps": trainer.scheduler.num_steps}
            )
            trainer.close()
    return found


def test_rates_and_constants_are_those_of_the_options(pool: RankPool, tmp_path: Path) -> None:
    """The checkpoint tells how far a run came; how it learns from there on is what the command says."""
    start, rows = tiny_start(tmp_path, num_hidden_layers=2), write_rows(tmp_path / "rows.jsonl")
    more = dict(resume_from_checkpoint=str(start), dataset=[str(rows)], max_steps=2, max_length=128)
    jobs = [
        str(written_job(1, **more, **options, output_dir=str(tmp_path / name)))
        for name, options in (("before", SAVED), ("now", GIVEN))
    ]
    before, now = pool.run(1, _groups, *jobs, str(tmp_path / "saved"))[0]
    for groups, options in ((before, SAVED), (now, GIVEN)):
        *parts, schedule = groups
        assert {(tuple(group["betas"]), group["eps"]) for group in parts} == {
            ((options["adam_beta1"], options["adam_beta2"]), options["adam_epsilon"])
        }
        assert {group["max_lr"] for group in parts} <= {options["learning_rate"], None}
        assert schedule == {"rates": [options["learning_rate"], options["weight_decay"]], "steps": 1}
    assert [group["step"] for group in now[:-1]] == [group["step"] for group in before[:-1]], "its step is the checkpoint's"


def _load_without(folder: str, release: str, name: str) -> str:
    """On one rank: what is said where the model does not ask the checkpoint for one of its weights."""
    from megaswift.errors import DataError
    from megaswift.megatron import process_groups as ranks
    from megaswift.megatron.model import build
    from megaswift.train.checkpoint.load import load_weights
    from megaswift.weights.hf.config import load_config

    with ranks.joined(Parallel(), 42):
        config = load_config(Path(folder))
        model = build(config, Parallel(), Precision())
        whole = model.sharded_state_dict
        model.sharded_state_dict = lambda **how: {key: part for key, part in whole(**how).items() if key != name}
        with pytest.raises(DataError) as caught:
            load_weights(model, Path(release))
    return caught.value.what


def test_a_weight_that_nothing_fills_is_named(tiny_folders: Any, pool: RankPool) -> None:
    """As when a part of a model tells Megatron-Core nothing of its tensors: it would be trained from what memory held."""
    folder, release = tiny_folders("llama")
    name = "decoder.final_layernorm.weight"
    (said,) = pool.run(1, _load_without, str(folder), str(release), name)
    assert f"Missing: ['{name}']" in said
