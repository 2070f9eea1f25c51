"""Our parts for Megatron-Core's layers: a BackendSpecProvider, and the layer specification built from it.

TransformerEngine and apex are not needed. What Megatron-Core lacks without them stands in kernels/: attention that takes
packed rows and is not quadratic in memory, a norm that works under sequence parallelism, and fused operations whose
weight gradients go straight into the fp32 buffers. Each has a Triton or cuDNN form and a plain PyTorch one for CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaswift.engine.kernels.context_parallel import Share, shared_causal
from megaswift.engine.kernels.megatron_layer import FusedMLP, FusedSelfAttention, FusedTransformerLayer, RMSNorm
from megaswift.engine.kernels.parallel_linear import ColumnParallel, RowParallel


@dataclass
class SequenceLayout(PackedSeqParams):
    """Where the tokens of a micro batch stand; it travels to every attention layer as Megatron's packed_seq_params.

    Args:
        cos, sin: rotation tables, [s, b or 1, 1, head_dim], already scaled by the RoPE type's attention factor.
        segments: lengths of the samples that share the one row, or None for plain causal rows; with them `cu_seqlens_q`
            (int32 on the device) and `max_seqlen_q` are set.
        share: this rank's part of the rows, where several ranks share them (context parallelism).
    """

    qkv_format: str = "sbhd"
    cos: Tensor | None = None
    sin: Tensor | None = None
    segments: list[int] | None = None
    share: Share | None = None


class CoreAttention(torch.nn.Module):
    """Causal attention by a kernel that the user chose or that is deterministic, after rotating query and key.

    Otherwise FusedSelfAttention calls the fastest kernel itself and this module is not used. Query is [s, b, heads, d],
    key and value are [s, b, kv heads, d] of this tensor-parallel rank; the result is [s, b, heads * d]. Scores are kept
    in fp32 by all kernels, so apply_query_key_layer_scaling, which guards fp16 scores, has nothing to do here.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.kernels = _kernels(config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SequenceLayout | None = None,
    ) -> Tensor:
        layout = packed_seq_params
        if layout is not None and layout.cos is not None and layout.sin is not None:
            query, key = rotate(query, layout.cos, layout.sin), rotate(key, layout.cos, layout.sin)
        if layout is not None and layout.share is not None:
            return shared_causal(query, key, value, layout.share, self.softmax_scale)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [b, heads, s, d]
        if layout is None or layout.segments is None:
            mixed = self._attend(query, key, value)
        else:
            pieces = zip(*(part.split(layout.segments, dim=2) for part in (query, key, value)))
            mixed = torch.cat([self._attend(*piece) for piece in pieces], dim=2)
        return mixed.permute(2, 0, 1, 3).reshape(mixed.shape[2], mixed.shape[0], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        with sdpa_kernel(self.kernels, set_priority=True):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped, scale=self.softmax_scale
            )


def _kernels(config: TransformerConfig) -> list[SDPBackend]:
    """The attention kernels that may be used, the preferred one first."""
    choice = getattr(config, "flash_attention", None)
    if choice is True:
        return [SDPBackend.FLASH_ATTENTION]
    if choice is False:
        return [SDPBackend.MATH]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves convention (https://arxiv.org/abs/2104.09864): x * cos + (-x2, x1) * sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class PlainProvider(BackendSpecProvider):
    """The parts that Megatron-Core builds a layer from, from a plain pip install."""

    def column_parallel_linear(self) -> type:
        return ColumnParallel

    def row_parallel_linear(self) -> type:
        return RowParallel

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules | None]:
        raise NotImplementedError("experts are not supported")

    def activation_func(self) -> type | None:
        return None


def block_spec(provider: BackendSpecProvider, num_layers: int, qk_layernorm: bool) -> TransformerBlockSubmodules:
    """The specification of this pipeline stage's layers.

    The key map saves the norms under the names of TransformerEngine's fused modules, so that checkpoints load there.
    """
    norm = provider.layer_norm(rms_norm=True)
    qk_norm = provider.layer_norm(rms_norm=True, for_qk=True) if qk_layernorm else IdentityOp
    layer = ModuleSpec(
        module=FusedTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=FusedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=provider.column_parallel_linear(),
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=FusedMLP,
                submodules=MLPSubmodules(
                    linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
