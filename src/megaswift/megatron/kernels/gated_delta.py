"""The gated delta rule over samples that lie one after the other, chunk by chunk, in PyTorch's operations: every sample begins anew.

For each head and token, with state S [dk, dv], decay g <= 0 and rate beta (https://arxiv.org/abs/2412.06464):

    S = exp(g) S;  S = S + k (beta (v - k S))^T;  o = q S

Within a chunk, with G the sum of g from its first token on, D_ij = exp(G_i - G_j) for i >= j, and A_ij = beta_i k_i.k_j D_ij for
i > j, the tokens' updates are (https://arxiv.org/abs/2406.06484)

    V' = T (beta v) - T (beta exp(G) k) S,  T = (1 + A)^-1;  o = exp(G) q S + (q k^T * D) V';  S' = exp(G_last) S + (exp(G_last - G) k)^T V'

so that only S goes from chunk to chunk. Samples go side by side: the loop is as long as the longest sample has chunks.
Products are in fp32 or wider. The backward pass makes a chunk's matrices again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class _Order:
    """Where tokens stand in chunks: first those that begin samples, then those that come second, and so on.

    Args:
        rows: int64 [chunks * CHUNK], the token at each place; those behind a sample's end are the row of zeros, number t.
        places: int64 [t], the other direction.
        active: how many samples have a first chunk, a second, and so on.
    """

    rows: Tensor
    places: Tensor
    active: list[int]

    @classmethod
    @functools.lru_cache(maxsize=8)  # layers of a micro batch ask for the same
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> _Order:
        counts = torch.tensor([-(-length // CHUNK) for length in lengths])
        sizes, starts = torch.tensor(lengths), torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        order = counts.argsort(descending=True, stable=True)
        active = [int((counts > step).sum()) for step in range(int(counts.max()))]
        within = torch.arange(CHUNK)
        rows = []
        for step, count in enumerate(active):
            own = order[:count]
            place = step * CHUNK + within  # of a token in its sample
            rows.append(torch.where(place < sizes[own, None], starts[own, None] + place, int(sizes.sum())))
        flat = torch.cat(rows).flatten()
        places = torch.empty(int(sizes.sum()) + 1, dtype=torch.int64)
        places[flat] = torch.arange(len(flat))
        return cls(flat.to(device), places[:-1].to(device), active)

    def chunks(self, x: Tensor) -> Tensor:
        """x [t, heads, ...] to [chunks, heads, CHUNK, ...]."""
        padded = torch.cat((x, x.new_zeros((1, *x.shape[1:]))))
        return padded[self.rows].unflatten(0, (-1, CHUNK)).transpose(1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """The other direction."""
        return x.transpose(1, 2).flatten(0, 1)[self.places]


@dataclass
class _Chunks:
    """What is made of chunks by themselves; heads are [key heads, value heads of each] everywhere, tokens of a chunk C.

    Args:
        q, k: [n, key heads, 1, C, dk]; v: [n, key heads, r, C, dv].
        rate, growth: beta and G, [n, key heads, r, C, 1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    growth: Tensor

    def __post_init__(self) -> None:
        later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=self.q.device).triu(1)
        between = (self.growth - self.growth.transpose(-1, -2)).masked_fill_(later, float("-inf"))
        self.decay = between.exp_()  # D
        self.alike = self.k @ self.k.transpose(-1, -2)
        system = (self.rate * self.alike).mul_(self.decay)
        one = torch.eye(CHUNK, dtype=system.dtype, device=system.device).expand_as(system)
        self.inverse = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)  # T
        self.seen = self.q @ self.k.transpose(-1, -2)
        self.mixing = self.seen * self.decay
        self.grown = self.growth.exp()
        self.last = self.growth[..., -1:, :]
        self.left = (self.last - self.growth).exp()
        self.keys = self.left * self.k
        self.updates = self.inverse @ (self.rate * self.v)
        self.answers = self.inverse @ (self.rate * self.grown * self.k)

    def scan(self, active: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The states [n, key heads, r, dk, dv] before each chunk, and its updates V'."""
        n, heads, each, _, wide = self.v.shape
        states = self.v.new_empty((n, heads, each, self.k.shape[-1], wide))
        made = torch.empty_like(self.updates)
        state, keep, first = self.v.new_zeros((active[0], *states.shape[1:])), self.last.exp(), 0
        for count in active:
            here, state = slice(first, first + count), state[:count]
            states[here] = state
            made[here] = self.updates[here] - self.answers[here] @ state
            state = keep[here] * state + self.keys[here].transpose(-1, -2) @ made[here]
            first += count
        return states, made

    def scan_back(self, active: Sequence[int], grad: Tensor, grad_states: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the updates, and those of the states behind each chunk.

        Args:
            grad: of the results; grad_states: what it gives the state before each chunk by itself, which is written over.
        """
        grad_made = self.mixing.transpose(-1, -2) @ grad
        behind, keep = torch.zeros_like(grad_states), self.last.exp()
        last = len(self.v)
        coming = grad_states.new_zeros((0, *grad_states.shape[1:]))
        for count in reversed(active):
            here = slice(last - count, last)
            behind[last - count : last - count + len(coming)] = coming
            grad_made[here] += self.keys[here] @ behind[here]
            coming = grad_states[here] + keep[here] * behind[here] - self.answers[here].transpose(-1, -2) @ grad_made[here]
            last -= count
        return grad_made, behind


class _GatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lengths: Sequence[int]) -> Tensor:
        ctx.order = _Order.of(tuple(lengths), q.device)
        ctx.save_for_backward(q, k, v, g, beta)
        made, states, updates = _made(ctx.order, q, k, v, g, beta)
        out = made.grown * (made.q @ states) + made.mixing @ updates
        return ctx.order.tokens(out.flatten(1, 2)).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order, inputs = ctx.order, ctx.saved_tensors
        made, states, updates = _made(order, *inputs)
        wide, groups = made.q.dtype, made.v.shape[1:3]
        grad = order.chunks(grads[0].to(wide)).unflatten(1, groups)
        scaled = made.grown * grad
        grad_made, behind = made.scan_back(order.active, grad, made.q.transpose(-1, -2) @ scaled)
        # Of each chunk by itself from here on: results, then the state behind it, then the updates' system.
        grad_q = (scaled @ states.transpose(-1, -2)).sum(2, keepdim=True)
        grad_growth = (scaled * (made.q @ states)).sum(-1, keepdim=True)
        grad_mixing = grad @ updates.transpose(-1, -2)
        both = grad_mixing * made.mixing  # what D's exponent gets
        grad_growth += both.sum(-1, keepdim=True) - both.sum(-2).unsqueeze(-1)
        grad_mixing = (grad_mixing * made.decay).sum(2, keepdim=True)
        grad_q += grad_mixing @ made.k
        grad_k = grad_mixing.transpose(-1, -2) @ made.q
        grad_keys = updates @ behind.transpose(-1, -2)
        grad_k += (made.left * grad_keys).sum(2, keepdim=True)
        kept = (grad_keys * made.keys).sum(-1, keepdim=True)
        grad_growth -= kept
        at_last = kept.sum(-2, keepdim=True) + made.last.exp() * (states * behind).sum((-1, -2), keepdim=True)
        grad_growth[..., -1:, :] += at_last
        grad_answers = -grad_made @ states.transpose(-1, -2)
        back = made.inverse.transpose(-1, -2)
        grad_values, grad_rows = back @ grad_made, back @ grad_answers  # of beta v, and of beta exp(G) k
        grad_system = -(grad_values @ made.updates.transpose(-1, -2) + grad_rows @ made.answers.transpose(-1, -2)).tril_(-1)
        grad_v = made.rate * grad_values
        along = (grad_rows * made.k).sum(-1, keepdim=True) * made.grown
        grad_rate = (grad_values * made.v).sum(-1, keepdim=True) + along
        grad_growth += along * made.rate
        grad_k += (made.rate * made.grown * grad_rows).sum(2, keepdim=True)
        grad_system *= made.decay
        both = grad_system * made.alike
        grad_rate += both.sum(-1, keepdim=True)
        both *= made.rate
        grad_growth += both.sum(-1, keepdim=True) - both.sum(-2).unsqueeze(-1)
        grad_alike = (made.rate * grad_system).sum(2, keepdim=True)
        grad_k += grad_alike @ made.k + grad_alike.transpose(-1, -2) @ made.k
        grad_g = grad_growth.flip(-2).cumsum(-2).flip(-2)  # of G to g: every sum from a token on has it
        found = (grad_q, grad_k, grad_v, grad_g.squeeze(-1), grad_rate.squeeze(-1))
        back_at = (order.tokens(one.flatten(1, 2)).to(given.dtype) for one, given in zip(found, inputs, strict=True))
        return (*back_at, None)


def _made(order: _Order, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[_Chunks, Tensor, Tensor]:
    wide, groups = torch.promote_types(q.dtype, torch.float32), (q.shape[1], v.shape[1] // q.shape[1])
    q, k, v = (order.chunks(one.to(wide)) for one in (q, k, v))
    growth, rate = (order.chunks(one.to(wide)).unsqueeze(-1).unflatten(1, groups) for one in (g, beta))
    chunks = _Chunks(q.unsqueeze(2), k.unsqueeze(2), v.unflatten(1, groups), rate, growth.cumsum(-2))
    return chunks, *chunks.scan(order.active)


def gated_delta(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, lengths: Sequence[int]) -> Tensor:
    """What each token reads of its head's state; value heads are grouped by key head.

    Args:
        query, key: [t, key heads, dk]; they are divided by their length, and queries by the root of dk.
        value: [t, heads, dv].
        decay: fp32 [t, heads], the logarithm of what is left of a state at each token.
        beta: [t, heads], between 0 and 1: how much of a key's old value is replaced.
        lengths: of the samples; they add up to t.

    Returns:
        [t, heads, dv]
    """
    query, key = unit(query) * query.shape[-1] ** -0.5, unit(key)
    return _GatedDelta.apply(query, key, value, decay, beta, lengths)


def unit(x: Tensor) -> Tensor:
    """x [..., d] by its length, in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)


def step_by_step(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same by its definition, one token after the other: what tests compare with."""
    each, out = value.shape[1] // key.shape[1], []
    query, key = unit(query) * query.shape[-1] ** -0.5, unit(key)
    query, key = (one.repeat_interleave(each, dim=1) for one in (query, key))
    for q, k, v, g, rate in zip(*(one.split(list(lengths)) for one in (query, key, value, decay, beta)), strict=True):
        state = value.new_zeros((value.shape[1], key.shape[-1], value.shape[-1])).to(query.dtype)
        for token in range(len(q)):
            state = state * g[token, :, None, None].exp()
            old = torch.einsum("hd,hde->he", k[token], state)
            state = state + torch.einsum("hd,he->hde", k[token], rate[token].unsqueeze(-1) * (v[token] - old))
            out.append(torch.einsum("hd,hde->he", q[token], state))
    return torch.stack(out).to(value.dtype)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root mean square norm of each head, times its weight, times silu(gate); roundings are those of transformers.

    Args:
        x, gate: [..., dv]; weight: [dv].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return ((weight * normed) * F.silu(gate.to(wide.dtype))).to(x.dtype)
