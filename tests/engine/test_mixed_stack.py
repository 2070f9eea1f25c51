"""Families whose layers are of different kinds, or whose rows are rearranged: other layouts, and from one to another."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.models import parameters_of
from megaswift.run.spec import Parallel, Precision
from megaswift.weights import classic
from megaswift.weights.convert import Precisions, hf_to_megatron, planned_hf_tensors, verify_round_trip, verify_written
from megaswift.weights.convert.to_megatron import megatron_to_megatron
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader
from tests import tiny
from tests.convert.test_classic import write_classic
from tests.convert.test_hf_load import both_ways
from tests.faults.test_reshard import _weights
from tests.mixed import mixed, on_rank
from tests.ranks import RankPool
from tests.training import tiny_start, train, write_rows

FP32 = Precisions(torch.float32)


def logits_at(folder: str, release: str, tp: int) -> torch.Tensor:
    """On one rank: its part of the logits of 40 tokens."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.megatron.model import build
    from megaswift.train.checkpoint.load import load_weights

    with ranks.joined(Parallel(tp=tp), seed=0), torch.no_grad():
        model = build(load_config(Path(folder)), Parallel(tp=tp), Precision())
        load_weights(model, Path(release))
        return model(torch.arange(40)[None], torch.arange(40)[None])


def test_layers_with_other_tensors(pool: RankPool, tmp_path: Path) -> None:
    """Keys by layer: Hugging Face, torch_dist, classic and a loaded model hold the same values and compute the same."""
    folder, release = tmp_path / "hf", tmp_path / "release"
    with mixed():
        reference = tiny.save_tiny(folder, "qwen3", tie_word_embeddings=False)
        source, config = HFCheckpoint.open(folder), load_config(folder)
        release.mkdir()
        done = hf_to_megatron(source, config, release, FP32)
        reader = Reader(release)
        norms = [key for key in reader.keys if key.endswith("q_layernorm.weight")]
        assert sorted(norms) == [f"decoder.layers.{layer}.self_attention.q_layernorm.weight" for layer in (0, 2)]
        assert reader.shape("decoder.layers.1.mlp.linear_fc2.weight") == (64, 96)
        assert verify_round_trip(reader, config, done.tensors, FP32) == len(done.tensors) == len(source.names)
        assert verify_written(source, reader, config, FP32) == len(source.names)

        old = write_classic(tmp_path / "old", reference, 2, 2)
        (tmp_path / "new").mkdir()
        found = classic.find(old)
        assert found is not None
        megatron_to_megatron(classic.ClassicReader(found, config), config, tmp_path / "new", FP32)
        again = Reader(tmp_path / "new")
        assert all(torch.equal(again.read(p.key, p.place), reader.read(p.key, p.place)) for p in parameters_of(config))

        for tp, pp in ((2, 1), (1, 2)):
            for different, count in pool.run(tp * pp, on_rank, both_ways, str(folder), str(release), tp, pp):
                assert different == [] and count > 5
        with torch.no_grad():
            wanted = reference(torch.arange(40)[None]).logits
        found_logits = torch.cat(pool.run(2, on_rank, logits_at, str(folder), str(release), 2), dim=-1)
        assert (found_logits - wanted).abs().max() < 5e-6

        saved = tmp_path / "tp2" / "iter_0000001"
        pool.run(2, on_rank, _weights, str(folder), str(release), str(saved), 2, 1)
        back = {one.name: one.produce() for one in planned_hf_tensors(Reader(saved), config, FP32)}
        assert back.keys() == set(source.names) and all(torch.equal(back[name], source.tensor(name)) for name in back)


@pytest.mark.parametrize("name", ["mixed", "smollm3", "ernie4_5"])
def test_losses_at_other_layouts_and_from_one_to_another(name: str, pool: RankPool, tmp_path: Path) -> None:
    """tp 2 without sp, cp 2 and dp 2 train as one process does; what tp 2 saved goes on at pp 2."""
    with mixed() if name == "mixed" else contextlib.nullcontext():
        start, rows = tiny_start(tmp_path, "qwen3" if name == "mixed" else name), write_rows(tmp_path / "rows.jsonl")

        def run(place: str, processes: int, **layout: Any) -> Any:
            words: dict[str, Any] = dict(resume_from_checkpoint=str(start), dataset=[str(rows)], max_steps=4, save_steps=2)
            words |= dict(gradient_accumulation_steps=4 // processes, dataset_test_ratio=0, save_total_limit=5) | layout
            return train(pool, tmp_path / place, processes, **words)

        plain, split = run("plain", 1), run("tp2", 2, tp=2)
        (split.directory / "iter_0000004").rename(tmp_path / "set_aside")
        further = run("unused", 2, pp=2, resume_from_checkpoint=str(split.directory))
        assert further.directory == split.directory
        for other in (split, further, run("cp2", 2, cp=2), run("dp2", 2)):
            assert other.losses == pytest.approx(plain.losses, abs=1e-5)
            assert other.norms == pytest.approx(plain.norms, rel=2e-5)
