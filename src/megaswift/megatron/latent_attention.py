"""Latent attention (DeepSeek): keys and values of all heads come from one narrow state of each token, queries mostly from another.

Formulas: https://arxiv.org/abs/2405.04434, section 2.1. The narrow states are made whole on every tensor-parallel rank, under
sequence parallelism of its own tokens; what is made from them is cut by heads. Positions are those of the micro batch's
tables, so that each of several samples in a row begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaswift.megatron.kernels.attention import dense_causal, packed_causal, takes_narrow_values
from megaswift.megatron.kernels.context_parallel import shared_causal
from megaswift.megatron.kernels.linear_ops import linear_ops_of
from megaswift.megatron.kernels.rope import rotate
from megaswift.megatron.kernels.weight_grad import linear
from megaswift.megatron.norms import RMSNorm
from megaswift.models.kinds import Latent


@dataclass
class LatentSubmodules:
    """The classes of its products, cut by rows, by columns and not at all, and what makes its core attention, of rotated tensors."""

    column: Any
    row: Any
    replicated: Any
    core_attention: Any


class Replicated(torch.nn.Module):
    """A product that every tensor-parallel rank makes whole, of the tokens that it has.

    Without sequence parallelism all ranks have the same tokens, and the same gradient of the weight; with it Megatron-Core
    adds up the parts, by the mark on the weight.
    """

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.zeros((outputs, inputs), dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, inputs] to [s, b, outputs]."""
        if not self.weight.requires_grad:
            return F.linear(x, self.weight)
        return linear(x, self.weight, linear_ops=linear_ops_of(self.config))


class LatentAttention(MegatronModule):
    """In the place of SelfAttention. Megatron-Core's own counts positions from the beginning of a row of several samples.

    Args:
        latent: its sizes.
        rotation: which of the layout's tables its turning features take.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentSubmodules,
        layer_number: int,
        *,
        latent: Latent,
        rotation: str,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.latent, self.rotation, self.layer_number = latent, rotation, layer_number
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.num_attention_heads_per_partition = heads // self.tp_group.size()
        self.hidden_size_per_attention_head = width = latent.still + latent.turning
        cut: dict[str, Any] = dict(
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        column, row, replicated = submodules.column, submodules.row, submodules.replicated
        if latent.query is None:
            self.linear_q_proj = column(hidden, heads * width, gather_output=False, **cut)
        else:
            self.linear_q_down_proj = replicated(hidden, latent.query, config)
            self.q_layernorm = RMSNorm(config, latent.query, latent.epsilon)
            self.linear_q_up_proj = column(latent.query, heads * width, gather_output=False, **cut)
        self.linear_kv_down_proj = replicated(hidden, latent.key_value + latent.turning, config)
        self.kv_layernorm = RMSNorm(config, latent.key_value, latent.epsilon)
        self.linear_kv_up_proj = column(latent.key_value, heads * (latent.still + latent.value), gather_output=False, **cut)
        self.core_attention = submodules.core_attention(config, softmax_scale=config.softmax_scale)
        self.linear_proj = row(heads * latent.value, hidden, input_is_parallel=True, **cut | {"skip_bias_add": True})

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] to ([s, b, h], no bias)."""
        layout: Any = kwargs["packed_seq_params"]
        query, key, value = self._query_key_value(hidden_states, layout.tables)
        width, own = query.shape[-1], value.shape[-1]
        if own == width or (self._is_dense(layout) and takes_narrow_values(query)):
            return self.linear_proj(self._attend(query, key, value, layout))
        # Other kernels take values as wide as keys; zeros change nothing, and are cut off again.
        context = self._attend(query, key, F.pad(value, (0, width - own)), layout)
        return self.linear_proj(context.unflatten(-1, (-1, width))[..., :own].flatten(-2))

    def _query_key_value(self, hidden_states: Tensor, tables: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key [s, b, heads, width], value [s, b, heads, value] of this rank's heads, rotated."""
        latent, heads = self.latent, self.num_attention_heads_per_partition
        if latent.query is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))
        state, turning = self.linear_kv_down_proj(hidden_states).split([latent.key_value, latent.turning], -1)
        both, _ = self.linear_kv_up_proj(self.kv_layernorm(state.contiguous()))
        turning = turning.contiguous()
        if self.config.sequence_parallel:
            turning = gather_from_sequence_parallel_region(turning, group=self.tp_group)
        elif self.tp_group.size() > 1:  # each rank's heads add to its gradient
            turning = copy_to_tensor_model_parallel_region(turning, group=self.tp_group)
        query_still, query_turning = query.unflatten(-1, (heads, -1)).split([latent.still, latent.turning], -1)
        key_still, value = both.unflatten(-1, (heads, -1)).split([latent.still, latent.value], -1)
        table = tables[self.rotation]
        query_turning, turning = (rotate(self._halves(part), *table) for part in (query_turning, turning.unsqueeze(2)))
        query = torch.cat((query_still, query_turning), dim=-1)
        return query, torch.cat((key_still, turning.expand(-1, -1, heads, -1)), dim=-1), value

    def _halves(self, x: Tensor) -> Tensor:
        """Features that rotate together, brought from beside each other into two halves."""
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.latent.neighbours else x

    def _is_dense(self, layout: Any) -> bool:
        """Whether whole rows attend by the fastest kernel."""
        config = self.config
        named = config.attention != "fastest" or config.deterministic_mode or config.plain_layers
        packed = layout.seq_lens is not None or layout.cu_seqlens_q is not None  # graphs know where samples begin, not how many
        return layout.share is None and not packed and not named

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, layout: Any) -> Tensor:
        """[s, b, heads * width] by the fastest kernel, or by the one that was asked for."""
        core, config = self.core_attention, self.config
        scale: float | None = core.softmax_scale
        if self._is_dense(layout):
            return dense_causal(query, key, value, scale)
        if layout.share is not None:
            return shared_causal(query, key, value, layout.share, scale)
        if config.attention != "fastest" or config.deterministic_mode or config.plain_layers:
            return core(query, key, value, packed_seq_params=layout)
        return packed_causal(query, key, value, layout.cu_seqlens_q, layout.max_seqlen_q, scale, lengths=layout.seq_lens)

    def set_for_recompute_input_layernorm(self) -> None:
        """Megatron-Core asks it of layers whose norms alone are computed again, which no setting here asks for."""
        raise NotImplementedError("norms of layers with latent attention are not computed again by themselves")


__all__ = ["LatentAttention", "LatentSubmodules", "Replicated"]
