"""The gradients of a trainer as a state that is saved, read and compared as weights are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megaswift.train.trainer import Trainer


class Gradients:
    """A trainer's gradients in place of its weights, so that `checkpoint.save` saves them.

    Args:
        divisor: what the buffers are divided by: `Trainer.gradient_divisor`.
    """

    def __init__(self, trainer: Trainer, divisor: float) -> None:
        self.trainer, self.divisor = trainer, divisor
        self.bare_model = self
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.some_layers = None if trainer.some_layers is None else ""

    def settle_weights(self) -> None:
        """Nothing to wait for: no weight is read."""

    def sharded_state_dict(self, prefix: str = "", metadata: Any = None) -> dict[str, Any]:
        """Megatron-Core's sharded state dict of the model with fp32 gradients as its data."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

        self._gather()
        state = self.trainer.bare_model.sharded_state_dict(prefix=prefix, metadata=metadata)
        result = {}
        for name, item in state.items():
            if not isinstance(item, (ShardedTensor, ShardedTensorFactory)):
                result[name] = item
                continue
            own = getattr(item.data, "main_grad", None)
            if own is None and isinstance(item.data, torch.nn.Parameter):
                continue  # it is frozen
            gradient = (
                torch.zeros_like(item.data, dtype=torch.float32) if own is None else own / self.divisor
            )  # buffers have none
            kind = {"dtype": gradient.dtype} if isinstance(item, ShardedTensor) else {}
            result[name] = replace(item, data=gradient, **kind)
        return result

    def _gather(self) -> None:
        """Put the parts that the data-parallel ranks reduced together again: the distributed optimizer keeps them apart."""
        for buffer in (one for ddp in self.trainer.wrapped for one in ddp.buffers + ddp.expert_parallel_buffers):
            for bucket in buffer.buckets:
                group = buffer.data_parallel_group
                size = dist.get_world_size(group)
                if size > 1:
                    own = bucket.grad_data.chunk(size)[dist.get_rank(group)].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
