"""Attention with sinks, dense, packed and from slices of shared rows, with windows and caps, against softmax written out in fp64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.conftest import check, double, leaf

from megaswift.megatron.kernels import block_attention
from megaswift.megatron.kernels.attention import Lengths, dense_causal, packed_causal, varlen_causal


def plain(q, k, v, sinks, scale, window=None, cap=None):
    """[queries, heads, d] and [keys, kv, d] to [queries, heads, d]; the last query stands beside the last key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    distance = (torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0] - torch.arange(k.shape[0])).to(q.device)
    seen = (distance >= 0) & (distance < (window or k.shape[0]))
    with_one = torch.cat((scores.masked_fill(~seen, float("-inf")), sinks.view(-1, 1, 1).expand(-1, q.shape[0], 1)), -1)
    return torch.einsum("hqk,khd->qhd", with_one.softmax(-1)[..., :-1], v)


def made(case, queries, keys, rows=None):
    shapes = [(queries, 4, 16), (keys, 2, 16), (keys, 2, 16)]
    leaves = [leaf(*(shape if rows is None else (shape[0], rows, *shape[1:])), like=case) for shape in shapes] + [
        leaf(4, like=case)
    ]
    return leaves, [double(one) for one in leaves]


def same(got, want, leaves, exact, dtype):
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    check(got, want, dtype)
    for one, other in zip(leaves, exact, strict=True):
        check(one.grad, other.grad, dtype, slack=2)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (7, None), (7, 2.0)], ids=str)
@pytest.mark.parametrize("block", [5, 256])
def test_rows(case, window, cap, block, monkeypatch):
    monkeypatch.setattr(block_attention, "_QUERIES", block)
    leaves, exact = made(case, 33, 33, rows=3)
    got = dense_causal(*leaves[:3], 0.3, window=window, cap=cap, sinks=leaves[3])
    rows = [plain(*(x[:, row] for x in exact[:3]), exact[3], 0.3, window, cap) for row in range(3)]
    same(got, torch.stack(rows, 1).flatten(2), leaves, exact, case[1])


@pytest.mark.parametrize("window", [None, 5])
def test_packed_rows(case, window):
    lengths = [1, 30, 2, 14]
    leaves, exact = made(case, 47, 47, rows=1)
    edges = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(case[0])
    got = packed_causal(*leaves[:3], edges, 30, 0.3, window=window, sinks=leaves[3])
    samples = zip(*(x.squeeze(1).split(lengths) for x in exact[:3]))
    want = torch.cat([plain(*one, exact[3], 0.3, window) for one in samples]).flatten(1).unsqueeze(1)
    same(got, want, leaves, exact, case[1])


def test_slices_of_shared_rows(case):
    queries, keys = [3, 9], [12, 9]
    leaves, exact = made(case, sum(queries), sum(keys))
    got = varlen_causal(*leaves[:3], Lengths.of(queries, keys, leaves[0].device), 0.3, sinks=leaves[3])
    parts = zip(exact[0].split(queries), exact[1].split(keys), exact[2].split(keys))
    same(got, torch.cat([plain(*one, exact[3], 0.3) for one in parts]), leaves, exact, case[1])


def test_a_sink_far_above_all_scores_takes_everything(case):
    leaves, _ = made(case, 9, 9, rows=1)
    with torch.no_grad():
        leaves[3].fill_(80.0)
    got = dense_causal(*leaves[:3], sinks=leaves[3])
    got.sum().backward()
    assert got.abs().max() < 1e-6 and all(one.grad.isfinite().all() for one in leaves)
