"""Context parallelism: the slices cover each row once, attention over them is whole attention, and runs change layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswift.data.batches import MicroBatch
from megaswift.errors import UserError
from megaswift.megatron.kernels.context_parallel import _slice, shard_batch, shared_causal
from megaswift.run.problems import layout_problems, refuse
from megaswift.run.spec import Parallel
from tests import tiny
from tests.ranks import RankPool
from tests.runs import resolved_run
from tests.training import tiny_start, train, write_rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(2, 4), st.integers(1, 3))
def test_slices_see_what_stands_before_them(samples: list[int], size: int, rows: int) -> None:
    """Each slice's samples have all of its tokens, and exactly the keys that causal attention within a sample allows."""
    samples = [*samples, -sum(samples) % (2 * size)] if sum(samples) % (2 * size) else samples
    width = sum(samples)
    begins = [sum(samples[:k]) for k in range(len(samples))]
    sample_of = [k for k, length in enumerate(samples) for _ in range(length)]
    part = width // (2 * size)
    for first in range(0, width, part):
        piece = _slice(first, first + part, samples, rows, torch.device("cpu"))
        token, key = first, piece.start
        assert len(piece.lengths.queries) % rows == 0
        for queries, keys in list(zip(piece.lengths.queries, piece.lengths.keys))[: len(piece.lengths.queries) // rows]:
            sample = sample_of[token]
            assert key == begins[sample]
            token, key = token + queries, key + keys
            assert key == token, "the last query of a sample sees itself and nothing after it"
        assert (token, key) == (first + part, first + part)
        assert piece.lengths.cu_queries[-1] == part * rows


def _attention(
    lengths: list[int] | None, width: int, rows: int, window: int | None, cap: float | None, sinks: bool
) -> list[float]:
    """Largest differences of output and gradients from whole attention, in fp64, on one rank."""
    dist.init_process_group("gloo")
    try:
        group, heads, groups, dim = dist.group.WORLD, 4, 2, 8
        torch.manual_seed(0)
        shapes = [(width, rows, count, dim) for count in (heads, groups, groups)]
        whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        upstream = torch.randn(width, rows, heads * dim, dtype=torch.float64)
        one, mine = (torch.linspace(-2, 2, heads, dtype=torch.float64).requires_grad_() for _ in range(2))
        expected = _whole(*whole, lengths or [width], window, cap, one if sinks else None)
        expected.backward(upstream)

        ids = torch.arange(width).expand(rows, width)
        borders = torch.tensor([0, *lengths]).cumsum(0).int() if lengths else None
        share = shard_batch(MicroBatch(ids, ids, ids, borders, ()), group).share

        def own(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[piece.first : piece.last] for piece in share.slices])

        parts = [own(x.detach()).requires_grad_() for x in whole]
        output = shared_causal(*parts, share, window=window, cap=cap, sinks=mine if sinks else None)
        output.backward(own(upstream))
        pairs = [(output, own(expected)), *((part.grad, own(x.grad)) for part, x in zip(parts, whole))]
        if sinks:  # each rank has the gradient of its own queries
            dist.all_reduce(mine.grad)
            pairs.append((mine.grad, one.grad))
        return [float((one - other).abs().max()) for one, other in pairs]
    finally:
        dist.destroy_process_group()


def _whole(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    window: int | None,
    cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention written out, sample by sample."""
    repeat = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    near = torch.ones(len(sample), len(sample)).tril().triu(1 - (window or len(sample))).bool()
    seen = (sample[:, None] == sample[None]) & near
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), -1)
    weights = scores.softmax(-1)[..., : len(sample)]
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("lengths", "rows"), [(None, 1), (None, 3), ([5, 1, 13, 5], 1), ([1] * 24, 1), ([23, 1], 1)], ids=str)
def test_shared_attention_is_whole_attention(size: int, lengths: list[int] | None, rows: int, pool: RankPool) -> None:
    # Three ranks look through a window, two have sinks; of three rows the scores are capped.
    window, cap = (4 if size == 3 else None), (1.0 if rows == 3 else None)
    for differences in pool.run(size, _attention, lengths, 24, rows, window, cap, size == 2):
        assert max(differences) < 1e-12


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp(request.param)
    return tiny_start(root, request.param), write_rows(root / "rows.jsonl")


def options(model: tuple[Path, Path], **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = dict(
        resume_from_checkpoint=str(model[0]), dataset=[str(model[1])], max_steps=4, eval_steps=2, dataset_test_ratio=0.1
    )
    return values | more


def test_runs_with_shared_rows_equal_others(model: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """Losses, validation losses and gradient norms, with pipelines and recomputation; validation has a row of one token."""
    plain = train(pool, tmp_path / "plain", 1, **options(model))
    layouts: list[tuple[int, dict[str, Any]]] = [
        (2, dict(cp=2, batch_size=2, padding_free=False)),
        (2, dict(cp=2, deterministic=True)),
        (4, dict(cp=4, gradient_checkpointing=True)),
        (4, dict(cp=2, pp=2, batch_size=2)),
    ]
    for number, (processes, layout) in enumerate(layouts if "llama" in str(model[0]) else layouts[:1]):
        shared = train(pool, tmp_path / str(number), processes, **options(model, **layout))
        assert shared.losses == pytest.approx(plain.losses, abs=1e-5), layout
        assert shared.eval_losses == pytest.approx(plain.eval_losses, abs=1e-5), layout
        assert shared.norms == pytest.approx(plain.norms, rel=2e-5), layout


def test_a_run_goes_on_with_and_without_shared_rows(pool: RankPool, tmp_path: Path) -> None:
    model = tiny_start(tmp_path), write_rows(tmp_path / "rows.jsonl")
    plain = train(pool, tmp_path / "plain", 1, **options(model))
    output = tmp_path / "run"
    for processes, cp, steps in ((2, 2, 1), (1, 1, 2), (4, 2, 4)):
        changes = dict(
            cp=cp, max_steps=steps, resume=True, gradient_accumulation_steps=16 // processes, lr_scheduler_type="constant"
        )
        run = train(pool, output, processes, **options(model, **changes))
    assert run.losses[0] == pytest.approx(plain.losses[0], abs=1e-5)
    straight = train(pool, tmp_path / "straight", 1, **options(model, lr_scheduler_type="constant"))
    assert run.losses == pytest.approx(straight.losses, abs=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"6 processes cannot hold tp 1 x pp 1 x cp 4: 4 are needed"):
        resolved_run(world_size=6, cp=4)
    with pytest.raises(UserError, match="--cp 0 must be at least 1"):
        refuse(layout_problems(tiny.tiny_config("llama"), Parallel(cp=0)))
    with pytest.raises(UserError, match="one attention kernel of its own"):
        resolved_run(cp=2, use_flash_attn=False)
