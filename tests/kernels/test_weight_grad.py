"""The linear layer that adds its weight gradient to main_grad, and the buffers' protocol around it."""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.kernels.conftest import check, double, leaf

from megaswift.megatron.kernels.embedding import embedding
from megaswift.megatron.kernels.main_grad import add_product, settle_main_grads, zero_main_grads
from megaswift.megatron.kernels.weight_grad import linear


def with_main_grad(weight, value=0.0):
    weight.main_grad = torch.full(weight.shape, value, device=weight.device)
    weight.grad_added_to_main_grad = False
    return weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("main", [True, False])
def test_linear(case, bias, main):
    x, w, b = leaf(9, 2, 16, like=case), leaf(24, 16, like=case), leaf(24, like=case)
    if main:
        with_main_grad(w, 0.5)
        with_main_grad(b, 0.5)
    y = linear(x, w, b if bias else None)
    grad = torch.randn_like(y)
    y.backward(grad)
    a, c, d = double(x), double(w), double(b)
    want = a @ c.t() + (d if bias else 0)
    want.backward(grad.double())
    check(y, want, case[1])
    check(x.grad, a.grad, case[1])
    check(w.main_grad - 0.5 if main else w.grad, c.grad, case[1])
    if bias:
        check(b.main_grad - 0.5 if main else b.grad, d.grad, case[1])


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_add_product(case, overwrite, alpha):
    g, x = leaf(40, 8, like=case).detach(), leaf(40, 16, like=case).detach()
    target = torch.full((8, 16), float("nan") if overwrite else 2.0, device=case[0])
    add_product(target, g, x, overwrite=overwrite, alpha=alpha)
    check(target, alpha * g.double().t() @ x.double() + (0.0 if overwrite else 2.0), case[1])


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_add_product_of_half_precision_in_full(case, overwrite, alpha):
    g, x = (leaf(40, n, like=case).detach().bfloat16() for n in (8, 16))
    target = torch.full((8, 16), float("nan") if overwrite else 2.0, device=case[0])
    add_product(target, g, x, overwrite=overwrite, alpha=alpha)
    assert target.dtype == torch.float32
    check(target, alpha * g.double().t() @ x.double() + (0.0 if overwrite else 2.0), torch.bfloat16)


def test_one_step_without_zeroing(case):
    x, used, idle, plain = leaf(4, 1, 8, like=case), leaf(8, 8, like=case), leaf(8, 8, like=case), leaf(3, like=case)
    ddp = SimpleNamespace(params_with_grad=[used, idle, plain], bucket_groups=[], expert_parallel_bucket_groups=[])
    for weight in ddp.params_with_grad:
        with_main_grad(weight, 7.0)
    zero_main_grads(ddp)  # nothing is known yet: all are cleared
    assert not used.main_grad.any()
    for weight in (used, idle):
        linear(x, weight).sum().backward()
    first = used.main_grad.clone()
    plain.main_grad.fill_(7.0)
    zero_main_grads(ddp)
    assert used.main_grad_stale and not plain.main_grad.any()
    linear(x, used).sum().backward()
    settle_main_grads(ddp)
    check(used.main_grad, first, torch.float32)
    assert not idle.main_grad.any()


@pytest.mark.parametrize("main", [True, False])
def test_embedding(case, main):
    ids, w = torch.randint(0, 30, (7, 3), device=case[0]), leaf(12, 20, like=case)
    if main:
        with_main_grad(w)
    y = embedding(ids, w, first_row=10, partial=True)
    grad = torch.randn_like(y)
    y.backward(grad)
    here = (ids >= 10) & (ids < 22)
    want = torch.where(here.unsqueeze(-1), w.detach()[(ids - 10).clamp(0, 11)], torch.zeros((), dtype=w.dtype, device=case[0]))
    assert torch.equal(y, want)
    expected = torch.zeros(12, 20, dtype=torch.float64, device=case[0]).index_add_(0, (ids - 10)[here], grad[here].double())
    check(w.main_grad if main else w.grad, expected, case[1])


def _rank(rank: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(3)
    x, w = torch.randn(6, 2, 8), torch.randn(10, 8)
    out = []
    for sequence in (False, True):
        mine = (x.chunk(2)[rank] if sequence else x).clone().requires_grad_()
        shard = with_main_grad(w.chunk(2)[rank].clone().requires_grad_())
        y = linear(mine, shard, reduce_input_grad=not sequence, sequence_parallel=sequence, tp_group=dist.group.WORLD)
        y.pow(2).sum().backward()
        out.append((y.detach(), mine.grad, shard.main_grad))
    torch.save(out, f"{result}/{rank}")
    dist.destroy_process_group()


def test_column_parallel_over_two_ranks():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (os.path.join(folder, "store"), folder), nprocs=2)
        parts = [torch.load(f"{folder}/{rank}") for rank in range(2)]
    torch.manual_seed(3)
    x, w = torch.randn(6, 2, 8).double().requires_grad_(), torch.randn(10, 8).double().requires_grad_()
    y = x @ w.t()
    y.pow(2).sum().backward()
    for way in range(2):
        check(torch.cat([part[way][0] for part in parts], -1), y, torch.float32)
        check(torch.cat([part[way][2] for part in parts]), w.grad, torch.float32)
    for part in parts:
        check(part[0][1], x.grad, torch.float32)
    check(torch.cat([part[1][1] for part in parts]), x.grad, torch.float32)
