"""The two products of a linear layer that its precision decides: forward, and the input's gradient.

The weight's gradient is no part of this: it is always accumulated in the precision of its buffer (`main_grad.add_product`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels import swiglu


class LinearOps:
    """Products in the precision that the tensors have. `kernels.fp8_linear` has the other way."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., k] @ weight [n, k]^T + bias [n]."""
        return F.linear(x, weight, bias)

    def swiglu_forward(
        self, gate_up: Tensor, weight: Tensor, residual: Tensor | None, *, keep: bool, gated_by: str = swiglu.SILU
    ) -> tuple[Tensor, Tensor | None]:
        """swiglu(gate_up) @ weight [n, f]^T, plus residual [..., n] if given; and swiglu(gate_up) [..., f] if it is to be kept.

        Here the product itself adds the residual.
        """
        hidden = swiglu.forward(gate_up, gated_by)
        if residual is None:
            result = torch.matmul(hidden, weight.t())
        else:
            flat = torch.addmm(residual.reshape(-1, weight.shape[0]), hidden.view(-1, hidden.shape[-1]), weight.t())
            result = flat.view(residual.shape)
        return result, hidden if keep else None

    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad [..., n] @ weight [n, k]."""
        return torch.matmul(grad, weight)

    def add_forward(self, onto: Tensor, x: Tensor, weight: Any) -> Tensor:
        """onto [tokens, n] += x [tokens, k] @ weight [n, k]^T; here the product itself reads what it adds to."""
        return onto.addmm_(x, weight.t())

    def add_input_grad(self, onto: Tensor, grad: Tensor, weight: Any) -> Tensor:
        """onto [tokens, k] += grad [tokens, n] @ weight [n, k]."""
        return onto.addmm_(grad, weight)

    def unchanged_weights(self, micro_batches: int) -> AbstractContextManager[None]:
        """A context in which so many micro batches run forward and backward and no weight changes."""
        return nullcontext()


PLAIN = LinearOps()


def linear_ops_of(config: Any) -> LinearOps:
    """The products of the linear layers of a model's blocks, as model.py set them: a config without any is a mistake."""
    ops: LinearOps = config.linear_ops
    return ops
