"""The gradients of a trainer as a state that is saved, read and compared as weights are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
            if isinstance(item, (ShardedTensor, ShardedTensorFactory)) and getattr(item.data, "main_grad", None) is None:
                continue  # it stays as it is
            if isinstance(item, ShardedTensor):
                gradient = item.data.main_grad / self.divisor
                result[name] = replace(item, data=gradient, dtype=gradient.dtype)
            elif isinstance(item, ShardedTensorFactory):
                result[name] = replace(item, data=item.data.main_grad / self.divisor)
            else:
                result[name] = item
        return result

    def _gather(self) -> None:
        """Put the parts that the data-parallel ranks reduced together again: the distributed optimizer keeps them apart."""
        for buffer in (buffer for wrapped in self.trainer.wrapped for buffer in wrapped.buffers):
            for bucket in buffer.buckets:
                group = buffer.data_parallel_group
                size = dist.get_world_size(group)
                if size > 1:
                    own = bucket.grad_data.chunk(size)[dist.get_rank(group)].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
