"""The objectives of models that give scores: reward models (the better answer shall have the larger one), and classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.models.head import MULTI, REGRESSION, SINGLE
from megaswift.train.objectives import Ahead, Loss, sequences_of

if TYPE_CHECKING:
    from megaswift.data.batches import MicroBatch
    from megaswift.megatron.model import ChatModel
    from megaswift.run.spec import ObjectiveSpec

FIGURES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
ACCURACY = "accuracy"


@dataclass(frozen=True)
class ScoreObjective:
    """A function of the scores of the micro batch's samples.

    Args:
        worth: (scores, fp32 [samples, n], with gradient, in the order of the rows and of the samples packed into one; the micro
            batch) -> Loss.
        metrics: names of the metrics that each Loss has.
        answers: samples of one example: what the loss of a step is divided by is the number of examples.
    """

    worth: Callable[[Tensor, MicroBatch], Loss]
    metrics: tuple[str, ...]
    answers: int = 1
    ahead: Ahead | None = None

    def weight(self, batch: MicroBatch) -> Tensor:
        """See Objective. Ranks that share the rows count a part each."""
        assert batch.values is not None
        return torch.tensor(len(batch.values) / self.answers / _ranks(batch))

    def micro_batch(self, model: ChatModel, hidden: Tensor, batch: MicroBatch) -> Loss:
        """What `worth` says. Ranks that share the rows all have every score, so each of them counts its part of it."""
        sequences, count = sequences_of(batch)
        scores, there = model.sequence_scores(hidden, batch, sequences, count)
        loss, ranks = self.worth(scores[there], batch), _ranks(batch)
        metrics = {name: value / ranks for name, value in loss.metrics.items()}
        return Loss(loss.total / ranks, loss.weight / ranks, metrics)


def _ranks(batch: MicroBatch) -> int:
    return 1 if batch.share is None else batch.share.group.size()


def score_objective(spec: ObjectiveSpec) -> ScoreObjective:
    """The objective of a run whose model gives scores."""
    if spec.kind == "rm":
        return ScoreObjective(partial(worth_of_rewards, spec), FIGURES, answers=2)
    return ScoreObjective(partial(worth_of_classes, spec), () if spec.form == REGRESSION else (ACCURACY,))


def worth_of_rewards(spec: ObjectiveSpec, scores: Tensor, batch: MicroBatch) -> Loss:
    """The loss of a micro batch's pairs, summed; divided by their number, it is their mean.

    Of a pair it is -log s(chosen - rejected - margin) + center (chosen + rejected)^2, of Bradley and Terry
    (https://arxiv.org/abs/2204.05862), the margin of https://arxiv.org/abs/2307.09288, the last term of
    https://arxiv.org/abs/2312.09244.
    """
    assert batch.values is not None
    chosen, rejected = scores.view(-1, 2).unbind(1)
    margin = batch.values.view(-1, 2)[:, 0]
    each = -F.logsigmoid(chosen - rejected - margin)
    if spec.center:
        each = each + spec.center * (chosen + rejected).square()
    with torch.no_grad():
        values = (chosen, rejected, chosen - rejected, (chosen > rejected).float())
        metrics = dict(zip(FIGURES, (value.sum() for value in values), strict=True))
    return Loss(each.sum(), torch.tensor(float(len(each)), device=each.device), metrics)


def worth_of_classes(spec: ObjectiveSpec, scores: Tensor, batch: MicroBatch) -> Loss:
    """The loss of a micro batch's samples, summed: what transformers makes of the labels, by its `problem_type`.

    Cross entropy of the one class; of several classes the mean over classes of the binary cross entropy; of numbers the mean
    of the squared differences.
    """
    assert batch.values is not None
    wanted = batch.values.to(scores)
    count = torch.tensor(float(len(scores)), device=scores.device)
    if spec.form == REGRESSION:
        return Loss((scores - wanted).square().mean(-1).sum(), count, {})
    if spec.form == SINGLE:
        wanted = wanted[:, 0].long()
        total, right = F.cross_entropy(scores, wanted, reduction="sum"), (scores.argmax(-1) == wanted).float()
    elif spec.form == MULTI:
        total = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").mean(-1).sum()
        right = ((scores > 0) == (wanted > 0)).float().mean(-1)
    else:
        raise ValueError(spec.form)
    return Loss(total, count, {ACCURACY: right.sum()})
