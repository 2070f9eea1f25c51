"""Adapters on a built model: the classes of its layers are exchanged here and nowhere else, the base is frozen.

The layers keep their weights, names and everything around the product, so the base loads as before; what is saved is the
adapter alone, described by the same list of parameters that export reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megaswift.megatron.experts import StackedLinear
from megaswift.megatron.freeze import need_gradients_of_inputs
from megaswift.megatron.kernels.counter_dropout import Dropout, token_keys
from megaswift.megatron.kernels.linear_ops import PLAIN, linear_ops_of
from megaswift.megatron.kernels.lora import LoraCall, Parts, Rows, lora_linear, row_norms, scaled_rows, take_out
from megaswift.megatron.kernels.lora_experts import ExpertHalves, add_low_rank
from megaswift.megatron.kernels.megatron_layer import SECOND_PRODUCTS
from megaswift.megatron.kernels.packed import PACKED_OPS, dense
from megaswift.megatron.kernels.parallel_linear import ColumnParallel, RowParallel
from megaswift.megatron.latent_attention import Replicated
from megaswift.megatron.layer_specs import local_name
from megaswift.megatron.packed_layers import PackedColumn, PackedReplicated, PackedRow
from megaswift.megatron.router import Router
from megaswift.models.adapters import LORA_A, LORA_B, MAGNITUDE, Lora, Site, is_expert, local_module
from megaswift.models.parameters import Arrangement, Parameter


class StepKeys:
    """Which tokens the layers are working on, for dropout: set by each layer before it runs, recomputed or not."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0  # set by the trainer before the first micro batch of a step
        self.current: Tensor | None = None

    def of(self, origins: Tensor | None) -> Tensor:
        """int32 [s * b], in the order of hidden states; origins as a MicroBatch has them."""
        if origins is None:
            raise ValueError("adapters with dropout need to know which tokens a micro batch holds")
        return token_keys(origins, self.seed, self.step).t().reshape(-1).contiguous()


class _LoraLayer:
    """What both kinds share; set by `attach`."""

    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    lora_magnitude: torch.nn.Parameter | None
    lora_call: LoraCall
    step_keys: StepKeys

    def _keys(self) -> Tensor | None:
        layer: Any = self
        return self.step_keys.current if layer.training and self.lora_call.dropout is not None else None

    def _product(self, x: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
        keys = self._keys()
        call = replace(
            self.lora_call,
            sequence=bool(options.get("sequence_parallel")),
            reduce_grad=bool(options.get("allreduce_dgrad")),
            group=options.get("tp_group"),
        )
        if self.lora_magnitude is None:
            return lora_linear(x, weight, options.get("bias"), self.lora_A, self.lora_B, keys, call)
        norms = self._norms(weight)
        product = lora_linear(x, weight, None, self.lora_A, self.lora_B, keys, call)
        scaled = scaled_rows(product, self.lora_magnitude, norms, call.parts)
        return scaled if options.get("bias") is None else scaled + options["bias"]

    def _norms(self, weight: Any) -> Tensor:
        """Of the rows of W + scale * B A, in the order of B."""
        layer: Any = self
        columns = layer.tp_group if isinstance(self, RowParallel) else None
        return row_norms(dense(weight, self.lora_A.dtype), self.lora_A, self.lora_B, self.lora_call, columns)


class LoraColumn(_LoraLayer, ColumnParallel):
    """A column-parallel layer with an adapter: A whole on every rank, B cut as the weight is."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._product(input, weight, kwargs)


class LoraRow(_LoraLayer, RowParallel):
    """A row-parallel layer with an adapter: A cut as the weight is, B whole on every rank."""

    def after_swiglu(self, both: Tensor, residual: Tensor | None, needed: bool) -> Tensor | None:
        """This rank's part of the product of silu(gate) * up, see `LoraCall.gated`; None where this adapter has more to do."""
        if self.lora_magnitude is not None:
            return None
        call = replace(self.lora_call, gated=True, needed=needed)
        return lora_linear(both, self.weight, None, self.lora_A, self.lora_B, self._keys(), call, residual)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._product(input, weight, kwargs)


class LoraReplicated(_LoraLayer, Replicated):
    """A layer that every rank has whole, with an adapter that every rank has whole, too."""

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, {})

    def _keys(self) -> Tensor | None:
        """Of the tokens of this rank."""
        keys = super()._keys()
        if keys is None or not self.config.sequence_parallel:
            return keys
        return keys.chunk(self.tp_group.size())[self.tp_group.rank()]


class LoraExperts(StackedLinear):
    """The matrices of one product of all experts here, with an adapter on each.

    As the matrices are: A [experts, parts * r, columns] of the first product and B [experts, rows, r] of the second are whole
    on every rank that shares an expert, the others are cut.
    """

    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    lora_scale: float

    @property
    def halves(self) -> ExpertHalves:
        return ExpertHalves(self.lora_A, self.lora_B, self.lora_scale)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        y = super().forward(x, ends)
        add_low_rank(y, x, self.halves, ends)
        return y


class LoraRouter(Router):
    """A router with an adapter, which every rank holds whole and applies to its own tokens."""

    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    lora_scale: float

    def logits(self, x: Tensor) -> Tensor:
        low = F.linear(x.to(self.dtype), self.lora_A.to(self.dtype))
        return super().logits(x) + self.lora_scale * F.linear(low, self.lora_B.to(self.dtype))

    def routing_matrix(self) -> Tensor:
        return super().routing_matrix() + self.lora_scale * (self.lora_B.detach().float() @ self.lora_A.detach().float())


class Attached:
    """The adapter of a built model on one rank: which of its parameters are trained, and how they are saved.

    Args:
        held: name of a parameter in the local model -> what it is a part of; of experts, which are one, the first one here.
    """

    def __init__(self, lora: Lora, held: Mapping[str, Parameter], keys: StepKeys) -> None:
        self.lora, self.held, self.keys = lora, held, keys

    def keys_of(self, origins: Tensor | None) -> Tensor | None:
        """Keys of a micro batch's tokens in this step; None where nothing is dropped."""
        return self.keys.of(origins) if self.lora.dropout > 0.0 else None

    def sharded_state_dict(self, model: torch.nn.Module, prefix: str = "") -> dict[str, Any]:
        """Megatron-Core's description of the parts that this rank holds; nothing of the base is in it."""
        own = dict(model.named_parameters())
        return {f"{prefix}{name}": described(own[name], parameter) for name, parameter in self.held.items()}


def described(value: Tensor, parameter: Parameter) -> Any:
    """A rank's part of a parameter, as Megatron-Core saves and loads it: several pieces where its arrangement has blocks."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if is_expert(parameter):
        return _described_experts(value, parameter)
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    split, lead = parameter.arrangement.split, len(parameter.place)
    layers = [(axis, place, count) for axis, (place, count) in enumerate(zip(parameter.place, parameter.counts, strict=True))]
    copies = (0, rank if split is None else 0, parallel_state.get_data_parallel_rank(with_context_parallel=True))
    options: dict[str, Any] = {"prepend_axis_num": lead, "allow_shape_mismatch": parameter.padded}

    def piece(key: str, data: Tensor, cut: list[tuple[int, int, int]], replica: Any) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, data, *layers, *cut, replica_id=replica, **options)

    if split is None or tp == 1:
        return piece(parameter.key, value, [], copies)
    if split or len(parameter.arrangement.blocks) == 1:
        return piece(parameter.key, value, [(lead + split, rank, tp)], copies)
    places = parameter.arrangement.places(tp, rank)

    def build(key: str, data: Tensor, replica: Any, _range: Any) -> list[ShardedTensor]:
        rows = sum(parameter.arrangement.blocks)
        return [
            piece(key, data[first : first + count], [(lead, start // count, rows // count)], replica)
            for first, start, count in places
        ]

    return ShardedTensorFactory(parameter.key, value, build, torch.cat, copies)


def _described_experts(value: Tensor, parameter: Parameter) -> Any:
    """As `described`, of all experts here.

    Args:
        value: [experts, rows, columns] of this rank.
        parameter: of the first of them.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    group, split, axis = (
        parallel_state.get_expert_tensor_parallel_group(),
        parameter.arrangement.split,
        len(parameter.place) - 1,
    )
    size, rank, here = group.size(), group.rank(), len(value)
    layers = [(number, parameter.place[number], parameter.counts[number]) for number in range(axis)]
    copies = (0, rank if split is None else 0, parallel_state.get_expert_data_parallel_rank())
    block = (axis, parameter.place[-1] // here, parameter.counts[-1] // here)
    if size == 1 or split is None or split or len(parameter.arrangement.blocks) == 1:
        cut = [] if split is None or size == 1 else [(axis + 1 + split, rank, size)]
        return ShardedTensor.from_rank_offsets(
            parameter.key, value, *layers, block, *cut, replica_id=copies, prepend_axis_num=axis
        )
    places, rows = parameter.arrangement.places(size, rank), sum(parameter.arrangement.blocks)

    def build(key: str, data: Tensor, replica: Any, _range: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                key, own[first : first + count], *layers, (axis, parameter.place[-1] + number, parameter.counts[-1]),
                (axis + 1, start // count, rows // count), replica_id=replica, prepend_axis_num=axis + 1,
            )
            for number, own in enumerate(data)
            for first, start, count in places
        ]  # fmt: skip

    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).view(here, -1, parts[0].shape[-1])

    return ShardedTensorFactory(parameter.key, value, build, merge, copies)


def attach(
    model: Any,
    lora: Lora,
    base: Sequence[Parameter],
    parameters: Sequence[Parameter],
    first_layer: int,
    seed: int,
    values: Callable[[Parameter], Tensor | None],
) -> Attached:
    """Freeze a built model and give its layers the adapter; before it is wrapped for data parallelism.

    Args:
        model: ChatModel of one pipeline stage.
        base: the model's parameters; parameters: the adapter's.
        first_layer: the stage's first layer in the whole model.
        values: the whole first value of each of the adapter's parameters, which is cut here; None for lengths of rows that
            are those of the base.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    keys = StepKeys(seed)
    listed = {parameter.name: parameter for parameter in parameters}
    held: dict[str, Parameter] = {}
    routed: dict[str, list[dict[str, Parameter]]] = {}
    for site in lora.sites(base):
        name = local_module(site.module, first_layer, len(model.decoder.layers))
        if name is None:
            continue
        halves = {half: listed[f"{site.module}.{half}"] for half in lora.of_site(site)}
        if site.is_expert:
            routed.setdefault(local_name(name), []).append(halves)
            continue
        module = model.get_submodule(name)
        if site.is_router:
            _exchange_router(module, halves, lora, values)
        else:
            _exchange(module, site, halves, lora, keys, values)
        held |= {f"{name}.{half}": parameter for half, parameter in halves.items()}
    for name, experts in routed.items():
        own = _exchange_experts(model.get_submodule(name), experts, lora, values, model.config.params_dtype)
        held |= {f"{name}.{half}": parameter for half, parameter in own.items()}
    every = dict(model.named_parameters())
    for parameter in lora.whole(base):
        name = _local_parameter(parameter.name, first_layer, model)
        if name is not None:
            _begin(every[name], listed[parameter.name], values(listed[parameter.name]))
            held[name] = listed[parameter.name]
    if lora.dropout > 0.0:
        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(_sees(keys), with_kwargs=True)
    need_gradients_of_inputs(model)
    return Attached(lora, held, keys)


@torch.no_grad()
def _begin(weight: torch.nn.Parameter, parameter: Parameter, value: Tensor | None) -> None:
    """Let a weight of the base be trained, from a value where an adapter brings one."""
    weight.requires_grad_(True)
    if value is None or weight.is_meta:
        return
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if parameter.padded:  # rows that only pad the vocabulary stay zero
        value = torch.nn.functional.pad(value, (0, 0, 0, weight.shape[0] * tp - value.shape[0]))
    weight.copy_(parameter.arrangement.shard(value, tp)[rank])


def _sees(keys: StepKeys) -> Callable[..., None]:
    def hook(_module: Any, _args: Any, options: dict[str, Any]) -> None:
        keys.current = options["packed_seq_params"].token_keys

    return hook


# Axis that tensor parallelism cuts -> the classes that an adapter knows, plain and in 4 bits, and the one with an adapter.
_ADAPTED: dict[int | None, tuple[tuple[type, type], type]] = {
    0: ((ColumnParallel, PackedColumn), LoraColumn),
    1: ((RowParallel, PackedRow), LoraRow),
    None: ((Replicated, PackedReplicated), LoraReplicated),
}


def _exchange(
    module: Any,
    site: Site,
    halves: Mapping[str, Parameter],
    lora: Lora,
    keys: StepKeys,
    values: Callable[[Parameter], Any],
) -> None:
    split = site.base.arrangement.split
    kinds, adapted = _ADAPTED[split]
    if type(module) not in kinds:
        raise TypeError(f"{site.module} is a {type(module).__name__}: an adapter knows only {kinds[0].__name__}")
    weight, tp, rank = module.weight, module.tp_group.size(), module.tp_group.rank()
    packed = type(module) is kinds[1]
    values_of = weight.data if packed else weight
    device = _device_of(values_of)
    module.lora_magnitude = None
    for name, parameter in halves.items():
        if name == MAGNITUDE:
            continue
        part = parameter.arrangement.shard(values(parameter), tp)[rank].to(device, module.config.params_dtype).contiguous()
        module.register_parameter(name, _marked(torch.nn.Parameter(part), parameter, tp))
        if split is None:  # all ranks make the same gradient, unless each has tokens of its own
            module.get_parameter(name).partial_gradient = module.config.sequence_parallel
    module.__class__ = adapted
    module.step_keys = keys
    first = 0 if site.is_column else rank * weight.shape[1]
    dropout = Dropout(lora.dropout, site.module, first) if lora.dropout > 0.0 else None
    order = halves[LORA_B].arrangement
    outputs = rows_of(site.base.arrangement, site.tensors, tp)
    module.lora_call = LoraCall(
        Parts(outputs, rows_of(order, range(len(site.tensors)), tp)),
        lora.scale,
        PACKED_OPS if packed else linear_ops_of(module.config),
        dropout=dropout,
    )
    if lora.is_part_of_base and not values_of.is_meta:
        take_out(module.weight.data, module.lora_A, module.lora_B, module.lora_call)
    if MAGNITUDE in halves:
        begun = values(halves[MAGNITUDE])
        part = module._norms(weight) if begun is None else halves[MAGNITUDE].arrangement.shard(begun, tp)[rank]
        made = torch.nn.Parameter(part.to(device, module.config.params_dtype).contiguous())
        del module.lora_magnitude
        module.register_parameter(MAGNITUDE, _marked(made, halves[MAGNITUDE], tp))
        if split is None:
            module.get_parameter(MAGNITUDE).partial_gradient = module.config.sequence_parallel


SECOND_PRODUCTS[LoraRow] = LoraRow.after_swiglu


def take_out_whole(weight: Tensor, site: Site, lora: Lora, start: Mapping[str, Tensor]) -> None:
    """Take what an adapter began as out of a matrix that is no rank's part, in place.

    Args:
        start: the whole first values by names of parameters.
    """
    halves = lora.of_site(site)
    parts = Parts(
        rows_of(site.base.arrangement, site.tensors, 1),
        rows_of(halves[LORA_B].arrangement, range(len(site.tensors)), 1),
    )
    a, b = (start[halves[half].name] for half in (LORA_A, LORA_B))
    take_out(weight, a, b, LoraCall(parts, lora.scale, PLAIN))


def _exchange_router(module: Any, halves: Mapping[str, Parameter], lora: Lora, values: Callable[[Parameter], Any]) -> None:
    """Give a router an adapter; what its ranks add to the gradients are those of their own tokens."""
    if type(module) is not Router:
        raise TypeError(f"an adapter knows only Router, not {type(module).__name__}")
    tp = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in halves.items():
        value = values(parameter).to(_device_of(module.weight), module.config.params_dtype).contiguous()
        module.register_parameter(name, _marked(torch.nn.Parameter(value), parameter, tp))
    adapted: Any = module
    adapted.__class__, adapted.lora_scale = LoraRouter, lora.scale


def _exchange_experts(
    module: Any, experts: Sequence[Mapping[str, Parameter]], lora: Lora, values: Callable[[Parameter], Any], dtype: torch.dtype
) -> dict[str, Parameter]:
    """Give one product of a layer's experts their adapters; the halves of the first expert here.

    Args:
        experts: of the whole layer, A and B of each.
    """
    if type(module) is not StackedLinear:
        raise TypeError(f"an adapter knows only StackedLinear, not {type(module).__name__}")
    group, here = parallel_state.get_expert_tensor_parallel_group(), len(module.weight)
    first = parallel_state.get_expert_model_parallel_rank() * here
    own = experts[first : first + here]
    for name in (LORA_A, LORA_B):
        parts = [halves[name].arrangement.shard(values(halves[name]), group.size())[group.rank()] for halves in own]
        made = torch.nn.Parameter(torch.stack(parts).to(_device_of(module.weight.data), dtype))
        module.register_parameter(name, _marked_expert(made, own[0][name], group.rank()))
    adapted: Any = module
    adapted.__class__, adapted.lora_scale = LoraExperts, lora.scale
    return dict(own[0])


def _device_of(weight: Tensor) -> Any:
    return "cpu" if weight.is_meta else weight.device  # where weights come and go the adapter stays


def _marked_expert(made: torch.nn.Parameter, parameter: Parameter, rank: int) -> torch.nn.Parameter:
    """As `_marked`, for experts, whose gradients other ranks share: see `megatron.experts`.

    Args:
        rank: among those that hold parts of an expert. What each of them holds whole counts in the norm on the first.
    """
    split = parameter.arrangement.split
    made.allreduce = False  # type: ignore[attr-defined]
    made.tensor_model_parallel = True  # type: ignore[attr-defined]
    made.partition_dim, made.partition_stride = -1 if split is None else split + 1, 1  # type: ignore[attr-defined]
    made.shared = split is None and rank > 0  # type: ignore[attr-defined]
    made.partial_expert_gradient = split is None  # type: ignore[attr-defined]
    return made


def _marked(made: torch.nn.Parameter, parameter: Parameter, tp: int) -> torch.nn.Parameter:
    """What Megatron-Core's gradient norm, and `sum_gradients`, ask a parameter."""
    split = parameter.arrangement.split
    made.tensor_model_parallel = split is not None and tp > 1  # type: ignore[attr-defined]
    made.partition_dim, made.partition_stride = -1 if split is None else split, 1  # type: ignore[attr-defined]
    made.partial_gradient = split is None  # type: ignore[attr-defined]
    return made


def rows_of(arrangement: Arrangement, tensors: Sequence[int], tp: int) -> tuple[Rows, ...]:
    """Where rows of some Hugging Face tensors lie in a rank's part of a fused matrix."""
    groups, turn = arrangement.turns(tp)
    width, starts, place = sum(count for _, count in turn), {}, 0
    for tensor, count in turn:
        starts[tensor] = (place, count)
        place += count
    return tuple(Rows(groups, width, *starts[tensor]) for tensor in tensors)


def _local_parameter(name: str, first: int, model: Any) -> str | None:
    local: str | None = name
    if name.startswith("decoder.layers."):
        local = local_module(name, first, len(model.decoder.layers))
    if local is None:
        return None
    local = local_name(local)
    return local if local in dict(model.named_parameters()) else None
