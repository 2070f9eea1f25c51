"""Megatron-Core's distributed optimizer with its step in two passes: one for the gradient's norm, one for everything else.

Megatron-Core's own step without apex scales the gradients in place, updates each tensor by itself, copies it to bf16
afterwards, and waits for the norm on the host. Here clipping and the division by the number of tokens are a device scalar
that the update multiplies by. Parameters, state and checkpoints stay what they were.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megaswift.megatron.compat import become, gradients_for_norm, weights_of_shard
from megaswift.megatron.kernels.fused_adamw import AddressTable, FusedAdamW, sum_of_squares
from megaswift.megatron.kernels.pinned import HostTensors
from megaswift.megatron.kernels.small_moments import read_moments, write_moments


class _Sharded(DistributedOptimizer):
    """A DistributedOptimizer whose inner step already wrote the low-precision weights."""

    def _copy_main_params_to_model_params(self) -> None:
        """Nothing left to copy: FusedAdamW writes the model's weights in its pass."""

    def _get_main_param_and_optimizer_states(self, model_param: Any) -> dict[str, Tensor]:
        """What a checkpoint keeps of a parameter: fp32, however the moments are kept in memory."""
        tensors = super()._get_main_param_and_optimizer_states(model_param)
        if self.optimizer.moments == "fp32":
            return tensors
        mean, square = read_moments(tensors)
        return {"param": tensors["param"], "exp_avg": mean, "exp_avg_sq": square}

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Tensor]) -> None:
        if self.optimizer.moments == "fp32":
            super()._set_main_param_and_optimizer_states(model_param, tensors)
            return
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        main.copy_(tensors["param"])
        write_moments(self.optimizer.state[main], tensors["exp_avg"].to(main.device), tensors["exp_avg_sq"].to(main.device))


def _squared_norm(inner: DistributedOptimizer) -> Tensor:
    """Sum of squares of this rank's part of the gradient, summed over the ranks that share it."""
    grads = gradients_for_norm(inner)
    table = inner.__dict__.setdefault("_norm_table", AddressTable())
    total = sum_of_squares(grads, table) if grads else torch.zeros((), device=torch.cuda.current_device())
    group = inner.get_grad_stats_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer) -> Tensor:
    """Euclidean norm of the gradients at hand over all ranks, each weight counted once: an fp32 device scalar.

    Megatron-Core's own, without apex and on a CPU, adds up the squares of a tensor one after the other in fp32: a table of
    28 million values is off by 5e-4 then.
    """
    return torch.stack([_squared_norm(inner) for inner in optimizer.chained_optimizers]).sum().sqrt()


class FusedOptimizer(ChainedOptimizer):
    """The chain of optimizers that `get_megatron_optimizer` returns, after `fuse_optimizer`.

    `divisor` is what the summed loss stands for, the sum of its tokens' weights, above 0 and on the device; gradients are
    divided by it. It is used by one update and then forgotten.
    """

    divisor: Tensor | None = None

    @torch.no_grad()
    def get_grad_norm(self) -> Tensor:  # type: ignore[override]
        """Norm of the gradient of the mean loss, before clipping: a device scalar, nothing waits for it."""
        norm = gradient_norm(self)
        return norm * self._share(norm)

    @torch.no_grad()
    def update(self, norm: Tensor, limit: float = math.inf) -> None:
        """Clip and step, from gradients that `prepare_grads` made ready.

        The decision is the device's: where the norm is not finite or beyond `limit`, no tensor changes. A caller that then
        reads such a norm calls `forget_step`, so that the count of steps follows.
        """
        factor = self._share(norm)
        if self.config.clip_grad > 0.0:
            factor = factor * (self.config.clip_grad / (norm + 1e-6)).clamp_max(1.0)
        # An infinite norm is within an infinite limit, and clips to a factor of 0, which times an infinite gradient is NaN.
        factor = torch.where(norm.isfinite() & (norm <= limit), factor, math.nan)
        for inner in self.chained_optimizers:
            inner.optimizer.gradient_factor = factor
        self.divisor = None
        self.step_with_ready_grads()

    def forget_step(self) -> None:
        """Take back the last update's count; its tensors were left alone."""
        for inner in self.chained_optimizers:
            for group in inner.optimizer.param_groups:
                group["step"] -= 1

    @torch.no_grad()
    def step(self) -> tuple[bool, Tensor | None, None]:
        """(whether gradients were usable, gradient norm as a device scalar, None)."""
        if self.prepare_grads():
            return False, None, None
        norm = self.get_grad_norm()
        self.update(norm)
        return True, norm, None

    def _share(self, like: Tensor) -> Tensor:
        return torch.ones_like(like) if self.divisor is None else self.divisor.to(like).reciprocal()


def _link_weights(inner: DistributedOptimizer) -> None:
    """Tell each fp32 shard where its bf16 weight lies in the buffers."""
    for mains, models in zip(inner.shard_fp32_from_float16_groups, inner.model_float16_groups):
        for main, model in zip(mains, models):
            main.low_precision_weight = weights_of_shard(inner, model)


def _move_masters(inner: DistributedOptimizer, host: HostTensors) -> None:
    """Let each fp32 shard keep its values in host memory: the same tensors, wherever they are held, with other storage.

    Parameters that are fp32 themselves have no such copy.
    """
    for mains in inner.shard_fp32_from_float16_groups:
        for main in mains:
            main.data = host.copy_of(main)


def fuse_optimizer(optimizer: Any, moments: str = "fp32", on_host: bool = False) -> Any:
    """Give a freshly built Megatron-Core optimizer the fused step; its moments are not allocated yet.

    It stays as it is unless it is AdamW, in apex's form, under the distributed optimizer with fp32 state, in bf16 or fp32.

    Args:
        moments: how they are kept: "fp32", "bf16" or "8bit".
        on_host: master weights and moments lie in page-locked host memory, which the kernels read and write over PCIe.
    """
    chain = getattr(optimizer, "chained_optimizers", [])
    if type(optimizer) is not ChainedOptimizer or not chain:
        return optimizer
    for inner in chain:
        if type(inner) is not DistributedOptimizer or any("step" not in group for group in inner.optimizer.param_groups):
            return optimizer
        config = inner.config
        if (
            config.optimizer != "adam"
            or not config.decoupled_weight_decay
            or config.fp16
            or config.use_precision_aware_optimizer
        ):
            return optimizer
    for inner in chain:
        _link_weights(inner)
        become(inner, _Sharded)
        become(inner.optimizer, FusedAdamW)
        inner.optimizer.moments = moments
        if on_host:
            inner.optimizer.host = HostTensors()
            _move_masters(inner, inner.optimizer.host)
    if on_host and torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the master weights leave counts as free from here on
    return become(optimizer, FusedOptimizer)
