"""The chunked output layer and loss against logits and F.cross_entropy in fp64, alone and over two gloo ranks."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tests.kernels.conftest import check, double, leaf

from megaswift.megatron.kernels.linear_cross_entropy import linear_cross_entropy


def batch(case, tokens=301, hidden=24, rows=130, real=117, keep=0.6):
    h, w = leaf(tokens, hidden, like=case), leaf(rows, hidden, like=case, scale=0.5)
    labels = torch.randint(0, real, (tokens,))
    labels[torch.rand(tokens) > keep] = -100
    return h, w, labels


def reference(h, w, labels, real, factor, factors=1.0, cap=None):
    a, b = double(h), double(w)
    logits = a @ b[:real].t()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = (F.cross_entropy(logits, labels.to(a.device), ignore_index=-100, reduction="none") * factors).sum()
    (loss * factor).backward()
    return loss, a.grad, b.grad


@pytest.mark.parametrize("promised", [True, False])
@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("keep", [0.6, 1.1, 0.0])
def test_sum(case, promised, main, keep):
    h, w, labels = batch(case, keep=keep)
    if main:
        w.main_grad = torch.full(w.shape, 0.25, device=case[0])
        w.grad_added_to_main_grad = False
    loss, count = linear_cross_entropy(
        h, w, labels, vocab_size=117, grad_scale=0.37 if promised else None, chunk_bytes=128 * 130 * h.element_size()
    )
    (loss * 0.37).backward()
    want, dh, dw = reference(h, w, labels, 117, 0.37)
    assert int(count) == int((labels != -100).sum())
    check(loss, want, case[1])
    check(h.grad, dh, case[1])
    check(w.main_grad - 0.25 if main else w.grad, dw, case[1])
    if main:
        assert w.grad_added_to_main_grad
        assert torch.equal(w.main_grad[117:], torch.full((13, 24), 0.25, device=case[0]))


@pytest.mark.parametrize("form", ["sum", "main", "factors", "none"])
def test_capped_logits(case, form):
    """With chunks of several rows; padding of the vocabulary takes no part."""
    h, w, labels = batch(case)
    factors = torch.rand(301) if form == "factors" else None
    options = dict(vocab_size=117, chunk_bytes=128 * 130 * h.element_size(), cap=1.5, factors=factors)
    if form == "main":
        w.main_grad, w.grad_added_to_main_grad = torch.zeros(w.shape, device=case[0]), False
        options["grad_scale"] = 0.37
    want, dh, dw = reference(h, w, labels, 117, 0.37, 1.0 if factors is None else factors.double().to(case[0]), cap=1.5)
    if form == "none":
        losses, _ = linear_cross_entropy(h, w, labels, reduction="none", **options)
        check(losses.sum(), want, case[1])
        return
    loss, _ = linear_cross_entropy(h, w, labels, **options)
    (loss * 0.37).backward()
    check(loss, want, case[1])
    check(h.grad, dh, case[1], slack=2)
    check(w.main_grad if form == "main" else w.grad, dw, case[1], slack=2)


@pytest.mark.parametrize("likely", [False, True])
@pytest.mark.parametrize("rows", [2, 7, 200])
def test_a_large_vocabulary_loses_no_digits(rows, likely):
    """As in trained models tokens' rows have a common direction; in the second case one token is far likelier than the others."""
    torch.manual_seed(5)
    before, vocab = torch.get_num_threads(), 49152
    weight, hidden = torch.randn(vocab, 64) + torch.randn(64), torch.randn(rows, 64) * 0.8
    if likely:
        hidden = hidden * 0.1 + 0.1
        weight[17] = 2.5  # a logit of 16
    for tensor in (weight, hidden):
        tensor.requires_grad_()
    labels = torch.randint(0, vocab, (rows,))
    torch.set_num_threads(2)  # with one MKL adds up otherwise
    try:
        loss, _ = linear_cross_entropy(hidden, weight, labels)
        loss.backward()
    finally:
        torch.set_num_threads(before)
    want, dh, dw = reference(hidden, weight, labels, vocab, 1.0)
    for have, exact in ((loss, want), (hidden.grad, dh), (weight.grad, dw)):
        assert (have.double() - exact).norm() < 4e-6 * exact.norm()


def test_first_product_overwrites_a_stale_buffer(case):
    h, w, labels = batch(case)
    w.main_grad = torch.full(w.shape, float("nan"), device=case[0])
    w.grad_added_to_main_grad, w.main_grad_stale = False, True
    loss, _ = linear_cross_entropy(h, w, labels, vocab_size=117, grad_scale=1.0)
    loss.backward()
    check(w.main_grad, reference(h, w, labels, 117, 1.0)[2], case[1])


@pytest.mark.parametrize("promised", [True, False])
def test_a_factor_for_each_row(case, promised):
    h, w, labels = batch(case)
    factors = torch.rand(len(labels)) * 3
    loss, count = linear_cross_entropy(
        h, w, labels, vocab_size=117, grad_scale=0.37 if promised else None, factors=factors, chunk_bytes=128 * 130 * 4
    )
    (loss * 0.37).backward()
    want, dh, dw = reference(h, w, labels, 117, 0.37, factors.to(h.device))
    assert int(count) == int((labels != -100).sum())
    check(loss, want, case[1])
    check(h.grad, dh, case[1])
    check(w.grad, dw, case[1])
    each, _ = linear_cross_entropy(h, w, labels, vocab_size=117, factors=factors, reduction="none")
    check(each.sum(), want, case[1])


def test_each_token(case):
    h, w, labels = batch(case)
    losses, _ = linear_cross_entropy(h, w, labels, vocab_size=117, reduction="none", chunk_bytes=1)
    want = F.cross_entropy(h.double() @ w.double()[:117].t(), labels.to(h.device), ignore_index=-100, reduction="none")
    assert not losses.requires_grad and torch.equal(losses == 0, (labels == -100).to(h.device))
    check(losses, want, case[1])


def test_frozen_weight_and_frozen_hidden(case):
    h, w, labels = batch(case)
    linear_cross_entropy(h, w.detach(), labels, vocab_size=117)[0].backward()
    linear_cross_entropy(h.detach(), w, labels, vocab_size=117)[0].backward()
    _, dh, dw = reference(h, w, labels, 117, 1.0)
    check(h.grad, dh, case[1])
    check(w.grad, dw, case[1])


def test_extreme_logits_stay_finite(case):
    h = torch.full((4, 2), 50.0, device=case[0]).to(case[1]).requires_grad_()
    w = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]], device=case[0]).to(case[1]).requires_grad_()
    loss, _ = linear_cross_entropy(h, w, torch.tensor([0, 1, 2, 1]))
    loss.backward()
    check(loss, torch.tensor(500.0), case[1])
    assert torch.isfinite(h.grad).all() and torch.isfinite(w.grad).all()


def test_broken_promise_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("a device-side assertion ends the process")
    h, w, labels = batch(("cpu", torch.float32))
    loss, _ = linear_cross_entropy(h, w, labels, grad_scale=1.0)
    with pytest.raises(RuntimeError, match="grad_scale"):
        (loss * 2).backward()


def _rank(rank: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(5)
    h, w, labels = batch(("cpu", torch.float32), rows=160, real=70)  # rank 1 holds padding only
    factors = torch.arange(len(labels)) % 3 + 0.5
    mine = w.detach().chunk(2)[rank].clone().requires_grad_()
    mine.main_grad, mine.grad_added_to_main_grad = torch.zeros_like(mine), False
    loss, _ = linear_cross_entropy(
        h,
        mine,
        labels,
        vocab_start=80 * rank,
        vocab_size=70,
        tp_group=dist.group.WORLD,
        grad_scale=1.0,
        factors=factors,
        chunk_bytes=128 * 80 * 4,
    )
    loss.backward()
    losses, _ = linear_cross_entropy(
        h, mine, labels, vocab_start=80 * rank, vocab_size=70, tp_group=dist.group.WORLD, factors=factors, reduction="none"
    )
    torch.save((loss.detach(), h.grad, mine.main_grad, losses.sum()), f"{result}/{rank}")
    dist.destroy_process_group()


def test_vocabulary_split_over_two_ranks():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (os.path.join(folder, "store"), folder), nprocs=2)
        parts = [torch.load(f"{folder}/{rank}") for rank in range(2)]
    torch.manual_seed(5)
    h, w, labels = batch(("cpu", torch.float32), rows=160, real=70)
    loss, dh, dw = reference(h, w, labels, 70, 1.0, torch.arange(len(labels)) % 3 + 0.5)
    for part in parts:
        check(part[0], loss, torch.float32)
        check(part[3], loss, torch.float32)
        check(part[1], dh, torch.float32)
    check(torch.cat([part[2] for part in parts]), dw, torch.float32)
