"""Dense and packed causal attention with grouped heads, against plain softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.conftest import check, double, leaf

from megaswift.engine.kernels.attention import dense_causal, packed_causal


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[s, b, heads, d] and [s, b, kv, d] to [s, b, heads * d]."""
    s, b, heads, _ = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) * scale
    scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v).reshape(s, b, -1)


@pytest.mark.parametrize(("s", "b", "heads", "groups", "dim"), [(33, 2, 4, 2, 16), (65, 1, 3, 1, 64), (17, 3, 2, 2, 128)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_dense(case, s, b, heads, groups, dim, scale, backend):
    q, k, v = (leaf(s, b, n, dim, like=case) for n in (heads, groups, groups))
    y = dense_causal(q, k, v, scale, backend=backend)
    grad = torch.randn_like(y)
    y.backward(grad)
    a, b_, c = double(q), double(k), double(v)
    want = plain(a, b_, c, dim**-0.5 if scale is None else scale)
    want.backward(grad.double())
    check(y, want, case[1])
    for got, expected in ((q, a), (k, b_), (v, c)):
        check(got.grad, expected.grad, case[1], slack=2)


def test_dense_without_gradient(case):
    q, k, v = (leaf(20, 2, 2, 16, like=case).detach() for _ in range(3))
    check(dense_causal(q, k, v), plain(q.double(), k.double(), v.double(), 0.25), case[1])


@pytest.mark.parametrize("lengths", [[5, 1, 30, 2], [17], [3, 3, 3]])
def test_packed(case, lengths):
    total = sum(lengths)
    q, k, v = (leaf(total, 1, n, 32, like=case) for n in (4, 2, 2))
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=case[0])
    y = packed_causal(q, k, v, edges, max(lengths), 0.2)
    assert y.shape == (total, 1, 128)
    grad = torch.randn_like(y)
    y.backward(grad)
    a, b, c = double(q), double(k), double(v)
    want = torch.cat([plain(*one, 0.2) for one in zip(*(x.split(lengths) for x in (a, b, c)))])
    want.backward(grad.double())
    check(y, want, case[1])
    for got, expected in ((q, a), (k, b), (v, c)):
        check(got.grad, expected.grad, case[1], slack=2)
