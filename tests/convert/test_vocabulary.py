"""The vocabulary is padded for tensor parallelism; what stands in the padding stays behind in an export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.ranks import RankPool

from megaswift.run.spec import Parallel, Precision
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader

WORDS, PADDED = 131, 132  # at tp 2


def _save_padded(folder: str, release: str, target: str) -> None:
    """On one of two ranks: load, fill the padding rows with sevens as if training had written there, save."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.megatron.model import build
    from megaswift.train.checkpoint.load import load_weights
    from megaswift.train.checkpoint.save import save

    with ranks.joined(Parallel(tp=2), 42) as rank:
        model = build(load_config(Path(folder)), Parallel(tp=2), Precision(), vocab_rows=PADDED)
        load_weights(model, Path(release))
        tables = [value for name, value in model.named_parameters() if "word_embeddings" in name or "output_layer" in name]
        assert tables and all(len(table) == PADDED // 2 for table in tables)
        if rank.rank == 1:
            with torch.no_grad():
                for table in tables:
                    table[WORDS - PADDED :] = 7.0
        state: Any = SimpleNamespace(bare_model=model, settle_weights=lambda: None, some_layers=None)
        save(Path(target), 1, state, only_model=True, extra={}, manifest={})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_padding_is_not_exported(tied: bool, pool: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    tiny.save_tiny(folder, "llama", tie_word_embeddings=tied, vocab_size=WORDS, num_hidden_layers=2)
    release = tiny.to_megatron(folder, tmp_path / "release")
    pool.run(2, _save_padded, str(folder), str(release), str(tmp_path))
    reader, original = Reader(tmp_path / "iter_0000001"), HFCheckpoint.open(folder)
    padded = [key for key in reader.keys if "word_embeddings" in key or "output_layer" in key]
    assert len(padded) == (1 if tied else 2)
    assert all(reader.shape(key)[0] == PADDED and (reader.read(key)[WORDS:] == 7.0).all() for key in padded)
    found = {planned.name: planned for planned in planned_hf_tensors(reader, load_config(folder), Precisions(torch.float32))}
    assert set(found) == set(original.names)
    for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        assert found[name].shape[0] == len(found[name].produce()) == WORDS, name
        assert torch.equal(found[name].produce(), original.tensor(name)), name
