"""The adapter's operation against plain autograd, with parts of fused rows and dropout; and the masks themselves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.conftest import LIMITS, off

from megaswift.megatron.kernels.counter_dropout import Dropout, token_keys
from megaswift.megatron.kernels.linear_ops import PLAIN
from megaswift.megatron.kernels.lora import LoraCall, Parts, Rows, lora_linear, row_norms, scaled_rows
from megaswift.megatron.lora_layers import rows_of
from megaswift.models.parameters import Arrangement, grouped, stacked, whole

# arrangement of the layer's rows; its Hugging Face tensors that have an adapter
LAYERS = {
    "one": (whole(24, 0), (0,)),
    "gate and up": (stacked(16, 16), (0, 1)),
    "up alone": (stacked(16, 16), (1,)),
    "q, k and v": (grouped(4, 6, 2, 2), (0, 1, 2)),
    "q and v": (grouped(4, 6, 2, 2), (0, 2)),
    "one head": (grouped(1, 6, 2, 2), (1, 2)),
}


@pytest.mark.parametrize("dropped", [0.0, 0.4])
@pytest.mark.parametrize("layer", LAYERS)
def test_is_what_autograd_makes(layer: str, dropped: float, case: tuple[str, torch.dtype]) -> None:
    device, dtype = case
    arrangement, tensors = LAYERS[layer]
    order, rank, tokens, inputs, scale = arrangement.only(tensors), 3, 10, 8, 1.7
    make = lambda *shape: (torch.randn(*shape, device=device) * 0.5).to(dtype)  # noqa: E731
    x, weight, bias = make(5, 2, inputs), make(arrangement.size, inputs), make(arrangement.size)
    a, b = make(len(tensors) * rank, inputs), make(order.size, rank)
    keys = token_keys(torch.arange(tokens, device=device).view(2, 5), seed=3, step=1).t().reshape(-1)
    mask = Dropout(dropped, "some.layer").factors(keys, inputs, dtype) if dropped else torch.ones((), device=device)

    def plain(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen = (x.reshape(tokens, inputs) * mask.to(x)).view_as(x)
        parts = [F.linear(F.linear(seen, a[n * rank : (n + 1) * rank]), half) for n, half in enumerate(order.unpack(b))]
        shapes = [sum(piece.count for piece in arrangement.pieces if piece.tensor == n) for n in range(3)]
        full = [torch.zeros(*x.shape[:-1], rows, dtype=x.dtype, device=x.device) for rows in shapes if rows]
        for number, part in zip(tensors, parts):
            full[number] = part
        fused = arrangement.pack([part.movedim(-1, 0) for part in full]).movedim(0, -1)
        return F.linear(x, weight.to(x), bias.to(x)) + scale * fused

    call = LoraCall(
        Parts(rows_of(arrangement, tensors, 1), rows_of(order, range(len(tensors)), 1)), scale, PLAIN,
        dropout=Dropout(dropped, "some.layer") if dropped else None,
    )  # fmt: skip
    ours = [part.clone().requires_grad_() for part in (x, a, b)]
    theirs = [part.double().requires_grad_() for part in (x, a, b)]
    got = lora_linear(ours[0], weight, bias, ours[1], ours[2], keys if dropped else None, call)
    want = plain(*theirs)
    grad = make(*got.shape)
    got.backward(grad)
    want.backward(grad.double())
    assert off(got, want) < LIMITS[dtype]
    for name, one, other in zip("xab", ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        assert off(one.grad, other.grad) < LIMITS[dtype], name


@pytest.mark.parametrize("dropped", [0.0, 0.4])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("add", [True, False])
def test_of_gate_and_up(add: bool, adapted: bool, dropped: float, case: tuple[str, torch.dtype]) -> None:
    """[gate, up] goes in, silu(gate) * up is multiplied; and the same gradients where the result is not asked for."""
    device, dtype = case
    rank, tokens, inputs, size, scale = 3, 10, 8, 24, 1.7
    make = lambda *shape: (torch.randn(*shape, device=device) * 0.5).to(dtype)  # noqa: E731
    both, weight, residual, grad = make(5, 2, 2 * inputs), make(size, inputs), make(5, 2, size), make(5, 2, size)
    a, b = make(rank, inputs), make(size, rank)
    keys = token_keys(torch.arange(tokens, device=device).view(2, 5), seed=3, step=1).t().reshape(-1)
    dropout = Dropout(dropped, "some.layer") if dropped else None
    mask = dropout.factors(keys, inputs, dtype) if dropout else torch.ones((), device=device)

    def made(needed: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        ours = [part.clone().requires_grad_() for part in (both, residual, a, b)]
        call = LoraCall(
            Parts((Rows(1, size, 0, size),), (Rows(1, size, 0, size),)),
            scale,
            PLAIN,
            dropout=dropout,
            gated=True,
            needed=needed,
        )
        halves = (ours[2], ours[3]) if adapted else (None, None)
        got = lora_linear(ours[0] * 1, weight, None, *halves, keys if dropped else None, call, ours[1] if add else None)
        got.backward(grad)
        return got, [part.grad for part in ours if part.grad is not None]

    theirs = [part.double().requires_grad_() for part in (both, residual, a, b)]
    gate, up = theirs[0].chunk(2, -1)
    hidden = F.silu(gate) * up
    want = F.linear(hidden, weight.double()) + (theirs[1] if add else 0.0)
    if adapted:
        want = want + scale * F.linear(
            F.linear((hidden.view(tokens, -1) * mask.double()).view_as(hidden), theirs[2]), theirs[3]
        )
    want.backward(grad.double())
    got, gradients = made(True)
    assert off(got, want) < LIMITS[dtype]
    wanted = [part.grad for part in theirs if part.grad is not None]
    assert len(gradients) == len(wanted) == 1 + add + 2 * adapted
    for one, other in zip(gradients, wanted, strict=True):
        assert off(one, other) < LIMITS[dtype]
    for one, other in zip(made(False)[1], gradients, strict=True):
        assert torch.equal(one, other)


def test_masks_are_fair_and_independent() -> None:
    """Shares of kept features of tokens, features, steps, modules and seeds; and no two of them alike."""
    origins = (torch.arange(7)[:, None] << 32) + torch.arange(300)[None]
    drop = Dropout(0.3, "decoder.layers.0.mlp.linear_fc1")
    keys = token_keys(origins, seed=1, step=5)
    first = drop.factors(keys.reshape(-1), 128, torch.float32)
    kept = (first > 0).double()
    assert first[first > 0].unique().tolist() == pytest.approx([1 / 0.7])
    assert float(kept.mean()) == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / kept.numel()))
    for axis, count in ((0, kept.shape[0]), (1, kept.shape[1])):
        means = kept.mean(axis)
        assert float((means - 0.7).abs().max()) < 6 * math.sqrt(0.21 / count)
    others = {
        "step": drop.factors(token_keys(origins, 1, 6).reshape(-1), 128, torch.float32),
        "seed": drop.factors(token_keys(origins, 2, 5).reshape(-1), 128, torch.float32),
        "module": Dropout(0.3, "decoder.layers.1.mlp.linear_fc1").factors(keys.reshape(-1), 128, torch.float32),
        "token": first.roll(1, 0),
        "feature": first.roll(1, 1),
        "row": first.roll(300, 0),
    }
    for name, other in others.items():
        both = float(((other > 0).double() * kept).mean())
        assert both == pytest.approx(0.49, abs=0.01), f"another {name} has a mask of its own"


def test_a_mask_is_known_by_token_and_feature_alone() -> None:
    """Another order of tokens, and a part of the features, give the parts of the same mask."""
    origins = (torch.tensor([5, 9])[:, None] << 32) + torch.arange(40)[None]
    whole = Dropout(0.5, "layer").factors(token_keys(origins, 1, 0).reshape(-1), 64, torch.float32)
    turned = Dropout(0.5, "layer").factors(token_keys(origins.flip(0, 1), 1, 0).reshape(-1), 64, torch.float32)
    assert torch.equal(turned.flip(0), whole)
    part = Dropout(0.5, "layer", first=16).factors(token_keys(origins, 1, 0).reshape(-1), 32, torch.float32)
    assert torch.equal(part, whole[:, 16:48])


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_of_their_own_length(layer: str, case: tuple[str, torch.dtype]) -> None:
    """Norms of W + s B A without that matrix, and products whose rows have trained lengths: the norms are constants."""
    device, dtype = case
    arrangement, tensors = LAYERS[layer]
    order, rank, inputs = arrangement.only(tensors), 3, 8
    make = lambda *shape: (torch.randn(*shape, device=device) * 0.5).to(dtype)  # noqa: E731
    weight, a, b = make(arrangement.size, inputs), make(len(tensors) * rank, inputs), make(order.size, rank)
    call = LoraCall(Parts(rows_of(arrangement, tensors, 1), rows_of(order, range(len(tensors)), 1)), 1.7, PLAIN)
    halves = [half.double() @ a[n * rank : (n + 1) * rank].double() for n, half in enumerate(order.unpack(b))]
    added = order.pack(halves)
    rows = torch.cat([row[None] for row, tensor in zip(weight, _tensors(arrangement)) if tensor in tensors])
    norms = row_norms(weight, a, b, call, None)
    assert off(norms, (rows.double() + 1.7 * added).norm(dim=1)) < LIMITS[dtype]
    y, magnitude = make(4, 2, arrangement.size), make(order.size)
    ours, theirs = ([part.clone().to(kind).requires_grad_() for part in (y, magnitude)] for kind in (dtype, torch.float64))
    got = scaled_rows(ours[0], ours[1], norms, call.parts)
    factors, place = [], iter(theirs[1] / norms.double())
    for tensor in _tensors(arrangement):
        factors.append(next(place) if tensor in tensors else torch.ones((), dtype=torch.float64, device=device))
    want = theirs[0] * torch.stack(factors)
    grad = make(*got.shape)
    got.backward(grad)
    want.backward(grad.double())
    for one, other in zip((got, *(part.grad for part in ours)), (want, *(part.grad for part in theirs)), strict=True):
        assert one is not None and other is not None and off(one, other) < LIMITS[dtype]


def _tensors(arrangement: Arrangement) -> list[int]:
    """Which tensor each row of the whole belongs to."""
    return [piece.tensor for piece in arrangement.pieces for _ in range(piece.count)]
