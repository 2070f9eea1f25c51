"""The objectives of preference training: log-probabilities of answers, and of the reference, to a loss and its figures."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaswift.train import preference_losses as losses
from megaswift.train.objectives import SUPERVISED, Ahead, Loss, Objective, SequenceObjective, SupervisedTokens
from megaswift.train.scores import score_objective

if TYPE_CHECKING:
    from megaswift.data.batches import MicroBatch
    from megaswift.megatron.model import ChatModel
    from megaswift.run.spec import ObjectiveSpec

FIGURES = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip
OWN = "nll_loss"  # the chosen answer's own loss


def objective_of(spec: ObjectiveSpec) -> Objective:
    """What a trainer is given for the objective of a run."""
    if spec.of_tokens:
        return SupervisedTokens()
    if spec.labels:
        return score_objective(spec)
    if spec.kind == "kto":
        return Labelled(spec)
    names = (*FIGURES, SUPERVISED, *([OWN] if spec.nll_weight else []))
    return SequenceObjective(partial(worth_of_pairs, spec), metrics=names, weigh=pairs_in)


def pairs_in(batch: MicroBatch) -> Tensor:
    """fp32: how many pairs a micro batch has."""
    assert batch.desirable is not None
    return torch.tensor(len(batch.desirable) / 2)


def answers_of(spec: ObjectiveSpec, log_probabilities: Tensor, tokens: Tensor, batch: MicroBatch) -> losses.Answers:
    """Log-probabilities and tokens of a micro batch's sequences as pairs, the reference's beside them.

    Args:
        log_probabilities, tokens: fp32 [sequences]; one without tokens only fills a row up.
    """
    real = tokens > 0
    chosen, rejected = log_probabilities[real].view(-1, 2).unbind(1)
    chosen_tokens, rejected_tokens = tokens[real].view(-1, 2).unbind(1)
    reference = torch.zeros_like(log_probabilities[real]).detach()
    if spec.needs_reference:
        reference = reference_of(batch).to(reference)
    ref_chosen, ref_rejected = reference.view(-1, 2).unbind(1)
    return losses.Answers(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)


def reference_of(batch: MicroBatch) -> Tensor:
    """fp32 [samples]: what the reference says of a micro batch's samples; `reference.attach` brings it."""
    if batch.reference is None:
        raise RuntimeError("the reference's log-probabilities were not computed before training")
    return batch.reference


def worth_of_pairs(spec: ObjectiveSpec, log_probabilities: Tensor, tokens: Tensor, batch: MicroBatch) -> Loss:
    """The loss of a micro batch's pairs, summed; divided by their number, it is their mean."""
    x = answers_of(spec, log_probabilities, tokens, batch)
    each = loss_of_pairs(spec, x)
    chosen, rejected = logged_log_probabilities(spec, x)
    with torch.no_grad():
        good, bad = spec.beta * (chosen - x.ref_chosen), spec.beta * (rejected - x.ref_rejected)
        values = (good, bad, good - bad, (good > bad).float(), chosen, rejected)
        metrics = dict(zip(FIGURES, (value.sum() for value in values), strict=True))
        metrics[SUPERVISED] = (x.chosen_tokens + x.rejected_tokens).sum()
        if spec.nll_weight:
            metrics[OWN] = losses.own_loss(x).sum()
    pairs = torch.tensor(float(len(each)), device=each.device)
    return Loss(each.sum(), pairs, metrics)


def loss_of_pairs(spec: ObjectiveSpec, x: losses.Answers) -> Tensor:
    """fp32 [pairs]: the loss of each pair."""
    match spec.kind:
        case "dpo" | "ipo":
            each = losses.DPO[spec.form](x, spec.beta, spec.label_smoothing)
        case "simpo":
            each = losses.simpo(x, spec.beta, spec.gamma, spec.label_smoothing)
        case "cpo":
            each = losses.cpo(x, spec.form, spec.beta, spec.label_smoothing)
        case "orpo":
            each = losses.orpo(x, spec.beta)
        case _:
            raise ValueError(spec.kind)
    return each + spec.nll_weight * losses.own_loss(x) if spec.nll_weight else each


def logged_log_probabilities(spec: ObjectiveSpec, x: losses.Answers) -> tuple[Tensor, Tensor]:
    """Those that rewards are made of: sums, or means of tokens where the loss is one of means and knows no reference."""
    if spec.kind in ("simpo", "orpo") or (spec.kind, spec.form) == ("cpo", "ipo"):
        return x.chosen_mean.detach(), x.rejected_mean.detach()
    return x.chosen.detach(), x.rejected.detach()


DISTANCE = "kl"  # KTO's estimate of how far what is trained is from the reference
LABELLED_FIGURES = (
    "rewards/chosen|desirable", "rewards/rejected|undesirable", "logps/chosen|desirable", "logps/rejected|undesirable",
    "desirable", "undesirable", DISTANCE, SUPERVISED,
)  # fmt: skip


class Labelled:
    """KTO and its kind: the loss of single answers that are good or bad.

    KTO compares with how far the trained model is from the reference: the mean log-ratio of mismatched answers, of the whole
    global batch, so that it does not depend on the layout. Each step begins with a forward pass for it, without gradient.
    """

    metrics = LABELLED_FIGURES

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.distance: Tensor | None = None
        self._sequences = SequenceObjective(self.worth, LABELLED_FIGURES, self._answers_in)
        mismatched = SequenceObjective(self._ratio_of_mismatched, weigh=self._answers_in)
        self.ahead = Ahead(mismatched, self._told) if spec.looks_ahead else None

    def weight(self, batch: MicroBatch) -> Tensor:
        return self._sequences.weight(batch)

    def micro_batch(self, model: ChatModel, hidden: Tensor, batch: MicroBatch) -> Loss:
        """The loss of each answer times the weight of its kind, summed; divided by the number of answers, it is their mean."""
        return self._sequences.micro_batch(model, hidden, batch)

    @staticmethod
    def _answers_in(batch: MicroBatch) -> Tensor:
        assert batch.desirable is not None
        return torch.tensor(float(len(batch.desirable)))

    def _told(self, mean: Tensor) -> None:
        self.distance = mean.clamp(min=0).float()

    @staticmethod
    def _ratio_of_mismatched(log_probabilities: Tensor, tokens: Tensor, batch: MicroBatch) -> Loss:
        ratio = log_probabilities[tokens > 0] - reference_of(batch).to(log_probabilities)
        return Loss(ratio.sum(), torch.tensor(float(len(ratio)), device=ratio.device), {})

    def worth(self, log_probabilities: Tensor, tokens: Tensor, batch: MicroBatch) -> Loss:
        """See SequenceObjective."""
        spec, real = self.spec, tokens > 0
        policy, reference = log_probabilities[real], reference_of(batch).to(log_probabilities)
        assert batch.desirable is not None
        good = batch.desirable.to(policy.device)
        distance = policy.new_zeros(()) if self.distance is None else self.distance.to(policy)
        if spec.form == "kto":
            each = losses.kto(policy - reference, good, distance, spec.beta)
        else:
            each = losses.apo_zero_unpaired(policy - reference, good, spec.beta)
        weight = torch.where(good, spec.desirable_weight, spec.undesirable_weight)
        with torch.no_grad():
            rewards, count = spec.beta * (policy - reference), len(each)
            values = (
                (rewards * good).sum(), (rewards * ~good).sum(), (policy * good).sum(), (policy * ~good).sum(),
                good.sum().float(), (~good).sum().float(), distance * count, tokens[real].sum(),
            )  # fmt: skip
        return Loss(
            (each * weight).sum(),
            torch.tensor(float(count), device=policy.device),
            dict(zip(LABELLED_FIGURES, values, strict=True)),
        )
