"""Megatron-Core's column- and row-parallel layers with weight gradients accumulated by the product itself."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megaswift.megatron.kernels.linear_ops import linear_ops_of
from megaswift.megatron.kernels.weight_grad import linear


def _linear(layer: Any, x: Tensor, weight: Tensor, arguments: dict[str, Any]) -> Tensor:
    return linear(
        x,
        weight,
        arguments.get("bias"),
        reduce_input_grad=arguments.get("allreduce_dgrad", False),
        sequence_parallel=arguments.get("sequence_parallel", False),
        tp_group=arguments.get("tp_group"),
        linear_ops=linear_ops_of(layer.config),
    )


def _is_frozen(weight: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether nothing of a layer is trained: Megatron-Core's way gives no gradient to the bias of a frozen weight."""
    bias = arguments.get("bias")
    return not weight.requires_grad and not (bias is not None and bias.requires_grad)


class ColumnParallel(ColumnParallelLinear):
    """A ColumnParallelLinear in all but its product; frozen weights take Megatron-Core's own way."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or _is_frozen(weight, kwargs) or kwargs.get("grad_output_buffer") is not None:
            return super()._forward_impl(input, weight, *args, **kwargs)
        return _linear(self, input, weight, kwargs)


class RowParallel(RowParallelLinear):
    """A RowParallelLinear in all but its product; frozen weights take Megatron-Core's own way."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or _is_frozen(weight, kwargs) or kwargs.get("grad_output_buffer") is not None:
            return super()._forward_impl(input, weight, *args, **kwargs)
        return _linear(self, input, weight, kwargs)
