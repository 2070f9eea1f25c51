"""A layer's linear attention by a gated delta rule (Qwen3-Next, Qwen3.5), in the place of attention; heads are cut by tensor parallelism.

The rows of its products, the channels of its convolution and its value heads are grouped by key head, so that a rank's part of each
is one block: query, key, values and gates of a key head, one after the other; rates and decays of its value heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megaswift.megatron.compat import mark_split
from megaswift.megatron.kernels.causal_conv import causal_conv
from megaswift.megatron.kernels.context_parallel import Share, by_heads, by_tokens
from megaswift.megatron.kernels.flash_linear_attention import describe, flash_linear_attention, refusal
from megaswift.megatron.kernels.gated_delta import gated_delta, gated_norm
from megaswift.models.kinds import Delta

# What tensor-parallel ranks hold parts of, beside the products.
_SPLIT = ("conv1d_weight", "dt_bias", "A_log")


class GatedDeltaNet(MegatronModule):
    """Linear attention whose state, and whose convolution, begin anew at each sample of a row.

    Where ranks share the tokens of a row they exchange them for heads, whose states go through the whole row, and back.

    Args:
        delta: numbers and sizes of its heads.
        column, row: classes of its products.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        delta: Delta,
        column: type,
        row: type,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number, self.delta = layer_number, delta
        self.tp_group = parallel_state.get_tensor_model_parallel_group() if pg_collection is None else pg_collection.tp
        size = self.tp_group.size()
        self.key_heads, self.heads, self.each = delta.key_heads // size, delta.heads // size, delta.heads // delta.key_heads
        channels, values = delta.channels, delta.heads * delta.value_dim
        linear: dict[str, Any] = dict(
            config=config, init_method=config.init_method, bias=False, is_expert=False, tp_group=self.tp_group
        )
        out: dict[str, Any] = dict(linear, input_is_parallel=True, skip_bias_add=True)
        linear |= dict(gather_output=False, skip_bias_add=False)
        self.in_proj = column(config.hidden_size, channels + values, **linear)
        self.in_proj_ba = column(config.hidden_size, 2 * delta.heads, **linear)
        self.out_proj = row(values, config.hidden_size, **out)
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        shapes = {
            "conv1d_weight": (channels // size, 1, delta.width),
            "dt_bias": (self.heads,),
            "A_log": (self.heads,),
            "norm_weight": (delta.value_dim,),
        }
        for name, shape in shapes.items():
            values_of = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=device))
            self.register_parameter(name, values_of)
            if name in _SPLIT:
                mark_split(values_of, 0)
        self.norm_weight: Tensor

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] to ([s, b, h], no bias)."""
        layout: Any = kwargs.get("packed_seq_params")
        share: Share | None = getattr(layout, "share", None)
        mixed, rates = (
            linear(hidden_states)[0].unflatten(-1, (self.key_heads, -1)) for linear in (self.in_proj, self.in_proj_ba)
        )
        heads = slice(0, self.key_heads)
        if share is not None:  # a state goes through a whole row: each rank takes whole rows of some heads
            here = self.key_heads // dist.get_world_size(share.group)
            heads = slice(dist.get_rank(share.group) * here, (dist.get_rank(share.group) + 1) * here)
            mixed, rates = by_heads(mixed, share), by_heads(rates, share)
        s, b = mixed.shape[:2]
        lengths = list(share.samples) * b if share is not None else getattr(layout, "seq_lens", None) or [s] * b
        mixed, rates = (one.transpose(0, 1).flatten(0, 1) for one in (mixed, rates))
        output = self._mix(mixed, rates, lengths, heads)
        output = output.unflatten(0, (b, s)).transpose(0, 1).flatten(3)
        output = output if share is None else by_tokens(output, share)
        return self.out_proj(output.flatten(2).contiguous())

    def _mix(self, mixed: Tensor, rates: Tensor, lengths: list[int], own: slice) -> Tensor:
        """What products gave for samples that lie one after the other, to the heads' results [t, key heads, value heads of each, dv].

        Args:
            mixed: [t, key heads, rows of a key head]; rates: [t, key heads, 2 x value heads of each].
            own: which of this tensor-parallel rank's key heads these are.
        """
        delta, (t, key_heads, _) = self.delta, mixed.shape
        values, count = self.each * delta.value_dim, key_heads * self.each
        filters, dt_bias, a_log = (getattr(self, name).unflatten(0, (self.key_heads, -1))[own].flatten(0, 1) for name in _SPLIT)
        heads, gate = mixed.split([2 * delta.key_dim + values, values], dim=-1)
        heads = F.silu(causal_conv(heads.reshape(t, -1), filters.squeeze(1), lengths)).view(t, key_heads, -1)
        query, key, value = heads.split([delta.key_dim, delta.key_dim, values], dim=-1)
        beta, alpha = (one.reshape(t, count) for one in rates.split(self.each, dim=-1))
        wide = torch.promote_types(alpha.dtype, torch.float32)
        decay = -a_log.to(wide).exp() * F.softplus(alpha.to(wide) + dt_bias)
        value, gate = (one.reshape(t, count, -1) for one in (value, gate))
        named = self.config.deterministic_mode or self.config.attention != "fastest"
        rule = flash_linear_attention if not named and refusal(query, value) is None else gated_delta
        output = rule(query, key, value, decay, beta.sigmoid(), lengths)
        # All ranks hold this weight, and each applies it to its own heads: its gradient is summed over them.
        weight = copy_to_tensor_model_parallel_region(self.norm_weight, group=self.tp_group)
        return gated_norm(output, gate, weight, self.config.layernorm_epsilon).view(t, key_heads, self.each, -1)

    def kernel(self) -> str:
        """What computes its rule on this GPU, in words. Compiles the kernels where that is needed."""
        like = dict(dtype=self.config.params_dtype, device="cuda")
        query = torch.empty((1, self.key_heads, self.delta.key_dim), **like)
        return describe(query, torch.empty((1, self.heads, self.delta.value_dim), **like))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Megatron-Core's description: what is split over tensor-parallel ranks is cut along its first axis."""
        made = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {name: getattr(self, name) for name in _SPLIT}
        return made | make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets)

    def set_for_recompute_input_layernorm(self) -> None:
        """Megatron-Core asks it of attention under FP8, which is refused."""


__all__ = ["GatedDeltaNet"]
