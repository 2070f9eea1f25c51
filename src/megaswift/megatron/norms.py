"""Norms: by root mean square in three forms, fused, and by mean and variance in plain PyTorch; roundings as in transformers' models.

Fused layers take the first three by their exact types (`RMS_FORMS`), so none is a subclass of another. All ranks hold the whole
weights, which are marked for Megatron-Core's sum of their gradients under sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaswift.megatron.kernels.rms_norm import CENTRED, ROUNDED, WIDE, rms_norm


class _Norm(torch.nn.Module):
    """Weights of a norm over the last axis.

    Args:
        hidden_size: of that axis.
        eps: what is added to the variance.
    """

    has_bias = False
    initial = 0.0
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        for name in ("weight", "bias") if self.has_bias else ("weight",):
            values = torch.nn.Parameter(torch.full((hidden_size,), self.initial, dtype=config.params_dtype, device=device))
            values.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, values)


class RMSNorm(_Norm):
    """A root mean square norm whose scaled value is rounded before it is multiplied with the weight."""

    initial = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] to its norm."""
        return rms_norm(x, self.weight, self.eps, ROUNDED)


class WideRMSNorm(_Norm):
    """A root mean square norm whose product with the weight is in fp32, too."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] to its norm."""
        return rms_norm(x, self.weight, self.eps, WIDE)


class ZeroCentredRMSNorm(_Norm):
    """A root mean square norm whose weight is stored minus one; one is added, and multiplied with, in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] to its norm."""
        return rms_norm(x, self.weight, self.eps, CENTRED)


RMS_FORMS: dict[type, str] = {RMSNorm: ROUNDED, WideRMSNorm: WIDE, ZeroCentredRMSNorm: CENTRED}


class LayerNorm(_Norm):
    """A norm by mean and variance (https://arxiv.org/abs/1607.06450), with a bias."""

    has_bias = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] to its norm."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class ZeroCentredLayerNorm(LayerNorm):
    """The same with a weight that is stored minus one; one is added in the weight's own precision."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] to its norm."""
        return F.layer_norm(x, (x.shape[-1],), self.weight + 1.0, self.bias, self.eps)


class WideLayerNorm(_Norm):
    """A norm by mean and variance without a bias, whose product with the weight is in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] to its norm."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * normed).to(x.dtype)
