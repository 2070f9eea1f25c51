"""AdamW in one pass over every shard: fp32 master weight, moments and gradient in, all of them and the bf16 weight out.

The moments may be kept in two bytes or in one (small_moments.py).

The update is that of torch.optim.AdamW (decoupled weight decay, https://arxiv.org/abs/1711.05101). Gradient clipping is a
device scalar that the kernel multiplies each gradient by, so nothing waits for the norm on the host; a factor that is not
finite leaves every tensor as it is. One launch covers a whole parameter group through a table of addresses.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megaswift.megatron.kernels.pinned import HostTensors
from megaswift.megatron.kernels.small_moments import GROUP, new_moments, small_adamw_kernel, small_adamw_twin
from megaswift.megatron.kernels.triton_support import jit, tl, use_triton

_CHUNK = 32768  # elements a program
_BLOCK = 2048
_PIECE = 65536  # elements whose squares torch sums in one go: on a CPU it adds them up in fp32, one after the other


@jit
def _update(
    param,
    grad,
    average,
    square,
    weight,
    at,
    mask,
    clip,
    lr,
    beta1,
    beta2,
    eps,
    decay,
    step_size,
    root,
    HAS_WEIGHT: tl.constexpr,
):
    p = tl.load(param + at, mask=mask)
    g = tl.load(grad + at, mask=mask) * clip
    m = tl.load(average + at, mask=mask)
    v = tl.load(square + at, mask=mask)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    p = p * (1.0 - lr * decay) - step_size * m / (tl.sqrt(v) / root + eps)
    tl.store(param + at, p, mask=mask)
    tl.store(average + at, m, mask=mask)
    tl.store(square + at, v, mask=mask)
    if HAS_WEIGHT:
        tl.store(weight + at, p.to(tl.bfloat16), mask=mask)


@jit
def _adamw_kernel(table, factor, lr, beta1, beta2, eps, decay, step_size, root, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    # Addresses read from memory carry no alignment; multiple_of states it, and the whole blocks go without a mask, so that
    # the compiler moves 16 bytes at a time.
    entry = table + tl.program_id(0).to(tl.int64) * 6
    length = tl.load(entry).to(tl.int32)
    param = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    grad = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), 16)
    average = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(tl.float32)), 16)
    square = tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(tl.float32)), 16)
    weight = tl.multiple_of(tl.load(entry + 5).to(tl.pointer_type(tl.bfloat16)), 16)
    clip = tl.load(factor)
    lane = tl.arange(0, BLOCK)
    if tl.abs(clip) < float("inf"):  # false for NaN too
        whole = length // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            _update(
                param,
                grad,
                average,
                square,
                weight,
                start + lane,
                None,
                clip,
                lr,
                beta1,
                beta2,
                eps,
                decay,
                step_size,
                root,
                HAS_WEIGHT,
            )
        if whole < length:
            at = whole + lane
            _update(
                param,
                grad,
                average,
                square,
                weight,
                at,
                at < length,
                clip,
                lr,
                beta1,
                beta2,
                eps,
                decay,
                step_size,
                root,
                HAS_WEIGHT,
            )


@jit
def _squares_kernel(table, partial, BLOCK: tl.constexpr):
    entry = table + tl.program_id(0).to(tl.int64) * 2
    length = tl.load(entry).to(tl.int32)
    grad = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    whole = length // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        g = tl.load(grad + start + lane)
        total += g * g
    g = tl.load(grad + whole + lane, mask=whole + lane < length, other=0.0)
    total += g * g
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


class AddressTable:
    """Chunks of a list of tensor tuples as (length, address, ...) rows on the device; made again only when a tensor moved."""

    def __init__(self) -> None:
        self._key: tuple[int, ...] = ()
        self._rows = torch.empty(0, dtype=torch.int64)

    def rows(self, columns: list[list[Tensor]], each: list[int] | None = None, with_place: bool = False) -> Tensor:
        """int64 [chunks, 1 + len(columns)] for equally long lists of contiguous tensors; sizes are those of column 0.

        Args:
            each: for each column, how many elements of column 0 one of its elements stands for; default: 1.
            with_place: put the chunk's first element behind its length.
        """
        each = each or [1] * len(columns)
        key = tuple(tensor.data_ptr() for column in columns for tensor in column)
        if key != self._key:
            table = []
            for tensors in zip(*columns):
                for begin in range(0, tensors[0].numel(), _CHUNK):
                    places = [t.data_ptr() + begin // n * t.element_size() for t, n in zip(tensors, each)]
                    size = [min(_CHUNK, tensors[0].numel() - begin), *([begin] if with_place else [])]
                    table.append([*size, *places])
            self._rows = torch.tensor(table, dtype=torch.int64).view(len(table), -1).to(columns[0][0].device)
            self._key = key
        return self._rows


def _aligned(tensors: list[Tensor]) -> bool:
    """The kernels read 16 bytes at a time."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def sum_of_squares(tensors: list[Tensor], table: AddressTable | None = None) -> Tensor:
    """Sum of all elements' squares, an fp32 scalar on the device; the order of summation is fixed."""
    if not tensors:
        return torch.zeros(())
    if use_triton(tensors[0]) and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors) and _aligned(tensors):
        rows = (table or AddressTable()).rows([tensors])
        partial = torch.empty(rows.shape[0], dtype=torch.float32, device=tensors[0].device)
        _squares_kernel[(rows.shape[0],)](rows, partial, _BLOCK, num_warps=4)
        return partial.sum()
    pieces = [piece for tensor in tensors for piece in tensor.reshape(-1).split(_PIECE)]
    return torch.stack(torch._foreach_norm(pieces)).double().square_().sum().float()


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor] | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: Tensor,
    table: AddressTable | None = None,
) -> None:
    """One AdamW step in place, on lists of flat tensors.

    Args:
        params, grads, averages, squares: fp32 [n_i] each; the twin leaves the scaled gradients behind.
        weights: bf16 [n_i] that receive the rounded parameters, or None.
        step: number of this step, from 1.
        factor: fp32 scalar on the device that multiplies every gradient (clipping, 1 / tokens); not finite: no update.
    """
    if not params:
        return
    beta1, beta2 = betas
    step_size, root = lr / (1.0 - beta1**step), math.sqrt(1.0 - beta2**step)
    columns = [params, grads, averages, squares, weights if weights is not None else params]
    if use_triton(params[0]) and all(_aligned(column) for column in columns):
        rows = (table or AddressTable()).rows(columns)
        _adamw_kernel[(rows.shape[0],)](
            rows, factor, lr, beta1, beta2, eps, weight_decay, step_size, root, _BLOCK, weights is not None, num_warps=8
        )
        return
    if not bool(torch.isfinite(factor)):
        return
    steps = [torch.tensor(float(step)) for _ in params]
    torch._fused_adamw_(
        params,
        grads,
        averages,
        squares,
        [],
        steps,
        amsgrad=False,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        grad_scale=factor.reciprocal(),
        found_inf=torch.zeros((), device=factor.device),
    )
    if weights is not None:
        torch._foreach_copy_(weights, params)


def small_adamw_step(
    params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], weights: list[Tensor] | None, *,
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, factor: Tensor,
    table: AddressTable | None = None,
) -> None:  # fmt: skip
    """`adamw_step` for moments of two bytes or of one; `states` are those of small_moments.new_moments."""
    eight = states[0]["exp_avg"].dtype == torch.uint8
    scales = ("exp_avg_scale", "exp_avg_sq_scale") if eight else ("exp_avg", "exp_avg_sq")
    names = ("exp_avg", scales[0], "exp_avg_sq", scales[1])
    columns = [params, grads, *([state[name] for state in states] for name in names)]
    columns.append(weights if weights is not None else params)
    if use_triton(params[0]) and all(_aligned(column) for column in columns):
        group = GROUP if eight else 1
        rows = (table or AddressTable()).rows(columns, [1, 1, 1, group, 1, group, 1], with_place=True)
        step_size, root = lr / (1.0 - betas[0] ** step), math.sqrt(1.0 - betas[1] ** step)
        small_adamw_kernel[(rows.shape[0],)](
            rows, factor, step, lr, *betas, eps, weight_decay, step_size, root,
            4, GROUP, 8 if eight else 16, weights is not None, num_warps=4,
        )  # fmt: skip
        return
    if not bool(torch.isfinite(factor)):
        return
    options = dict(step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, factor=factor)
    for index, (param, grad, state) in enumerate(zip(params, grads, states)):
        small_adamw_twin(param, grad, state, None if weights is None else weights[index], **options)  # type: ignore[arg-type]


class FusedAdamW(torch.optim.Optimizer):
    """AdamW in apex's form for Megatron-Core: `exp_avg` and `exp_avg_sq` of each parameter, `step` in the group.

    `moments` says how they are kept: "fp32", "bf16" or "8bit" (then `exp_avg_scale` and `exp_avg_sq_scale` stand beside them).

    `host` makes the moments' tensors in page-locked host memory, where that is wanted; the kernels reach them there.

    A parameter may carry `low_precision_weight`, the bf16 tensor that receives its rounded value. `gradient_factor` is the
    device scalar that multiplies the gradients of the next step, and of that one only.
    """

    gradient_factor: Tensor | None = None
    moments: str = "fp32"
    host: HostTensors | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("weight decay inside the gradient is not supported")
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, step=0))

    def allocate(self) -> None:
        """Make all moments now: a run that does not fit fails at once, and step 0 can be saved."""
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state[param]:
                    self.state[param] = new_moments(param, self.moments, self.host.zeros if self.host else None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does; small moments stay where they are, for torch would widen them (their values are set one by one)."""
        kept = dict(self.state)
        super().load_state_dict(state_dict if self.moments == "fp32" else {**state_dict, "state": {}})
        if self.moments != "fp32":
            self.state.update(kept)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self.allocate()
        for index, group in enumerate(self.param_groups):
            group["step"] += 1
            for weighted in (True, False):
                members = [p for p in group["params"] if p.grad is not None and hasattr(p, "low_precision_weight") == weighted]
                if members:
                    self._step_group(group, members, weighted, self._table((index, weighted)))
        self.gradient_factor = None

    def _step_group(self, group: dict[str, Any], members: list[Tensor], weighted: bool, table: AddressTable) -> None:
        factor = self.gradient_factor
        grads: list[Any] = [p.grad for p in members]
        weights: list[Any] | None = [p.low_precision_weight for p in members] if weighted else None  # type: ignore[attr-defined]
        options: dict[str, Any] = dict(
            step=group["step"],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            factor=torch.ones((), device=members[0].device) if factor is None else factor,
            table=table,
        )
        states = [self.state[p] for p in members]
        if self.moments != "fp32":
            small_adamw_step(members, grads, states, weights, **options)
            return
        averages, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        adamw_step(members, grads, averages, squares, weights, **options)

    def _table(self, key: tuple[int, bool]) -> AddressTable:
        tables = self.__dict__.setdefault("_address_tables", {})
        return tables.setdefault(key, AddressTable())
