"""One checkpoint through tp 1, tp 4 and tp 2 x pp 2 and back to Hugging Face: every bit of weights and moments survives."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaswift.run.spec import Parallel, Precision
from megaswift.weights.carried import carried_names
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader
from tests import tiny
from tests.faults import conftest, table
from tests.ranks import RankPool
from tests.runs import changed
from tests.training import tiny_start, train, write_rows

LAYOUTS = [(4, 1), (2, 2)]  # tp, pp: after a conversion that is of no layout, or after a run at tp 1
MODELS = [(name, tied) for name in tiny.FAMILIES for tied in (True, False)]
SOME = [("llama", True), ("qwen3", False)]
ALL = conftest.ALL or "MEGASWIFT_FAMILIES" in os.environ


def chain(tmp_path: Path, first: Path) -> list[tuple[Path, Path, int, int]]:
    """(from, to, tp, pp) of each step."""
    places = [first, *(tmp_path / f"tp{tp}-pp{pp}" / "iter_0000001" for tp, pp in LAYOUTS)]
    return [(source, target, tp, pp) for source, target, (tp, pp) in zip(places, places[1:], LAYOUTS)]


def _weights(config_dir: str, source: str, target: str, tp: int, pp: int) -> None:
    """Load at a layout, save again."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.megatron.model import build
    from megaswift.train.checkpoint.load import load_weights
    from megaswift.train.checkpoint.save import save

    parallel = Parallel(tp=tp, pp=pp)
    with ranks.joined(parallel, 42):
        model = build(load_config(Path(config_dir)), parallel, Precision())
        load_weights(model, Path(source))
        state: Any = SimpleNamespace(bare_model=model, settle_weights=lambda: None, some_layers=None)
        save(Path(target).parent, 1, state, only_model=True, extra={}, manifest={})


@pytest.mark.parametrize(("name", "tied"), MODELS if ALL else SOME)
def test_weights_come_back_from_every_layout(name: str, tied: bool, pool: RankPool, tmp_path: Path) -> None:
    """The vocabulary of 131 is padded to 132 on the way, and comes back as 131."""
    tiny.save_tiny(tmp_path / "hf", name, tie_word_embeddings=tied, vocab_size=131)
    steps = chain(tmp_path, tiny.to_megatron(tmp_path / "hf", tmp_path / "release"))
    for source, target, tp, pp in steps:
        pool.run(tp * pp, _weights, str(tmp_path / "hf"), str(source), str(target), tp, pp)
    original = HFCheckpoint.open(tmp_path / "hf")
    found = planned_hf_tensors(Reader(steps[-1][1]), load_config(tmp_path / "hf"), Precisions(torch.float32))
    assert {tensor.name for tensor in found} == set(original.names) - set(carried_names(original, load_config(tmp_path / "hf")))
    for tensor in found:
        assert torch.equal(tensor.produce(), original.tensor(tensor.name)), tensor.name
    table.add(
        f"{name}, {'tied' if tied else 'untied'}: Hugging Face, tp 1, tp 4, tp 2 x pp 2, Hugging Face",
        f"{len(found)} tensors",
        "equal to the bit",
    )


def _state(run: str, source: str, target: str, tp: int, pp: int) -> None:
    """Load weights, optimizer and schedule at a layout, save again."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.run.spec import Run
    from megaswift.train.checkpoint.save import save
    from megaswift.train.setup import restore_trainer

    spec = changed(Run.read(Path(run) / "run.json").going_on(1, Path(source)), tp=tp, pp=pp, world_size=tp * pp)
    with ranks.joined(spec.parallel, 42):
        trainer = restore_trainer(spec)[0]
        save(Path(target).parent, 1, trainer, only_model=False, extra={}, manifest={"layout": spec.parallel.layout})


@pytest.mark.parametrize(("name", "tied"), MODELS if ALL else SOME[1:])
def test_moments_come_back_from_every_layout(name: str, tied: bool, pool: RankPool, tmp_path: Path) -> None:
    start = tiny_start(tmp_path, name, tie_word_embeddings=tied)
    rows = write_rows(tmp_path / "rows.jsonl")
    run = train(
        pool, tmp_path / "out", 1, resume_from_checkpoint=str(start), dataset=[str(rows)], model_type="tiny-chat", max_steps=1
    )
    steps = chain(tmp_path, run.directory / "iter_0000001")
    for source, target, tp, pp in steps:
        pool.run(tp * pp, _state, str(run.directory), str(source), str(target), tp, pp)
    before, after = Reader(steps[0][0]), Reader(steps[-1][1])
    assert set(before.keys) == set(after.keys)
    moments = [key for key in before.keys if "exp_avg" in key]
    assert len(moments) > 10
    for key in before.keys:
        assert torch.equal(before.read(key), after.read(key)), key
    assert all(float(before.read(key).abs().max()) > 0 for key in moments if "word_embeddings" in key)
    table.add(
        f"{name}, {'tied' if tied else 'untied'}: a run's state through tp 1, tp 4, tp 2 x pp 2",
        f"{len(before.keys)} tensors, {len(moments)} of them moments",
        "equal to the bit",
    )
