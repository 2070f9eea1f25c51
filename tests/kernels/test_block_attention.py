"""Windows and caps of scores, dense, packed and from slices of shared rows, against softmax written out in fp64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.conftest import check, double, leaf

from megaswift.megatron.kernels import block_attention
from megaswift.megatron.kernels.attention import Lengths, dense_causal, packed_causal, varlen_causal
from megaswift.megatron.kernels.block_attention import block_causal


def plain(q, k, v, scale, window, cap):
    """[queries, heads, d] and [keys, kv, d] to [queries, heads, d]; the last query stands beside the last key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    distance = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0] - torch.arange(k.shape[0])
    seen = (distance >= 0) & (distance < (window or k.shape[0]))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen.to(q.device), float("-inf")).softmax(-1), v)


def same(got, want, leaves, exact, dtype):
    """Results and, from a random gradient, gradients."""
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    check(got, want, dtype)
    for one, other in zip(leaves, exact):
        check(one.grad, other.grad, dtype, slack=2)


LIMITS = [(None, 2.0), (2, None), (7, None), (7, 2.0), (33, None), (300, 1.5)]


@pytest.mark.parametrize(("window", "cap"), LIMITS, ids=str)
@pytest.mark.parametrize("block", [5, 16, 256])
def test_rows(case, window, cap, block, monkeypatch):
    monkeypatch.setattr(block_attention, "_QUERIES", block)
    leaves = [leaf(33, 2, n, 16, like=case) for n in (4, 2, 2)]
    exact = [double(x) for x in leaves]
    got = dense_causal(*leaves, 0.3, window=window, cap=cap)
    rows = [plain(*(x[:, row] for x in exact), 0.3, window, cap) for row in range(2)]
    same(got, torch.stack(rows, 1).flatten(2), leaves, exact, case[1])


@pytest.mark.parametrize(("window", "cap"), LIMITS, ids=str)
def test_packed_rows(case, window, cap):
    lengths = [5, 1, 30, 9]
    leaves = [leaf(45, 1, n, 16, like=case) for n in (4, 2, 2)]
    exact = [double(x) for x in leaves]
    edges = torch.tensor([0, 5, 6, 36, 45], dtype=torch.int32, device=case[0])
    got = packed_causal(*leaves, edges, 30, 0.3, window=window, cap=cap)
    parts = zip(*(x[:, 0].split(lengths) for x in exact))
    same(got, torch.cat([plain(*part, 0.3, window, cap) for part in parts]).flatten(1).unsqueeze(1), leaves, exact, case[1])


@pytest.mark.parametrize(("window", "cap"), LIMITS, ids=str)
def test_the_last_tokens_of_samples(case, window, cap):
    """What a slice of rows that several ranks share attends to."""
    queries, keys = [5, 1, 12], [5, 20, 31]
    leaves = [leaf(18, 4, 16, like=case), leaf(56, 2, 16, like=case), leaf(56, 2, 16, like=case)]
    exact = [double(x) for x in leaves]
    got = varlen_causal(*leaves, Lengths.of(queries, keys, leaves[0].device), 0.3, window=window, cap=cap)
    parts = zip(exact[0].split(queries), *(x.split(keys) for x in exact[1:]))
    same(got, torch.cat([plain(*part, 0.3, window, cap) for part in parts]), leaves, exact, case[1])


def test_a_window_one_token_short():
    """It is no window as long as the sample, where faster kernels run."""
    leaves = [torch.randn(9, 1, 2, 8, dtype=torch.float64) for _ in range(3)]
    got = dense_causal(*leaves, window=8)
    assert not torch.allclose(got, dense_causal(*leaves)) and torch.equal(
        dense_causal(*leaves, window=9), dense_causal(*leaves)
    )


def test_in_double_precision():
    leaves = [torch.randn(1, 40, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    exact = [x.detach().clone().requires_grad_() for x in leaves]
    got = block_causal(*leaves, window=9, cap=1.0)
    same(got, plain(*(x[0] for x in exact), 8**-0.5, 9, 1.0).unsqueeze(0), leaves, exact, torch.float64)


def test_memory_is_linear_with_a_window():
    """No block sees more than its queries and the window before them."""
    how = block_attention._Scores(1.0, 100, None)
    blocks = list(how.blocks(10_000, 12_000))
    assert [queries.start for queries, _, _ in blocks] == list(range(0, 10_000, 256))
    assert max(keys.stop - keys.start for _, keys, _ in blocks) == 256 + 99
    assert blocks[-1][1].stop == 12_000


class OnGpu(torch.Tensor):
    is_cuda = True


def test_what_the_user_is_told(monkeypatch):
    from megaswift.megatron.kernels import attention

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    for cached in (attention._has_flash, attention._is_hopper):
        cached.cache_clear()
    query = torch.randn(2, 2, 4, 64).bfloat16().as_subclass(OnGpu)
    assert attention.describe(query, 2, packed=False, window=True) == "PyTorch's flash kernel"
    assert "the slow way" in attention.describe(query, 2, packed=True, cap=50.0)
    assert "the slow way" in attention.describe(query.float(), 2, packed=True, window=True)
    for cached in (attention._has_flash, attention._is_hopper):
        cached.cache_clear()
