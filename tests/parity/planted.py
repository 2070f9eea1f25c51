"""Faults that are planted into the engine of one rank, to see that parity finds them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """The engine with one fault ("" for none) inside this context."""
    with contextlib.ExitStack() as stack:
        if fault:
            stack.enter_context(_FAULTS[fault]())
        yield


def run_rank(job: str, fault: str) -> None:
    """One rank of a parity run with a fault planted."""
    from megaswift.parity.rank import trace
    from megaswift.run.spec import Run

    with planted(fault):
        trace(Run.read(Path(job)))


def run_sft_rank(job: str, fault: str) -> None:
    """One rank of a whole run with a fault planted."""
    from megaswift.run.spec import Run
    from megaswift.train.loop import train

    with planted(fault):
        train(Run.read(Path(job)))


def _shifted_labels() -> Any:
    from megaswift.train import trainer as step

    honest = step.run_micro_batch
    return mock.patch.object(
        step,
        "run_micro_batch",
        lambda model, batch, objective: honest(model, replace(batch, labels=batch.labels.roll(1, dims=1)), objective),
    )


def _mean_over_micro_batches() -> Any:
    import torch

    from megaswift.megatron import model
    from megaswift.train import trainer as step

    honest_loss, honest_step = model.linear_cross_entropy, step.forward_step

    def mean_loss(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
        share = 1.0 / max(int((labels != -100).sum()), 1)
        loss, count = honest_loss(hidden, weight, labels, **{**options, "grad_scale": share})
        return loss * share, count

    def forward_step(objective: Any, batches: Any, chunk: Any) -> Any:
        output, _ = honest_step(objective, batches, chunk)
        one = torch.ones(())
        return output, lambda loss, *_: (loss.total, 0, {"sums": torch.stack((loss.total.detach().float(), one, one))})

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(model, "linear_cross_entropy", mean_loss))
    stack.enter_context(mock.patch.object(step, "forward_step", forward_step))
    return stack


def _norm_gradient_not_reduced() -> Any:
    from megaswift.megatron import model

    honest = model.build

    def build(*args: Any, **kwargs: Any) -> Any:
        built = honest(*args, **kwargs)
        for name, parameter in built.named_parameters():
            if "layernorm" in name:
                parameter.sequence_parallel = False
        return built

    return mock.patch.object(model, "build", build)


def _untied_head() -> Any:
    from megaswift.megatron.model import ChatModel

    honest = ChatModel.shared_embedding_or_output_weight
    return mock.patch.object(ChatModel, "shared_embedding_or_output_weight", lambda self: _detached(honest(self), self))


def _detached(weight: Any, model: Any) -> Any:
    import inspect

    # Only the loss sees a copy; Megatron-Core's own set-up must still find the shared weight.
    return (
        weight.detach().requires_grad_() if any(frame.function == "summed_loss" for frame in inspect.stack()[2:5]) else weight
    )


def _rope_base_off_by_one() -> Any:
    from megaswift.megatron.model import RotaryTable

    honest = RotaryTable.__init__

    def init(self: Any, config: Any, device: Any, name: str) -> None:
        honest(self, config, device, name)
        base = config.rope_parameters["rope_theta"]
        self.inverse = self.inverse ** (math.log(base + 1) / math.log(base))

    return mock.patch.object(RotaryTable, "__init__", init)


_FAULTS = {
    "label shifted by one": _shifted_labels,
    "mean over micro batches": _mean_over_micro_batches,
    "norm gradient not reduced under sequence parallelism": _norm_gradient_not_reduced,
    "untied head": _untied_head,
    "RoPE base off by one": _rope_base_off_by_one,
}

# fault -> (processes, options of `swift parity` under which it shows, part of the message that must name it)
CASES: dict[str, tuple[int, dict[str, Any], str]] = {
    "label shifted by one": (1, {}, "step 1: the loss"),
    "mean over micro batches": (1, {}, "step 1: the loss"),
    "norm gradient not reduced under sequence parallelism": (2, {"tp": 2, "sequence_parallel": True}, "norm.weight differs"),
    "untied head": (1, {}, "step 1: the gradient of model.embed_tokens.weight"),
    "RoPE base off by one": (1, {}, "step 1: the hidden states after model.layers.0 differ"),
}
