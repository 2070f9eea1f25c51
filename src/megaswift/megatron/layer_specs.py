"""Our parts for Megatron-Core's layers, and the specification of a stage's layers built from what each is made of.

TransformerEngine and apex are not needed. What Megatron-Core lacks without them stands in kernels/: attention that takes
packed rows and is not quadratic in memory, a norm that works under sequence parallelism, and fused operations whose
weight gradients go straight into the fp32 buffers. Each has a Triton or cuDNN form and a plain PyTorch one for CPUs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megaswift.megatron.compat import mlp_spec
from megaswift.megatron.experts import ExpertsLayer
from megaswift.megatron.gated_delta_net import GatedDeltaNet
from megaswift.megatron.kernels.context_parallel import Share
from megaswift.megatron.kernels.megatron_layer import (
    CoreAttention,
    FusedMLP,
    FusedSelfAttention,
    FusedTransformerLayer,
)
from megaswift.megatron.kernels.parallel_linear import ColumnParallel, RowParallel
from megaswift.megatron.latent_attention import LatentAttention, LatentSubmodules, Replicated
from megaswift.megatron.layers import SumLayer, WidthNorm
from megaswift.megatron.norms import LayerNorm, RMSNorm, WideLayerNorm, WideRMSNorm, ZeroCentredLayerNorm, ZeroCentredRMSNorm
from megaswift.megatron.packed_layers import PackedColumn, PackedReplicated, PackedRow
from megaswift.megatron.router import Counted
from megaswift.models.kinds import EXPERTS, GATED_DELTA, LATENT, Kind

# The modules behind the names in a Kind.
ATTENTIONS: dict[str, type] = {"grouped_query": FusedSelfAttention, LATENT: LatentAttention, GATED_DELTA: GatedDeltaNet}
MLPS: dict[str, type] = {"gated": FusedMLP, "plain": FusedMLP, EXPERTS: ExpertsLayer}
NORMS: dict[str, type] = {
    "rms": RMSNorm,
    "wide_rms": WideRMSNorm,
    "zero_centred_rms": ZeroCentredRMSNorm,
    "layer": LayerNorm,
    "zero_centred_layer": ZeroCentredLayerNorm,
    "wide_layer": WideLayerNorm,
}
PLACES = ("before", "around", "behind")  # where norms may stand


@dataclass
class SequenceLayout(PackedSeqParams):
    """Where the tokens of a micro batch stand; it travels to every attention layer as Megatron's packed_seq_params.

    Args:
        tables: rotation name -> cos and sin, [s, b or 1, 1, head_dim], already scaled by the RoPE type's attention factor.
        seq_lens: lengths of the samples that share the one row, or None for plain causal rows; with them `cu_seqlens_q`
            (int32 on the device) and `max_seqlen_q` are set.
        share: this rank's part of the rows, where several ranks share them (context parallelism).
        counted: what routers of experts are told; None where there are none.
        token_keys: int32 [s * b], a key of each token for masks that depend on it (dropout of adapters); None: there are none.
    """

    qkv_format: str = "sbhd"
    tables: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seq_lens: list[int] | None = None
    share: Share | None = None
    counted: Counted | None = None
    token_keys: Tensor | None = None


# Norms are saved under TransformerEngine's names of its fused modules; how they are called in the built model.
_NORMS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


# With experts the norm before them is in no fused module, and the shared expert's gate is a module of its own.
_WITH_EXPERTS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "mlp.shared_gate.weight": "mlp.shared_experts.gate_weight",
}
# Latent attention's first products are in no fused module; the norms of its narrow states are in those after them.
_LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_EXPERT = re.compile(r"\.local_experts\.\d+")  # all experts of a layer are one parameter of the built model


def local_name(name: str) -> str:
    """The parameter of the built model that a checkpoint name stands for."""
    for local, stored in (_NORMS | _WITH_EXPERTS | _LATENT_NORMS).items():
        name = name.replace(stored, local)
    return _EXPERT.sub("", name)


def block_spec(kinds: Sequence[Kind], packed: bool = False) -> TransformerBlockSubmodules:
    """The specification of this pipeline stage's layers.

    Args:
        kinds: of the layers, from the first to the last. The norm behind the last one is of that layer's kind.
        packed: the linear layers and experts hold frozen weights in few bits.

    Raises ValueError for a name that no module stands for.
    """
    specs = {kind: layer_spec(kind, packed) for kind in set(kinds)}
    return TransformerBlockSubmodules(
        layer_specs=[specs[kind] for kind in kinds], layer_norm=_named(NORMS, "norm", kinds[-1].norm)
    )


def layer_spec(kind: Kind, packed: bool = False) -> ModuleSpec:
    """The specification of a layer; `packed` as for `block_spec`.

    The key map saves the norms under the names of TransformerEngine's fused modules, so that checkpoints load there; the
    norm before experts is no part of a fused module there.
    """
    norm = _named(NORMS, "norm", kind.norm)
    before: Any = IdentityOp if kind.norms == "behind" else norm
    q_norm: Any = norm if kind.qk_norm else IdentityOp
    k_norm = q_norm
    if kind.qk_norm and kind.qk_norm_over_heads:
        q_norm, k_norm = (
            ModuleSpec(module=WidthNorm, params={"heads": heads, "wide": kind.norm == "wide_rms"})
            for heads in ("num_attention_heads", "num_query_groups")
        )
    core: Any = dict(rotation=kind.rotation, query_rotation=kind.query_rotation, window=kind.window, score_cap=kind.score_cap)
    core |= dict(sinks=kind.sinks)
    module, params = _layer(kind, norm)
    column, row = (PackedColumn, PackedRow) if packed else (ColumnParallel, RowParallel)
    attention = _named(ATTENTIONS, "attention", kind.attention)
    if kind.delta is not None:
        mixer = ModuleSpec(module=attention, params={"delta": kind.delta, "column": column, "row": row})
    elif kind.latent is not None:
        mixer = _latent(kind, packed)
    else:
        mixer = ModuleSpec(
            module=attention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=column,
                core_attention=partial(CoreAttention, norm=norm if kind.qk_norm_rotated else None, **core),
                linear_proj=row,
                q_layernorm=q_norm,
                k_layernorm=k_norm,
            ),
        )
    return ModuleSpec(
        module=module,
        params=params,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if kind.beside else before,
            mlp=_mlp(kind, MLPSubmodules(linear_fc1=column, linear_fc2=row), packed),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_saved_names(kind),
        ),
    )


def _latent(kind: Kind, packed: bool) -> ModuleSpec:
    """The specification of latent attention, whose core gets queries and keys that are rotated already."""
    column, row, whole = (PackedColumn, PackedRow, PackedReplicated) if packed else (ColumnParallel, RowParallel, Replicated)
    return ModuleSpec(
        module=_named(ATTENTIONS, "attention", kind.attention),
        params={"latent": kind.latent, "rotation": kind.rotation},
        submodules=LatentSubmodules(column, row, whole, partial(CoreAttention, rotation=None)),
    )


def _saved_names(kind: Kind) -> dict[str, str]:
    """How parts of a layer's modules are called in a checkpoint."""
    names = _NORMS if kind.experts is None else _WITH_EXPERTS
    if kind.latent is None:
        return names
    return {own: stored for own, stored in names.items() if own != "input_layernorm."} | _LATENT_NORMS


def _layer(kind: Kind, norm: type) -> tuple[type, dict[str, Any]]:
    """The module of a layer and its own arguments."""
    if kind.norms not in PLACES:
        raise ValueError(f"a layer's norms stand {kind.norms!r} its parts; they may stand: {', '.join(PLACES)}")
    if kind.norms == "before" and not kind.beside and kind.residual_factor == 1.0:
        return FusedTransformerLayer, {}
    behind = None if kind.norms == "before" else norm
    return SumLayer, {"behind": behind, "beside": kind.beside, "residual_factor": kind.residual_factor}


def _mlp(kind: Kind, submodules: MLPSubmodules, packed: bool) -> Any:
    """The specification of a layer's MLP."""
    module = _named(MLPS, "mlp", kind.mlp)
    if kind.experts is None:
        return mlp_spec(module, submodules)
    return ModuleSpec(module=module, params={"experts": kind.experts, "packed": packed}, submodules=submodules)


def _named(modules: dict[str, Any], part: str, name: str) -> Any:
    if name not in modules:
        raise ValueError(f"a layer's {part} is {name!r}; there are modules for: {', '.join(modules)}")
    return modules[name]
