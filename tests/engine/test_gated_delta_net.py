"""Layers with linear attention: samples that share a row are samples alone, and layouts that cannot be are refused by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaswift.errors import DataError, UserError
from megaswift.megatron.kernels.context_parallel import by_heads, by_tokens, shard_batch
from megaswift.megatron.model import build
from megaswift.models import family_of
from megaswift.proof.streams import one_process
from megaswift.run.problems import layout_problems, refuse
from megaswift.run.spec import Parallel, Precision
from megaswift.weights.hf.config import check_source, load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.load_hf import load_hf_weights
from tests import tiny
from tests.ranks import RankPool
from tests.runs import resolved_run

NAME = "qwen3_5_text"


@pytest.mark.parametrize("attention", ["fastest", "plain"])
def test_samples_of_a_row_are_samples_alone(attention: str, tmp_path: Path) -> None:
    """Samples shorter than the convolution, and longer than a chunk, in one row, and beside each other in padded rows."""
    lengths = [2, 70, 1, 130, 9]
    model = tiny.save_tiny(tmp_path, NAME)
    config = load_config(tmp_path)
    tokens = torch.randint(0, config.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with one_process(), torch.no_grad():
        ours = build(config, Parallel(), Precision(attention=attention)).eval()
        load_hf_weights(ours, tmp_path)
        packed = ours(tokens, positions, lengths)[0].split(lengths)
        alone = [ours(sample, torch.arange(sample.shape[1])[None])[0] for sample in tokens.split(lengths, dim=1)]
        rows = torch.nn.utils.rnn.pad_sequence([sample[0] for sample in tokens.split(lengths, dim=1)], batch_first=True)
        padded = ours(rows, torch.arange(rows.shape[1]).expand(len(rows), -1))
        wanted = [model(sample).logits[0] for sample in tokens.split(lengths, dim=1)]
    for number, sample in enumerate(alone):
        assert (packed[number] - sample).abs().max() < 3e-6
        assert (padded[number, : len(sample)] - sample).abs().max() < 3e-6
        assert (sample - wanted[number]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("layout", "message", "fix"),
    [
        (dict(tp=4), "--tp 4 does not divide the model's 2 key heads of linear attention", "1, 2"),
        (dict(cp=4), "--cp 4 does not divide the 2 key heads of linear attention that a rank of --tp 1 has", "1, 2"),
        (dict(tp=2, cp=2), "--cp 2 does not divide the 1 key heads", "1"),
    ],
)
def test_layouts_that_cut_a_head(layout: dict[str, int], message: str, fix: str) -> None:
    world = layout.get("tp", 1) * layout.get("cp", 1)
    with pytest.raises(UserError) as caught:
        refuse(layout_problems(tiny.tiny_config(NAME, linear_num_key_heads=2), Parallel(**layout, world_size=world)))
    assert message in caught.value.what and fix in caught.value.fix
    refuse(layout_problems(tiny.tiny_config(NAME), Parallel(tp=2, cp=2, world_size=4)))


def exchanged() -> bool:
    """On one of two ranks that share two rows: their tokens exchanged for heads and back, and the gradients of both."""
    from megaswift.data.batches import MicroBatch
    from megaswift.megatron import process_groups

    with process_groups.joined(Parallel(cp=2, world_size=2), seed=0):
        from megatron.core import parallel_state

        tokens = torch.arange(2 * 12).view(2, 12)
        batch = MicroBatch(tokens, tokens, tokens, None, (0,))
        share = shard_batch(batch, parallel_state.get_context_parallel_group()).share
        assert share is not None
        whole = torch.randn(12, 2, 4, 3, generator=torch.Generator().manual_seed(0))  # [s, b, heads, d]
        own = share.take(whole.transpose(0, 1)).transpose(0, 1).contiguous().requires_grad_()
        heads = by_heads(own, share)
        first = 2 * parallel_state.get_context_parallel_rank()
        mine = slice(first, first + 2)
        back = by_tokens(heads, share)
        (grad,) = torch.autograd.grad(heads, own, 2.0 * whole[:, :, mine], retain_graph=True)
        (through,) = torch.autograd.grad(back, own, own.detach())
        return (
            torch.equal(heads, whole[:, :, mine])
            and torch.equal(back, own)
            and torch.equal(grad, 2 * own)
            and torch.equal(through, own)
        )


def test_tokens_are_exchanged_for_heads(pool: RankPool) -> None:
    assert pool.run(2, exchanged) == [True, True]


def test_layers_that_predict_ahead_may_stand_in_a_folder(tmp_path: Path) -> None:
    """Qwen3-Next is published with them, under names of their own; others have no such tensors."""
    for name, extra, fits in (
        ("qwen3_next", "mtp.fc.weight", True),
        ("qwen3_next", "mpt.fc", False),
        (NAME, "mtp.fc.weight", True),
        ("qwen3", "mtp.fc.weight", False),
    ):
        tiny.save_tiny(tmp_path / name, name)
        file = tmp_path / name / "model.safetensors"
        save_file(load_file(file) | {extra: torch.ones(2, 2)}, file, {"format": "pt"})
        source, config = HFCheckpoint.open(tmp_path / name), load_config(tmp_path / name)
        with contextlib.nullcontext() if fits else pytest.raises(DataError, match="that this model does not have"):
            check_source(source, config)


def test_fp8_is_refused() -> None:
    with pytest.raises(UserError, match="linear attention was never compared"):
        resolved_run(config=tiny.tiny_config(NAME), dtype="bf16", fp8=True, on_gpu=True)


@pytest.mark.parametrize("changes", [{"linear_num_value_heads": 6}, {"linear_num_key_heads": 0}, {"linear_conv_kernel_dim": 0}])
def test_heads_that_cannot_be_grouped(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="linear attention of"):
        family_of(NAME).audit(tiny.tiny_config(NAME, **changes))
