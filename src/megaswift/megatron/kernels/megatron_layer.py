"""Megatron-Core's embedding, attention, MLP and layer with this folder's operations in them.

Every class keeps its parent's parameters, names and checkpoints, and hands over to the parent wherever a setting asks for
something that the fused path does not do (dropout, selective recompute, inference, cross attention, activation offload),
and wherever a part is not exactly of the class that the path computes: a subclass may have another formula, so every
fused path asks for `type(...) is`. What is not fused goes the general way, through the modules' own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaswift.megatron.compat import become, mark_split
from megaswift.megatron.kernels.attention import dense_causal, packed_causal
from megaswift.megatron.kernels.block_attention import block_causal
from megaswift.megatron.kernels.context_parallel import shared_causal
from megaswift.megatron.kernels.embedding import embedding
from megaswift.megatron.kernels.linear_ops import PLAIN, linear_ops_of
from megaswift.megatron.kernels.parallel_linear import ColumnParallel, RowParallel
from megaswift.megatron.kernels.rms_norm import add_rms_norm, rms_norm_keep
from megaswift.megatron.kernels.rope import rotate, split_rotate_qkv
from megaswift.megatron.kernels.swiglu import GATES, SILU, swiglu
from megaswift.megatron.kernels.swiglu_linear import FirstProduct, swiglu_linear
from megaswift.megatron.norms import RMS_FORMS
from megaswift.models.kinds import MAIN


class FusedEmbedding(VocabParallelEmbedding):
    """Token embedding whose gradient is added to `main_grad` row by row. Set it as the class of an existing module."""

    def forward(self, input_: Tensor) -> Tensor:
        """ids [b, s] to [b, s, h], or to [s / tp, b, h] where the parent scatters the sequence."""
        world = self.tp_group.size()
        if self.reduce_scatter_embeddings:
            input_ = input_.t()
        output = embedding(input_, self.weight, first_row=self.vocab_start_index, partial=world > 1)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group)


def fuse_embedding(model: Any) -> Any:
    """Let the embedding add its gradient to main_grad; to be called before the model is wrapped for data parallelism.

    A tied output layer must then compute its loss by `linear_cross_entropy(..., shared_with_embedding=model.pre_process)`.
    """
    if not model.pre_process or type(model.embedding.word_embeddings) is not VocabParallelEmbedding:
        return model
    become(model.embedding.word_embeddings, FusedEmbedding)
    # Megatron-Core sets it so that two uses' placeholders sum to zero; here only one of the two uses makes a placeholder.
    model.embedding.word_embeddings.weight.zero_out_wgrad = False
    return model


class CoreAttention(torch.nn.Module):
    """Causal attention by a kernel that the user chose or that is deterministic, after rotating query and key.

    Otherwise FusedSelfAttention calls the fastest kernel itself and this module is not used. Query is [s, b, heads, d],
    key and value are [s, b, kv heads, d] of this tensor-parallel rank; the result is [s, b, heads * d]. Scores are kept
    in fp32 by all kernels, so apply_query_key_layer_scaling, which guards fp16 scores, has nothing to do here.

    Args:
        rotation: which of the layout's tables rotate query and key; None: none does.
        query_rotation: which of them rotate queries, where these have others.
        window: how many tokens a token sees, itself among them; None: all before it.
        score_cap: a score s becomes score_cap * tanh(s / score_cap); None: it stays.
        norm: makes a norm of each head's query and key after they rotate, of a config, its width and its epsilon.
        sinks: whether each head's softmax has one score more, which is trained (`softmax_offset`, as Megatron-Core calls it).
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        rotation: str | None = MAIN,
        query_rotation: str | None = None,
        window: int | None = None,
        score_cap: float | None = None,
        norm: Any = None,
        sinks: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_offset: torch.nn.Parameter | None = None
        if sinks:
            device = None if config.use_cpu_initialization else torch.cuda.current_device()
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device))
            mark_split(self.softmax_offset, 0)
        self.kernels = _kernels(config)
        self.softmax_scale, self.rotation, self.query_rotation = softmax_scale, rotation, query_rotation or rotation
        self.window, self.score_cap = window, score_cap
        if norm is not None:
            self.q_layernorm, self.k_layernorm = (norm(config, config.kv_channels, config.layernorm_epsilon) for _ in range(2))

    @property
    def limits(self) -> dict[str, Any]:
        """What kernels are told of the scores."""
        return {"window": self.window, "cap": self.score_cap, "sinks": self.softmax_offset}

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Megatron-Core's description: sinks are cut by heads."""
        own = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(own, prefix, {"softmax_offset": 0}, sharded_offsets)

    def turned(self, query: Tensor, key: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        """Query and key, rotated by the layer's tables and normed then, where they are."""
        if self.rotation is not None:
            query, key = rotate(query, *tables[self.query_rotation]), rotate(key, *tables[self.rotation])
        if hasattr(self, "q_layernorm"):
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        layout = packed_seq_params
        if layout is not None:
            query, key = self.turned(query, key, layout.tables)
        if layout is not None and layout.share is not None:
            return shared_causal(query, key, value, layout.share, self.softmax_scale, **self.limits)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [b, heads, s, d]
        if layout is None or layout.seq_lens is None:
            mixed = self._attend(query, key, value)
        else:
            pieces = zip(*(part.split(layout.seq_lens, dim=2) for part in (query, key, value)))
            mixed = torch.cat([self._attend(*piece) for piece in pieces], dim=2)
        return mixed.permute(2, 0, 1, 3).reshape(mixed.shape[2], mixed.shape[0], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        narrow = self.window is not None and self.window < key.shape[2]
        if narrow or self.score_cap is not None or self.softmax_offset is not None:
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            limits = self.limits | {"window": self.window if narrow else None}
            return block_causal(query, key, value, self.softmax_scale, **limits).transpose(1, 2)
        grouped = query.shape[1] != key.shape[1]
        with sdpa_kernel(self.kernels, set_priority=True):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped, scale=self.softmax_scale
            )


def _kernels(config: TransformerConfig) -> list[SDPBackend]:
    """The attention kernels that may be used, the preferred one first."""
    flash, plain = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
    return {"flash": [flash], "plain": [plain], "fastest": [flash, plain]}[config.attention]


class FusedSelfAttention(SelfAttention):
    """Self attention with split, rotation and core attention fused. The layout travels as `packed_seq_params`:

    `tables`, by name cos and sin [s, b or 1, (1,) d]; for packed rows also `cu_seqlens_q`, `max_seqlen_q` and, on the CPU,
    `seq_lens`; for rows that several ranks share `share`.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] to ([s, b, h], bias)."""
        layout: Any = kwargs.get("packed_seq_params")
        if not self._takes(layout, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        query, key, value, gate = self._query_key_value(hidden_states, layout)
        core = self.core_attention
        scale: float | None = core.softmax_scale
        limits: Any = core.limits
        if getattr(layout, "share", None) is not None:
            context = shared_causal(query, key, value, layout.share, scale, **limits)
        elif getattr(layout, "seq_lens", None) is None and layout.cu_seqlens_q is None:
            context = dense_causal(query, key, value, scale, **limits)
        else:
            lengths = getattr(layout, "seq_lens", None)
            context = packed_causal(
                query, key, value, layout.cu_seqlens_q, layout.max_seqlen_q, scale, lengths=lengths, **limits
            )
        return self.linear_proj(context if gate is None else context * torch.sigmoid(gate))

    def _query_key_value(self, hidden_states: Tensor, layout: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query [s, b, heads, d], key and value [s, b, kv heads, d] of this rank, normalised and rotated.

        The last one are the gates of the heads, [s, b, heads * d], or None where queries bring none.
        """
        heads, groups = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        core = self.core_attention
        rotation: str | None = core.rotation
        normed = self.q_layernorm is not None and type(self.q_layernorm) is not IdentityOp
        gated = self.config.attention_output_gate
        if (
            rotation is not None
            and not (normed or gated)
            and core.query_rotation == rotation
            and not hasattr(core, "q_layernorm")
        ):
            mixed, bias = self._product_and_bias(hidden_states)
            return *split_rotate_qkv(mixed, *layout.tables[rotation], heads=heads, groups=groups, bias=bias), None
        mixed, _ = self.linear_qkv(hidden_states)
        s, b, _ = mixed.shape
        view = mixed.view(s, b, groups, -1, self.hidden_size_per_attention_head)
        first, key, value = view[..., :-2, :], view[..., -2, :], view[..., -1, :]
        gate = None
        if gated:  # each group's queries, then their gates
            first, gate = first.chunk(2, dim=-2)
            gate = gate.reshape(s, b, -1)
        query = first.reshape(s, b, heads, -1)
        if normed:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key = core.turned(query, key, layout.tables)
        return query, key, value, gate

    def _product_and_bias(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The query-key-value product without its bias, and the bias, which the split adds."""
        layer = self.linear_qkv
        if type(layer) is not ColumnParallel:  # an adapter, for example, adds the bias itself
            return layer(hidden_states)[0], None
        before, layer.skip_bias_add = layer.skip_bias_add, True
        try:
            return layer(hidden_states)
        finally:
            layer.skip_bias_add = before

    def _takes(self, layout: Any, arguments: dict[str, Any]) -> bool:
        exact = type(self) is FusedSelfAttention and type(self.core_attention) is CoreAttention
        wanted = exact and getattr(layout, "tables", None) is not None and layout.qkv_format == "sbhd"
        asks = any(
            arguments.get(name) is not None
            for name in ("inference_context", "inference_params", "key_value_states", "attention_bias")
        )
        off = self.checkpoint_core_attention or self.offload_qkv_linear or self.offload_core_attention or self.offload_attn_proj
        shared = self.config.num_query_groups < self.world_size  # key-value heads repeated over ranks
        # A kernel that the user named, or a deterministic one, is CoreAttention's to choose.
        named = self.config.attention != "fastest" or self.config.deterministic_mode
        return wanted and not (_plain(self) or asks or off or shared or named)


# Layers, by their exact class, that take [gate, up] themselves: (layer, [gate, up], residual or None, whether the result is
# needed) -> this rank's part of the second product, or None if this one does not.
SECOND_PRODUCTS: dict[type, Callable[[Any, Tensor, Tensor | None, bool], Tensor | None]] = {}


class FusedMLP(MLP):
    """An MLP whose gated activation is fused with the second product (see `swiglu_linear` for the options)."""

    recompute_activation = True
    recompute_first = False  # the first product, too
    overlap = False

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] to ([s, b, h], bias)."""
        if not self._takes() or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **kwargs)
        both, _ = self.linear_fc1(hidden_states)
        fused = self._second_product(both, hidden_states)
        return self.linear_fc2(swiglu(both, self._gated_by)) if fused is None else (self._reduced(fused), None)

    def forward_and_add(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        """residual + this MLP of hidden_states, a layer's result; without tensor parallelism the second product adds it itself."""
        if not self._takes():
            output, bias = self.forward(hidden_states)
            return residual + (output if bias is None else output + bias)
        # Megatron-Core's checkpoint of a layer runs it without gradients first, and a second time for the graph alone.
        needed = not (self.training and self.config.recompute_granularity == "full" and torch.is_grad_enabled())
        both, _ = self.linear_fc1(hidden_states)
        alone = self.linear_fc2.tp_group.size() == 1
        fused = self._second_product(both, hidden_states, residual if alone else None, needed)
        if fused is not None:
            return fused if alone else residual + self._reduced(fused)
        output, bias = self.linear_fc2(swiglu(both, self._gated_by))
        return residual + (output if bias is None else output + bias)

    def _second_product(
        self, both: Tensor, hidden_states: Tensor, residual: Tensor | None = None, needed: bool = True
    ) -> Tensor | None:
        """This rank's part of act(gate) * up times the second weight, plus residual; None where no fused path computes it."""
        second = self.linear_fc2
        if self._fuses_second():
            return swiglu_linear(both, second.weight, **self._options(hidden_states), residual=residual, needed=needed)
        again = self.recompute_activation or self.config.recompute_granularity == "full"
        own = SECOND_PRODUCTS.get(type(second)) if again and self._gated_by == SILU else None
        return None if own is None else own(second, both, residual, needed)

    def _reduced(self, output: Tensor) -> Tensor:
        """The sum over tensor-parallel ranks, scattered along the sequence under sequence parallelism."""
        second = self.linear_fc2
        if second.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output, group=second.tp_group)
        return reduce_from_tensor_model_parallel_region(output, group=second.tp_group)

    def _options(self, hidden_states: Tensor) -> dict[str, Any]:
        layer, first = self.linear_fc1, None
        plain = type(layer) is ColumnParallel and layer.weight.requires_grad
        if self.recompute_first and plain:
            first = FirstProduct(hidden_states, layer.weight, layer.tp_group if layer.sequence_parallel else None)
        linear_ops = linear_ops_of(self.config)
        options = dict(recompute=self.recompute_activation, overlap=self.overlap, linear_ops=linear_ops, first=first)
        return options | {"gated_by": self._gated_by}

    @property
    def _gated_by(self) -> str:
        return GATES[self.activation_func]

    def _takes(self) -> bool:
        config = self.config
        gated = config.gated_linear_unit and self.activation_func in GATES and config.activation_func_clamp_value is None
        gated = gated and (self._gated_by == SILU or linear_ops_of(config) is PLAIN)  # the products in FP8 know SiLU
        return type(self) is FusedMLP and gated and not (_plain(self) or config.add_bias_linear or config.glu_linear_offset)

    def _fuses_second(self) -> bool:
        """Whether the second product is a plain one; an adapter around it, for example, is not."""
        second = self.linear_fc2
        return type(second) is RowParallel and not second.explicit_expert_comm and second.weight.requires_grad


class FusedTransformerLayer(TransformerLayer):
    """A pre-norm layer whose residual additions happen inside the norms, forward and backward."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] to ([s, b, h], context)."""
        if not self._takes(kwargs) or args:
            return super().forward(hidden_states, *args, **kwargs)
        first, second = self.input_layernorm, self.pre_mlp_layernorm
        form = RMS_FORMS[type(first)]
        residual, x = rms_norm_keep(hidden_states, first.weight, first.eps, form)
        names = ("attention_mask", "rotary_pos_emb", "packed_seq_params")
        delta, bias = self.self_attention(x, **{name: kwargs.get(name) for name in names})
        if bias is not None:
            delta = delta + bias
        residual, x = add_rms_norm(residual, delta, second.weight, second.eps, form)
        if type(self.mlp) is FusedMLP:
            return self.mlp.forward_and_add(x, residual), kwargs.get("context")
        delta, bias = self.mlp(x)
        return residual + (delta if bias is None else delta + bias), kwargs.get("context")

    def _takes(self, arguments: dict[str, Any]) -> bool:
        norms = type(self.input_layernorm) in RMS_FORMS and type(self.input_layernorm) is type(self.pre_mlp_layernorm)
        added = self.self_attn_bda is get_bias_dropout_add and self.mlp_bda is get_bias_dropout_add
        exact = type(self) is FusedTransformerLayer and norms and added
        asks = any(
            arguments.get(name) is not None
            for name in ("inference_context", "inference_params", "context_mask", "attention_bias")
        )
        off = (
            self.recompute_input_layernorm
            or self.recompute_pre_mlp_layernorm
            or self.recompute_mlp
            or self.offload_attn_norm
            or self.offload_mlp_norm
        )
        dropout = self.training and self.hidden_dropout > 0.0
        single = type(self.cross_attention) is IdentityOp
        return exact and single and not (_plain(self) or asks or off or dropout)


def _plain(module: Any) -> bool:
    """Whether the config asks for Megatron-Core's own way through every module, as a check that watches modules does."""
    return module.config.plain_layers
