"""Dense and packed causal attention with grouped heads, against plain softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.conftest import check, double, leaf

from megaswift.megatron.kernels import attention
from megaswift.megatron.kernels.attention import Lengths, _by_sample, dense_causal, packed_causal, varlen_causal


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("heads", "groups", "dim"), [(14, 2, 64), (12, 2, 128), (4, 4, 80), (4, 1, 96)])
@pytest.mark.parametrize(("queries", "keys"), [([5, 300, 17], [5, 700, 80]), ([1024], [4096]), ([100, 1, 333], [100, 1, 333])])
def test_unequal_lengths_at_real_sizes(heads, groups, dim, queries, keys):
    """What packed rows and slices of shared rows go through on a GPU, FlashAttention 4 included where it is installed."""
    make = lambda total, n: torch.randn(total, n, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # noqa: E731
    q, k, v = make(sum(queries), heads), make(sum(keys), groups), make(sum(keys), groups)
    y = varlen_causal(q, k, v, Lengths.of(queries, keys, q.device), dim**-0.5)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want = _by_sample(*exact, queries, keys, dim**-0.5)
    want.backward(grad.float())
    for got, wanted in ((y, want), *((a.grad, b.grad) for a, b in zip((q, k, v), exact))):
        assert float((got.float() - wanted).norm() / wanted.norm()) < 8e-3


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "varlen"])
def test_a_gpu_without_the_flash_kernel(packed, monkeypatch):
    """Before Ampere packed rows go sample by sample, as in fp32; the flash kernel would end the run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(attention, "_packed", lambda *_: pytest.fail("the flash kernel was called"))
    attention._has_flash.cache_clear()
    lengths = [3, 1, 5]
    q, k, v = (torch.randn(9, 1, heads, 16).half().as_subclass(OnGpu) for heads in (4, 2, 2))
    cu = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    if packed:
        mixed = packed_causal(q, k, v, cu, 5)
    else:
        mixed = varlen_causal(q[:, 0], k[:, 0], v[:, 0], Lengths.of(lengths, lengths, torch.device("cpu"))).reshape(9, 1, -1)
    plain_parts = zip(*(part.as_subclass(torch.Tensor).split(lengths) for part in (q, k, v)))
    want = torch.cat([plain(*(part.double() for part in parts), 0.25) for parts in plain_parts])
    check(mixed.as_subclass(torch.Tensor), want, torch.bfloat16)
    assert attention.describe(q, 2, packed=True) == "PyTorch's own choice for this GPU, sample by sample"
    attention._has_flash.cache_clear()
