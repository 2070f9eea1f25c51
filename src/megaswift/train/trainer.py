"""One training step: forward and backward over the micro batches by Megatron-Core's pipeline schedule, then the update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megaswift.megatron import compat
from megaswift.megatron.graphs import Graphs
from megaswift.megatron.kernels.context_parallel import shard_batch
from megaswift.megatron.kernels.linear_ops import linear_ops_of
from megaswift.megatron.kernels.lora import sum_gradients
from megaswift.megatron.kernels.main_grad import settle_main_grads, zero_main_grads
from megaswift.megatron.kernels.megatron_optimizer import FusedOptimizer, fuse_optimizer, gradient_norm
from megaswift.megatron.model import ChatModel, Chunks, chunks_of, run_micro_batch
from megaswift.models.adapters import LORA_B
from megaswift.models.stages import group_of_micro_batches
from megaswift.weights.torch_dtypes import TORCH_DTYPES

if TYPE_CHECKING:
    from megaswift.data.batches import MicroBatch
    from megaswift.run.spec import Run, Schedule
    from megaswift.train.objectives import Loss, Objective

# fp16: losses are sums over tokens, so the usual 2^16 and 1 for means over some 256 tokens are 2^8 and 2^-8 here.
INITIAL_LOSS_SCALE, MIN_LOSS_SCALE = 2.0**8, 2.0**-8
# Gradients that are reduced at a time while the backward pass goes on; None: what Megatron-Core takes, 40 million or more.
BUCKET_SIZE: int | None = None


@dataclass
class StepResult:
    """What one step gave; equal on all ranks."""

    loss: float  # of the global batch: the sum of its losses over the sum of their weights
    grad_norm: float | None  # before clipping; None if the step was skipped
    learning_rate: float
    weight: float  # what the losses were divided by
    metrics: dict[str, float]  # the objective's own figures, summed over the global batch
    tokens: int = 0  # all its tokens, padding left out
    skipped: bool = False  # fp16 only: gradients overflowed, no update
    loss_scale: float | None = None  # fp16 only: what the next step's loss is multiplied by
    nonfinite: bool = False  # loss or gradient norm is NaN or infinite, and in fp16 no lower loss scale can help; no update
    spike: bool = False  # the gradient norm is beyond Trainer.norm_limit; no update


class Trainer:
    """The model of this process with its gradients' buffers, optimizer and schedule, and the objective that it is trained by."""

    def __init__(
        self,
        model: ChatModel | Chunks,
        run: Run,
        objective: Objective,
    ) -> None:
        self.bare_model, self.objective = model, objective
        compat.use_our_adamw()
        self.chunks, config = chunks_of(model), model.config
        overlap, self.gathers_late = run.parallel.overlap_grad_reduce, run.parallel.overlap_param_gather
        self.chunks[0].graphs = self.graphs = Graphs(
            self.chunks[0].decoder, run.memory.cuda_graphs, overlap, model.adapter is not None
        )
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=False,
            overlap_grad_reduce=overlap,
            overlap_param_gather=self.gathers_late,
            bucket_size=BUCKET_SIZE,
        )
        half = config.bf16 or config.fp16
        with self.graphs.stream_of_step():  # the wrapper's hooks belong to the stream that is current here
            self.wrapped = [
                DistributedDataParallel(config, settings, Float16Module(config, chunk) if half else chunk)
                for chunk in self.chunks
            ]
        waits = [wrapped.no_sync for wrapped in self.wrapped]
        config.no_sync_func = (waits if len(waits) > 1 else waits[0]) if overlap else None
        if self.gathers_late:
            for wrapped, chunk in zip(self.wrapped, self.chunks, strict=True):
                wait_for_whole_layers(wrapped, chunk)
        options = optimizer_config(run)
        optimizer = get_megatron_optimizer(options, self.wrapped, group_options(options, model))
        # Under fp16 it stays as it was: the loss scaler needs Megatron's own step.
        self.optimizer = fuse_optimizer(optimizer, run.optimizer.state_dtype, on_host=run.memory.optimizer_on_host)
        for chained in optimizer.chained_optimizers:
            chained.optimizer.allocate()
        self.fused = isinstance(self.optimizer, FusedOptimizer)
        self.scheduler = schedule(self.optimizer, run.schedule, run.optimizer.weight_decay)
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = self._finalize
        self.run_schedule = get_forward_backward_func()
        self.norm_limit = math.inf  # a step with a larger gradient norm changes nothing

    @property
    def some_layers(self) -> str | None:
        """Names begin so in a checkpoint whose tensors may lack layers: the optimizer has nothing of what is not trained."""
        model = self.bare_model
        frozen = model.adapter is None and any(not parameter.requires_grad for parameter in model.parameters())
        return "optimizer." if frozen else None

    def close(self) -> None:
        """Let go of model, optimizer and process groups, which would otherwise live as long as this process.

        The wrapper and its gradient hooks hold each other out of Python's sight, and Megatron-Core keeps every config alive,
        whose functions are bound to the trainer.
        """
        for wrapped in self.wrapped:
            wrapped.grad_accs.clear()
        self.chunks[0].graphs = None
        config = self.bare_model.config
        for name in ("grad_scale_func", "finalize_model_grads_func", "no_sync_func", "grad_sync_func", "param_sync_func"):
            setattr(config, name, None)

    def settle_weights(self) -> None:
        """Wait until this rank has all new weights; all ranks call it, before anything but a forward pass reads them."""
        for wrapped in self.wrapped if self.gathers_late else ():
            wrapped.start_param_sync(force_sync=True)

    def step(self, batches: list[MicroBatch]) -> StepResult:
        """Update the weights once from this rank's micro batches of one global batch."""
        return self.update(self.gradients(batches))

    def gradients(self, batches: list[MicroBatch]) -> Tensor:
        """Forward and backward over the micro batches.

        Returns the sums of the global batch, fp64 on the device: losses, weights, and the objective's metrics in their order.
        `gradient_divisor` tells what the gradient buffers must be divided by to be gradients of the mean loss.
        """
        self._look_ahead(batches)
        for wrapped in self.wrapped:
            wrapped.train()
            zero_main_grads(wrapped)
        for chunk in self.chunks:
            if chunk.adapter is not None:
                chunk.adapter.keys.step = int(self.scheduler.num_steps)
        self.optimizer.zero_grad()
        with self.graphs.step(), linear_ops_of(self.bare_model.config).unchanged_weights(len(batches)):
            sums = self._forward_backward(batches, forward_only=False)
        if self.fused:
            self.optimizer.divisor = divisor(sums).float()
        else:
            for wrapped in self.wrapped:
                wrapped.scale_gradients(divisor(sums).float().reciprocal())
        return sums

    def gradient_divisor(self, sums: Tensor) -> float:
        """1 where the buffers are divided already, else the sum of weights: the update does it then."""
        return float(divisor(sums)) if self.fused else 1.0

    def update(self, sums: Tensor) -> StepResult:
        """One step of schedule and optimizer with the gradients at hand, unless something is not finite or a spike."""
        self.scheduler.step(increment=1)  # before the update: step k of n uses the rate of step k, so the last one uses min_lr
        rate = max(group["lr"] for group in self.optimizer.param_groups if group["default_config"])
        before = self._loss_scale()
        skipped = self.optimizer.prepare_grads()  # fp16: gradients of a rank overflowed; all ranks have agreed on it
        mean = sums[0] / divisor(sums)
        if skipped:
            return self._overflowed(self._result(float(mean), None, rate, sums[1:].tolist()), before)
        norm = (self.optimizer.get_grad_norm() if self.fused else gradient_norm(self.optimizer)).to(sums)
        if self.fused:  # the device decides whether the update happens; the host only reads it afterwards
            self.optimizer.update(torch.where(mean.isfinite(), norm, math.nan).float(), limit=self.norm_limit)
        loss, grad_norm, *others = torch.cat((torch.stack((mean, norm)), sums[1:])).tolist()
        result = self._result(loss, grad_norm, rate, others)
        result.nonfinite = not _all_finite(loss, grad_norm)
        result.spike = not result.nonfinite and grad_norm > self.norm_limit
        if self.fused:
            if result.nonfinite or result.spike:
                self.optimizer.forget_step()
        elif not (result.nonfinite or result.spike):
            self._clip(grad_norm)
            self.optimizer.step_with_ready_grads()
        return result

    def _loss_scale(self) -> float | None:
        """What fp16 losses are multiplied by, so that small gradients do not vanish; None in other precisions."""
        return float(self.optimizer.get_loss_scale()) if self.bare_model.config.fp16 else None

    def _result(self, loss: float, grad_norm: float | None, rate: float, others: list[float]) -> StepResult:
        """`others`: the sum of weights and the sums of metrics."""
        weight, *sums = others
        metrics = dict(zip(self.objective.metrics, sums, strict=True))
        return StepResult(loss, grad_norm, rate, weight, metrics, loss_scale=self._loss_scale())

    def _overflowed(self, result: StepResult, scale: float | None) -> StepResult:
        """A step without update. The scaler lowers its scale after two such steps; at its floor that cannot help any more."""
        result.skipped = True
        hopeless = scale is None or scale <= MIN_LOSS_SCALE
        if hopeless or not _all_finite(result.loss, 0.0):
            result.nonfinite, result.grad_norm = True, math.inf
        return result

    def _clip(self, grad_norm: float) -> None:
        """Scale the gradients down to --max_grad_norm; 0 leaves them."""
        for part in self.optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if part.config.clip_grad > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)

    def _finalize(self, chunks: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
        """After the last backward pass: reduce the gradients over ranks; they are divided later, by the sum of weights."""
        for wrapped in self.wrapped:
            settle_main_grads(wrapped)
        finalize_model_grads(chunks, None, **options)
        for wrapped in self.wrapped:
            params = wrapped.params_with_grad
            sum_gradients(params, "partial_gradient", parallel_state.get_tensor_model_parallel_group())
            sum_gradients(params, "partial_expert_gradient", parallel_state.get_expert_tensor_parallel_group())

    def evaluate(self, batches: Iterator[list[MicroBatch]]) -> float:
        """The loss of all batches together: the sum of their losses over the sum of their weights."""
        return self.evaluated(batches)[0]

    @torch.no_grad()
    def evaluated(
        self, batches: Iterator[list[MicroBatch]], objective: Objective | None = None
    ) -> tuple[float, float, dict[str, float]]:
        """The loss of all batches together, what it was divided by, and the sums of the objective's metrics.

        Args:
            objective: another than the trainer's own.
        """
        objective = objective or self.objective
        for wrapped in self.wrapped:
            wrapped.eval()
        sums = torch.zeros(2 + len(objective.metrics), dtype=torch.float64)
        for group in batches:
            self._look_ahead(group)
            sums += self._forward_backward(group, forward_only=True, objective=objective).cpu()
        total, weight, *metrics = sums.tolist()
        found = dict(zip(objective.metrics, metrics, strict=True))
        return total / weight if weight > 0 else 0.0, weight, found

    @torch.no_grad()
    def _look_ahead(self, batches: list[MicroBatch]) -> None:
        """Find what the objective must know of a global batch before its losses, by a forward pass over what is beside it."""
        ahead = self.objective.ahead
        if ahead is None:
            return
        for wrapped in self.wrapped:
            wrapped.eval()
        beside = [batch.mismatched for batch in batches if batch.mismatched is not None]
        sums = self._forward_backward(beside, forward_only=True, objective=ahead.objective)
        ahead.told(sums[0] / divisor(sums))

    def _forward_backward(self, batches: list[MicroBatch], forward_only: bool, objective: Objective | None = None) -> Tensor:
        """Run Megatron-Core's schedule; the sums of losses, weights and metrics over the whole global batch (fp64).

        Args:
            objective: another than the trainer's own.
        """
        objective = objective or self.objective
        reports = forward_backward(self.wrapped, self.bare_model.config, objective, batches, forward_only, self.run_schedule)
        sums = torch.zeros(2 + len(objective.metrics), dtype=torch.float64, device=batches[0].tokens.device)
        for report in reports:  # empty before the last pipeline stage
            sums += report["sums"].to(torch.float64)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            dist.broadcast(
                sums,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return sums


def forward_backward(
    models: list[Any],
    config: Any,
    objective: Objective,
    batches: list[MicroBatch],
    forward_only: bool,
    run_schedule: Any = None,
) -> list[dict[str, Tensor]]:
    """Megatron-Core's schedule over this rank's micro batches, shared with the context-parallel ranks.

    Args:
        models: the chunks of this process, wrapped or not; config: Megatron-Core's, which they share.
        run_schedule: `get_forward_backward_func()`, for who has it already.

    Returns the sums of each micro batch as `forward_step` reports them; nothing before the last pipeline stage.
    """
    if parallel_state.get_context_parallel_world_size() > 1:
        batches = [shard_batch(batch, parallel_state.get_context_parallel_group()) for batch in batches]
    iterators = [iter(batches) for _ in models]
    if len(iterators) > 1:
        pp = parallel_state.get_pipeline_model_parallel_world_size()
        config.microbatch_group_size_per_vp_stage = group_of_micro_batches(len(batches), pp)
    reports: list[dict[str, Tensor]] = (run_schedule or get_forward_backward_func())(
        forward_step_func=partial(forward_step, objective),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=models,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
    )
    return reports


def divisor(sums: Tensor) -> Tensor:
    """What a summed loss and its gradients are divided by: the sum of weights, or 1 where no token has any."""
    return torch.where(sums[1] > 0, sums[1], torch.ones_like(sums[1]))


def wait_for_whole_layers(ddp: DistributedDataParallel, model: ChatModel) -> None:
    """Let a layer wait for all its weights that are under way, and the last norm for those of the output layer.

    Megatron-Core's hooks wait when a module is called; our fused operations take weights from modules that are not.
    """
    wait = compat.wait_for_weights(ddp)

    def hook(parts: list[torch.nn.Module]) -> Any:
        def wait_for_all(*_: Any) -> None:
            for part in parts:
                wait(part)

        return wait_for_all

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(hook(list(layer.modules())))
    if model.post_process:
        model.decoder.final_layernorm.register_forward_pre_hook(hook(list(model.head.modules())))


def _all_finite(loss: float, grad_norm: float) -> bool:
    """Whether loss and norm are finite on every rank; agreed, so that all of them update or none does."""
    bad = torch.tensor(float(not (math.isfinite(loss) and math.isfinite(grad_norm))), device=torch.cuda.current_device())
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bad.item()


def forward_step(objective: Objective, batches: Iterator[MicroBatch], model: Any) -> tuple[Any, Any]:
    """Megatron-Core's forward_step_func, the objective bound: the output of one micro batch, and what takes its loss from it."""
    output = run_micro_batch(model, next(batches), objective)

    def loss_function(loss: Loss, *_: Any) -> tuple[Tensor, int, dict[str, Tensor]]:
        # Three values ask Megatron-Core for gradients of sums, which we divide once by the sum of weights in the whole global
        # batch; its own count of tokens takes no part.
        metrics = (loss.metrics[name] for name in objective.metrics)
        return loss.total, 0, {"sums": torch.stack((loss.total.detach().float(), loss.weight, *metrics))}

    return output, loss_function


def optimizer_config(run: Run) -> OptimizerConfig:
    """Megatron-Core's optimizer options."""
    spec, dtype = run.optimizer, run.precision.dtype
    return OptimizerConfig(
        optimizer=spec.name,
        lr=run.schedule.learning_rate,
        min_lr=run.schedule.min_lr,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.beta1,
        adam_beta2=spec.beta2,
        adam_eps=spec.epsilon,
        clip_grad=spec.max_grad_norm,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        params_dtype=TORCH_DTYPES[dtype],
        use_distributed_optimizer=True,
        initial_loss_scale=INITIAL_LOSS_SCALE,
        min_loss_scale=MIN_LOSS_SCALE,
    )


def group_options(options: OptimizerConfig, model: ChatModel | Chunks) -> dict[ParamKey, ParamGroupOverride]:
    """What some weights have in place of the optimizer's options: no decay for vectors, another rate for every B of an adapter."""
    found = get_standard_config_overrides(options)
    ratio = model.adapter.lora.lr_ratio if model.adapter is not None else None
    if ratio is not None:
        rates: ParamGroupOverride = {"max_lr": options.lr * ratio, "min_lr": options.min_lr * ratio}
        found[ParamKey(name=f"*.{LORA_B}")] = rates
    return found


def schedule(optimizer: Any, spec: Schedule, weight_decay: float) -> OptimizerParamScheduler:
    """The learning rate schedule, counted in steps: warm-up, then decay that reaches min_lr at the last step."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=spec.learning_rate,
        min_lr=spec.min_lr,
        lr_warmup_steps=spec.warmup_iters,
        lr_decay_steps=spec.decay_iters,
        lr_decay_style=spec.decay_style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=spec.train_iters,
        wd_incr_style="constant",
        wsd_decay_steps=spec.wsd_decay_iters,
        lr_wsd_decay_style="cosine" if spec.decay_style == "WSD" else None,
    )
