"""Runs for tests: one of a tiny model without any file behind it, and a run in which some values are others."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from megaswift.config.options import SftArguments
from megaswift.run.problems import contradictions, problems, refuse
from megaswift.run.resolve import World, resolve
from megaswift.run.source import TrainingSource
from megaswift.run.spec import DataRef, Run
from tests import tiny


def changed(run: Run, **values: Any) -> Run:
    """A run in which the named values are others, in whichever part they stand; no process is told of it."""
    found: set[str] = set()
    for part in fields(run):
        old = getattr(run, part.name)
        if part.name in values:
            run = replace(run, **{part.name: values[part.name]})
            found.add(part.name)
        elif is_dataclass(old):
            own = {item.name: values[item.name] for item in fields(old) if item.name in values}
            assert not found & set(own), f"two parts of a run have {found & set(own)}"
            run = replace(run, **{part.name: replace(old, **own)})  # type: ignore[type-var]
            found |= set(own)
    assert found == set(values), f"no part of a run has {set(values) - found}"
    return run


def source_of(config: Any, dtype: str = "fp32", root: str = "a") -> TrainingSource:
    """What training starts from, as far as plans need it."""
    args = SftArguments(model_type="tiny")
    return TrainingSource(args, Path(root), Path(root), config, dtype, manifest={}, run_dir=None, first_step=0)


def resolved_run(**changes: Any) -> Run:
    """A run of options, on 4 processes with 100 rows unless said otherwise. Raises what `swift sft` would raise."""
    config, dtype = changes.pop("config", tiny.tiny_config("llama")), changes.pop("dtype", "fp32")
    world = World(changes.pop("world_size", 4), changes.pop("on_gpu", False))
    data = DataRef(train="rows", train_rows=changes.pop("train_rows", 100), val_rows=changes.pop("val_rows", 3))
    batch = changes.pop("earlier_batch", None)
    args = SftArguments(**{"model_type": "tiny", "max_length": 64, **changes})
    args.check_choices()
    refuse(contradictions(args))
    run = resolve(args, source_of(config, dtype), world, data, run_dir="b", earlier_batch=batch)
    refuse(problems(run, config))
    return run


__all__ = ["changed", "resolved_run", "source_of"]
