"""A layer's experts, spread over expert-parallel ranks: tokens go to the ranks that hold their experts, and come back.

Weights are two stacked matrices a layer, [experts here, 2f, h] and [experts here, h, f]; a checkpoint holds them under the
keys and in the shapes of Megatron-Core's SequentialMLP. Their gradients are summed over the expert-data-parallel group
always, so their `allreduce` mark is False whatever the layout: Megatron-Core's linear layers set it by ep alone and sum over
the wrong group where ep is 1 and etp below tp.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaswift.megatron.kernels.biased_experts import biased_expert_mlp, clamped_swiglu, expert_of_rows
from megaswift.megatron.kernels.expert_mlp import expert_mlp, grouped, sum_rows, take_rows
from megaswift.megatron.kernels.expert_rows import weighted_swiglu
from megaswift.megatron.kernels.lora_experts import ExpertHalves, lora_expert_mlp
from megaswift.megatron.kernels.megatron_layer import FusedMLP
from megaswift.megatron.kernels.packed import dense
from megaswift.megatron.router import Counted, Router
from megaswift.models.kinds import Experts


class ExpertsLayer(MegatronModule):
    """Router, experts and, where the layer has one, the expert that every token goes to; in the place of an MLP.

    Without sequence parallelism tensor-parallel ranks hold the same tokens: each then routes its part of them.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, experts: Experts, packed: bool = False, **_: Any
    ) -> None:
        super().__init__(config)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.splits = self.tp_group.size() > 1 and not config.sequence_parallel
        self.router = Router(config, experts, self.tp_group if self.splits else None)
        self.experts = StackedExperts(config, experts, packed)
        self.shared_experts = _shared_expert(config, submodules, experts.shared_ffn) if experts.shared_ffn else None
        self.shared_gate = _Gate(config) if experts.shared_ffn and experts.shared_gate else None
        self.counted: Counted | None = None  # of the micro batch that comes now

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """hidden_states [s, b, h] to ([s, b, h], no bias)."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        count = tokens.shape[0]
        if self.splits:
            tokens = F.pad(tokens, (0, 0, 0, -count % self.tp_group.size()))
            tokens = scatter_to_sequence_parallel_region(tokens, group=self.tp_group)
        padding, weight = self._counted(count) if self.counted is not None else (None, None)
        output = self.experts(tokens, *self.router(tokens, padding, weight))
        if self.splits:
            output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False, group=self.tp_group)
        output = output[:count].view(hidden_states.shape)
        if self.shared_experts is not None:
            shared, _ = self.shared_experts(hidden_states)
            output = output + (shared if self.shared_gate is None else self.shared_gate(hidden_states) * shared)
        return output, None

    def _counted(self, count: int) -> tuple[Tensor | None, Tensor]:
        """Which of this rank's tokens are padding, None where none is, and the weight of the micro batch.

        Args:
            count: tokens that came in.
        """
        assert self.counted is not None
        padding, size, rank = self.counted.padding, self.tp_group.size(), self.tp_group.rank()
        if padding is not None:
            padding = padding.t()  # [s, b], as hidden states have it
            padding = (padding.chunk(size)[rank] if self.config.sequence_parallel else padding).reshape(-1)
        if self.splits and (padding is not None or count % size):
            whole = torch.zeros(count, dtype=torch.bool) if padding is None else padding
            padding = F.pad(whole, (0, -count % size), value=True).chunk(size)[rank]
        device = self.router.weight.device
        return None if padding is None else padding.to(device, non_blocking=True), self.counted.weight


def tell_layers(layers: Iterable[torch.nn.Module]) -> None:
    """Let every layer of experts know the micro batch that it is called with, also when it is called again in a backward pass."""

    def tell(layer: Any, _: Any, arguments: dict[str, Any]) -> None:
        layer.mlp.counted = getattr(arguments.get("packed_seq_params"), "counted", None)

    for layer in layers:
        if isinstance(getattr(layer, "mlp", None), ExpertsLayer):
            layer.register_forward_pre_hook(tell, with_kwargs=True)


class _Gate(torch.nn.Module):
    """How much each token takes of the expert that all go to."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.zeros((1, config.hidden_size), dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] to [..., 1], between 0 and 1."""
        return torch.sigmoid(F.linear(x, self.weight))


def _shared_expert(config: TransformerConfig, submodules: MLPSubmodules, ffn: int) -> FusedMLP:
    """The expert that every token goes to: an MLP like a dense layer's, of another size."""
    own = copy.copy(config)
    own.ffn_hidden_size = ffn  # the second product's size is read from the config
    return FusedMLP(own, submodules, ffn_hidden_size=ffn)


@dataclass(frozen=True)
class _Exchange:
    """How tokens get to their experts: rows to send and where they come from, and how many go from which rank to which.

    Attributes:
        slot: int64 [rows], which choice of which token (token * chosen + number) each row to be sent is.
        places: int64 [tokens * chosen, copies], where each choice's rows stand among those sent.
        sent, received: rows for, and from, each rank of the group.
        order: int64 [rows received], their order by expert; back: the other direction.
        ends: int32 [experts here], the row after each expert's last.
    """

    slot: Tensor
    places: Tensor
    sent: list[int]
    received: list[int]
    order: Tensor
    back: Tensor
    ends: Tensor


class StackedLinear(torch.nn.Module):
    """The matrices of one product of all experts here, [experts, rows, columns]."""

    def __init__(self, weight: Tensor | None, split: int, bias: Tensor | None = None) -> None:
        """`weight`: None where one is to come that is held in few bits; `bias`: [experts, rows]."""
        super().__init__()
        self.weight: Any = None if weight is None else torch.nn.Parameter(weight)
        self.bias: Any = None if bias is None else torch.nn.Parameter(bias)
        both: tuple[Any, ...] = (self.weight, self.bias)
        for values in (one for one in both if one is not None):
            values.allreduce = False  # see the head of this file
            # Each rank's part counts in the gradient norm, also where etp is 1: the optimizer shares it out over ranks.
            values.tensor_model_parallel = True
            values.partition_dim, values.partition_stride = min(split, values.dim() - 1), 1

    @property
    def halves(self) -> ExpertHalves | None:
        """Its adapters, where it has any."""
        return None

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [t, columns], sorted by expert, to [t, rows]; training makes both products at once (`expert_mlp`)."""
        made = grouped(x, dense(self.weight, x.dtype).transpose(1, 2), ends)
        return made if self.bias is None else made + self.bias[expert_of_rows(ends, len(x))]


class StackedExperts(MegatronModule):
    """The experts of this rank, and the way of the tokens to all experts and back.

    Ranks that share the experts (ep) and the columns of each (etp) form one group. A row goes to each rank that holds a
    part of its expert, so one exchange serves both; the parts are added up where the token came from.
    """

    def __init__(self, config: TransformerConfig, experts: Experts, packed: bool = False) -> None:
        super().__init__(config)
        self.ep, self.etp = parallel_state.get_expert_model_parallel_group(), parallel_state.get_expert_tensor_parallel_group()
        self.edp = parallel_state.get_expert_data_parallel_group()
        self.group = parallel_state.get_expert_tensor_and_model_parallel_group()
        if self.group.rank() != self.ep.rank() * self.etp.size() + self.etp.rank():
            raise ValueError(
                "Megatron-Core numbers the ranks of a tensor- and expert-parallel group in another way than expected"
            )
        self.clamp, biased = experts.clamp, experts.biases
        if biased != (experts.clamp is not None) or (biased and self.etp.size() > 1):
            raise ValueError("experts with biases have clamped gates, and are whole on each rank")
        self.all, self.here, self.chosen = experts.count, experts.count // self.ep.size(), experts.chosen
        ffn, hidden = experts.ffn // self.etp.size(), config.hidden_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        shapes = (self.here, 2 * ffn, hidden), (self.here, hidden, ffn)
        made: dict[str, Any] = dict(dtype=config.params_dtype, device=device)
        first, second = (None if packed else torch.zeros(size, **made) for size in shapes)
        biases = [torch.zeros(size[:2], **made) if biased else None for size in shapes]
        self.linear_fc1, self.linear_fc2 = StackedLinear(first, 1, biases[0]), StackedLinear(second, 2, biases[1])

    def forward(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """What the chosen experts make of each token, added up by weight.

        Args:
            tokens: [t, h], of this rank alone.
            weights, chosen: fp32 and int64 [t, chosen], the router's.
        """
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        ends = torch.searchsorted(flat[order], torch.arange(self.all, device=flat.device), right=True).to(torch.int32)
        each = self.chosen
        if self.group.size() == 1:
            places = _inverse(order).view(-1, each)
            rows = take_rows(tokens, order // each, places)
            own = take_rows(weights.flatten(), order, places.view(-1, 1))
            return sum_rows(self._mlp(rows, own, ends), places, order // each)
        plan = self._exchange(order, ends)
        source, places = plan.slot // each, plan.places.view(len(tokens), -1)
        rows = take_rows(tokens, source, places)
        own = take_rows(weights.flatten(), plan.slot, plan.places)
        rows, own = (all_to_all(self.group, part, plan.received, plan.sent) for part in (rows, own))
        order, back = plan.order, plan.back
        rows, own = take_rows(rows, order, back.unsqueeze(1)), take_rows(own, order, back.unsqueeze(1))
        output = take_rows(self._mlp(rows, own, plan.ends), back, order.unsqueeze(1))
        return sum_rows(all_to_all(self.group, output, plan.sent, plan.received), places, source)

    def _mlp(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        plain = getattr(self.config, "plain_layers", False)  # every module is called, as a check that watches modules wants it
        if plain and self.clamp is not None:
            hidden = clamped_swiglu(self.linear_fc1(rows, ends), *self.clamp)
            return (self.linear_fc2(hidden, ends) * weights.unsqueeze(1)).to(rows.dtype)
        if plain:
            return self.linear_fc2(weighted_swiglu(self.linear_fc1(rows, ends), weights), ends)
        first, second = self.linear_fc1, self.linear_fc2
        if self.clamp is not None:
            assert first.bias is not None and second.bias is not None
            return biased_expert_mlp(rows, weights, (first.weight, first.bias), (second.weight, second.bias), ends, self.clamp)
        if first.halves is not None or second.halves is not None:
            return lora_expert_mlp(rows, weights, first.weight, second.weight, first.halves, second.halves, ends)
        return expert_mlp(rows, weights, first.weight, second.weight, ends)

    def _exchange(self, order: Tensor, ends: Tensor) -> _Exchange:
        """Agree with all ranks of the group who sends how many rows to whom; the host has to know."""
        size, copies = self.group.size(), self.etp.size()
        counts = ends.diff(prepend=ends.new_zeros(1))
        table = torch.empty(size * self.all, dtype=counts.dtype, device=counts.device)
        dist.all_gather_into_tensor(table, counts.contiguous(), group=self.group)
        coming = table.view(size, -1, self.here)[:, self.ep.rank()]  # [rank, expert here]
        going = counts.view(-1, self.here).sum(1).tolist()  # rows for the experts of each expert-parallel rank
        received = coming.sum(1).tolist()
        blocks = [block for part in order.split(going) for block in (part,) * copies]
        slot = order if copies == 1 else torch.cat(blocks)
        expert = torch.arange(self.here, device=order.device).repeat(size)
        expert = expert.repeat_interleave(coming.flatten(), output_size=sum(received))
        arranged = expert.argsort(stable=True)
        return _Exchange(
            slot=slot,
            places=slot.argsort(stable=True).view(-1, copies),
            sent=[len(block) for block in blocks],
            received=received,
            order=arranged,
            back=_inverse(arranged),
            ends=coming.sum(0).cumsum(0).to(torch.int32),
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """All experts here as one block of the checkpoint's tensor; where etp cuts gate and up, a block for each half of each.

        Weights in few bits are no part of a checkpoint.
        """
        axis, replica = len(sharded_offsets), (0, 0, self.edp.rank())
        here = (axis, self.ep.rank(), self.ep.size())
        first, second = f"{prefix}linear_fc1.weight", f"{prefix}linear_fc2.weight"
        keys = f"{prefix}experts.linear_fc1.weight", f"{prefix}experts.linear_fc2.weight"
        rank, size = self.etp.rank(), self.etp.size()
        more: dict[str, Any] = dict(replica_id=replica, prepend_axis_num=axis)
        made: dict[str, Any] = {}
        for part in ("linear_fc1", "linear_fc2") if self.clamp is not None else ():
            bias = getattr(self, part).bias
            key = f"{prefix}experts.{part}.bias"
            made[f"{prefix}{part}.bias"] = ShardedTensor.from_rank_offsets(key, bias, *sharded_offsets, here, **more)
        if not isinstance(self.linear_fc1.weight, Tensor):
            return made
        made[second] = ShardedTensor.from_rank_offsets(
            keys[1], self.linear_fc2.weight, *sharded_offsets, here, (axis + 2, rank, size), **more
        )
        if size == 1:
            made[first] = ShardedTensor.from_rank_offsets(keys[0], self.linear_fc1.weight, *sharded_offsets, here, **more)
        else:
            build, merge = self._halves(sharded_offsets), lambda parts: _whole(parts, self.here)
            made[first] = ShardedTensorFactory(keys[0], self.linear_fc1.weight, build, merge, replica)
        return made

    def _halves(self, sharded_offsets: tuple) -> Any:
        """Megatron-Core's build function: gate and up of each expert, of which this rank holds a part each."""
        axis, rank, size = len(sharded_offsets), self.etp.rank(), self.etp.size()
        first, total = self.ep.rank() * self.here, self.all

        def build(key: str, weight: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key, half, *sharded_offsets, (axis, first + expert, total), (axis + 1, number * size + rank, 2 * size),
                    replica_id=replica_id, prepend_axis_num=axis + 1,
                )
                for expert, matrix in enumerate(weight)
                for number, half in enumerate(matrix.chunk(2))
            ]  # fmt: skip

        return build


def _whole(parts: list[Tensor], experts: int) -> Tensor:
    """Megatron-Core's merge function: gate and up of each expert back into one tensor."""
    return torch.cat(parts).view(experts, -1, parts[0].shape[-1])


def _inverse(order: Tensor) -> Tensor:
    """Where each number stands in a permutation."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
