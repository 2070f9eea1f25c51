"""Parts of layers that only some families have, in plain PyTorch: a norm over all heads, and other ways to add up a layer."""

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

from megaswift.megatron.kernels.rms_norm import ROUNDED, WIDE, rms_norm, rms_norm_added, rms_norm_keep
from megaswift.megatron.norms import RMS_FORMS


class WidthNorm(torch.nn.Module):
    """Root mean square norm over the queries, or the keys, of all heads together, which tensor parallelism splits.

    Args:
        hidden_size: of one head.
        heads: the config's name for the number of heads.
        wide: whether the product with the weight is in fp32, too.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, heads: str, wide: bool = False, **_: Any
    ) -> None:
        super().__init__()
        self.wide = wide
        self.group, self.eps = parallel_state.get_tensor_model_parallel_group(), eps
        self.size = getattr(config, heads) * hidden_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(self.size // self.group.size(), dtype=config.params_dtype, device=device))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim, self.weight.partition_stride = 0, 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, heads of this rank, d] to its norm."""
        if self.group.size() == 1:
            return rms_norm(x.flatten(-2), self.weight, self.eps, WIDE if self.wide else ROUNDED).view(x.shape)
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.group.size() > 1:  # summed over the ranks on the way in, and its gradient on the way back
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normed = flat * torch.rsqrt(squares / self.size + self.eps)
        if self.wide:
            return (normed * self.weight.float()).to(x.dtype).view(x.shape)
        return (normed.to(x.dtype) * self.weight).view(x.shape)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Megatron-Core's description: the weight is cut along its one axis."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class SumLayer(TransformerLayer):
    """A layer whose additions are written out: norms behind attention and MLP, a factor, or both parts beside each other.

    Norms before them are the layer's own `input_layernorm` and `pre_mlp_layernorm`, which may be none.

    Args:
        behind: makes the norm behind each part, of a config, its width and its epsilon; None: there is none.
        beside: whether attention and MLP take the same normed states and are added together.
        residual_factor: what is added is multiplied by it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        *args: Any,
        behind: type | None = None,
        beside: bool = False,
        residual_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.residual_factor, self.beside = residual_factor, beside
        if behind is not None:
            self.post_self_attn_layernorm, self.post_mlp_layernorm = (
                behind(config, config.hidden_size, config.layernorm_epsilon) for _ in range(2)
            )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Any]:  # type: ignore[override]
        """hidden_states [s, b, h] to ([s, b, h], context)."""
        residual, normed = self._before(self.input_layernorm, hidden_states)
        layout = kwargs.get("packed_seq_params")
        attended = self.self_attention(normed, attention_mask, packed_seq_params=layout)
        hidden_states = self._sum(residual, "post_self_attn_layernorm", *attended)
        if self.beside:
            return self._sum(hidden_states, "post_mlp_layernorm", *self.mlp(normed)), kwargs.get("context")
        residual, normed = self._before(self.pre_mlp_layernorm, hidden_states)
        return self._sum(residual, "post_mlp_layernorm", *self.mlp(normed)), kwargs.get("context")

    def _fuses(self, norm: Any) -> bool:
        return type(norm) in RMS_FORMS and not self.config.plain_layers

    def _before(self, norm: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states for the residual path, and their norm."""
        if not self._fuses(norm):
            return hidden_states, norm(hidden_states)
        return rms_norm_keep(hidden_states, norm.weight, norm.eps, RMS_FORMS[type(norm)])

    def _sum(self, residual: Tensor, norm: str, delta: Tensor, bias: Tensor | None) -> Tensor:
        """The residual plus what attention, or the MLP, gives."""
        delta = delta if bias is None else delta + bias
        behind = getattr(self, norm, None)
        if behind is not None and self.residual_factor == 1.0 and self._fuses(behind):
            return rms_norm_added(residual, delta, behind.weight, behind.eps, RMS_FORMS[type(behind)])
        delta = delta if behind is None else behind(delta)
        return residual + (delta if self.residual_factor == 1.0 else self.residual_factor * delta)
