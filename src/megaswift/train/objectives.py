"""What a micro batch is worth: an objective makes the loss of its hidden states, and the engine knows none by name.

A new objective of whole sequences (a preference loss, say) is one function of their log-probabilities:

    def worth(log_probabilities, tokens, batch): ...; return Loss(total, pairs, {"reward": margins.sum()})
    objective = SequenceObjective(worth, metrics=("reward",))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megaswift.megatron.kernels.linear_cross_entropy import IGNORED

if TYPE_CHECKING:
    from megaswift.data.batches import MicroBatch
    from megaswift.megatron.model import ChatModel

SUPERVISED = "supervised"  # the metric of objectives that count tokens with loss
END_TOKEN = "end_token_probability"  # of validation rows


@dataclass(frozen=True)
class Loss:
    """What a micro batch gives on one rank; scalars on the device.

    The loss of a step is the sum of all `total`s over the sum of all `weight`s: of every micro batch and of every data- and
    context-parallel rank. So are its gradients, and each metric that is shown as a mean.

    Attributes:
        total: fp32, with the gradient that the backward pass begins from.
        weight: fp32, how much this micro batch counts: tokens, pairs, whatever the objective divides by.
        metrics: fp32 sums under the objective's own names. `shown` says what they are divided by.
    """

    total: Tensor
    weight: Tensor
    metrics: dict[str, Tensor]


def shown(sums: dict[str, float], weight: float) -> dict[str, float]:
    """Metrics as means: sums divided by the sum of weights; `a|b`, shown as `a`, by the sum `b`, which is a count and not shown.

    What there is nothing of is left out. Where both rewards are means of their own, their margin is shown too.
    """
    counts = {name.partition("|")[2] for name in sums} - {""}
    by = {name: sums[name.partition("|")[2]] if "|" in name else weight for name in sums if name not in counts}
    found = {name.partition("|")[0]: sums[name] / by[name] for name in by if by[name] > 0}
    if {"rewards/chosen", "rewards/rejected"} <= found.keys() and "rewards/margins" not in found:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


class Objective(Protocol):
    """How a model is judged: what the trainer is given, and all that it knows of the method."""

    @property
    def ahead(self) -> Ahead | None:
        """What must be known of a global batch before its losses are; None: nothing."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that every Loss has."""
        ...

    def weight(self, batch: MicroBatch) -> Tensor:
        """fp32, on the host: what a Loss of this micro batch will have as its weight; on the ranks of every stage."""
        ...

    def micro_batch(self, model: ChatModel, hidden: Tensor, batch: MicroBatch) -> Loss:
        """The loss of one micro batch, on the ranks of the last pipeline stage.

        Args:
            model: its head makes losses of hidden states (`summed_loss`, `sequence_log_probabilities`).
            hidden: [s, b, h], this rank's part under sequence parallelism.
            batch: this rank's part under context parallelism.
        """
        ...


@dataclass(frozen=True)
class Ahead:
    """A forward pass over the mismatched answers of a global batch, before its step.

    Args:
        objective: what is made of them.
        told: called with the sum of the losses over the sum of their weights, fp64 on the device, on all ranks alike.
    """

    objective: Objective
    told: Callable[[Tensor], None]


class SupervisedTokens:
    """Cross entropy of the tokens that carry loss, each by its weight: supervised fine-tuning, chats and plain text alike."""

    metrics = (SUPERVISED,)
    ahead = None

    def weight(self, batch: MicroBatch) -> Tensor:
        """The sum of weights, which is the number of tokens where rows bring none."""
        return supervised_weight(batch)

    def micro_batch(self, model: ChatModel, hidden: Tensor, batch: MicroBatch) -> Loss:
        """The summed loss; it is divided by the sum of weights, which is the number of tokens where rows bring none."""
        total = model.summed_loss(hidden, batch.labels, batch.weights)
        count = (batch.labels != IGNORED).sum()
        weight = count.float() if batch.weights is None else batch.weights.double().sum().float()
        supervised, weight = (x.to(hidden.device, non_blocking=True) for x in (count.float(), weight))
        return Loss(total, weight, {SUPERVISED: supervised})


@dataclass(frozen=True)
class EvaluatedTokens(SupervisedTokens):
    """The same of validation rows, forward only, and how sure the model is of where answers end.

    Args:
        ends: ids of the tokens that end an answer.
    """

    ends: tuple[int, ...]

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """The mean probability of the ends that carry loss, and how many these are."""
        return SUPERVISED, f"{END_TOKEN}|ends", "ends"

    def micro_batch(self, model: ChatModel, hidden: Tensor, batch: MicroBatch) -> Loss:
        """As for training, without a gradient."""
        losses = model.token_losses(hidden, batch.labels).double()  # [s * b]
        labelled = batch.labels != IGNORED
        weights = labelled.double() if batch.weights is None else batch.weights.double()
        ends = labelled & torch.isin(batch.labels, torch.tensor(self.ends, dtype=batch.labels.dtype))
        own, at_ends, count = (
            part.to(hidden.device, non_blocking=True)
            for part in (weights.t().reshape(-1), ends.t().reshape(-1), labelled.sum().float())
        )
        sure = losses.neg().exp()[at_ends].sum().float()
        metrics = {SUPERVISED: count, f"{END_TOKEN}|ends": sure, "ends": at_ends.sum().float()}
        return Loss((losses * own).sum().float(), own.sum().float(), metrics)


@dataclass(frozen=True)
class SequenceObjective:
    """A function of the log-probabilities of the micro batch's sequences, made by the head without holding logits.

    Args:
        worth: (log-probabilities of the supervised tokens of each sequence, fp32 [n], with gradient; how many tokens those
            are, by their weights, fp32 [n]; the micro batch) -> Loss. Sequences come in the order of the rows, and of the
            samples packed into one; what pads a packed row is one without tokens.
        metrics: names of the metrics that each Loss has.
        weigh: the weight of a micro batch's Loss, known ahead; routers balance their load by it.
        ahead: see Objective.
    """

    worth: Callable[[Tensor, Tensor, MicroBatch], Loss]
    metrics: tuple[str, ...] = ()
    weigh: Callable[[MicroBatch], Tensor] | None = None
    ahead: Ahead | None = None

    def weight(self, batch: MicroBatch) -> Tensor:
        """See Objective. Ranks that share the rows count a part each."""
        if self.weigh is None:
            return supervised_weight(batch)
        return self.weigh(batch) / (1 if batch.share is None else batch.share.group.size())

    def micro_batch(self, model: ChatModel, hidden: Tensor, batch: MicroBatch) -> Loss:
        """What `worth` says. Ranks that share the rows all have every sequence, so each of them counts its part of it."""
        sequences, count = sequences_of(batch)
        loss = self.worth(*model.sequence_log_probabilities(hidden, batch, sequences, count), batch)
        ranks = 1 if batch.share is None else batch.share.group.size()
        metrics = {name: value / ranks for name, value in loss.metrics.items()}
        return Loss(loss.total / ranks, loss.weight / ranks, metrics)


def supervised_weight(batch: MicroBatch) -> Tensor:
    """fp32: the sum of the weights of a micro batch's labels."""
    return ((batch.labels != IGNORED).sum() if batch.weights is None else batch.weights.double().sum()).float()


def sequences_of(batch: MicroBatch) -> tuple[Tensor, int]:
    """int64 [b, s], the number of the sequence that each token of this rank belongs to, and how many sequences there are."""
    share, (rows, width) = batch.share, batch.tokens.shape
    if share is not None:
        lengths = torch.tensor(share.samples)
    else:
        lengths = torch.tensor([width]) if batch.cu_seqlens is None else batch.cu_seqlens.diff().long()
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    numbers = row[None] + len(lengths) * torch.arange(rows)[:, None]
    return (numbers if share is None else share.take(numbers)), rows * len(lengths)
