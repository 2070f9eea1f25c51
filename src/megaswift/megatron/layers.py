"""Parts of layers that only some families have, in plain PyTorch: a norm over all heads, and a factor on what is added."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class WidthNorm(torch.nn.Module):
    """Root mean square norm over the queries, or the keys, of all heads together, which tensor parallelism splits.

    Args:
        hidden_size: of one head.
        heads: the config's name for the number of heads.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, heads: str, **_: Any) -> None:
        super().__init__()
        self.group, self.eps = parallel_state.get_tensor_model_parallel_group(), eps
        self.size = getattr(config, heads) * hidden_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(self.size // self.group.size(), dtype=config.params_dtype, device=device))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim, self.weight.partition_stride = 0, 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, heads of this rank, d] to its norm."""
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.group.size() > 1:  # summed over the ranks on the way in, and its gradient on the way back
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normed = (flat * torch.rsqrt(squares / self.size + self.eps)).to(x.dtype)
        return (normed * self.weight).view(x.shape)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Megatron-Core's description: the weight is cut along its one axis."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class ScaledLayer(TransformerLayer):
    """A pre-norm layer that multiplies what attention and MLP give before it adds it.

    Args:
        residual_factor: what by.
    """

    def __init__(self, config: TransformerConfig, submodules: Any, *args: Any, residual_factor: float, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.residual_factor = residual_factor

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Any]:  # type: ignore[override]
        """hidden_states [s, b, h] to ([s, b, h], context)."""
        layout = kwargs.get("packed_seq_params")
        delta, bias = self.self_attention(self.input_layernorm(hidden_states), attention_mask, packed_seq_params=layout)
        hidden_states = hidden_states + self.residual_factor * (delta if bias is None else delta + bias)
        delta, bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        hidden_states = hidden_states + self.residual_factor * (delta if bias is None else delta + bias)
        return hidden_states, kwargs.get("context")
