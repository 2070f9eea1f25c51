"""The losses of preference training: pure functions of the log-probabilities of answers, and nothing else.

Throughout, pi is what is trained and ref the reference; y_w is the chosen answer, y_l the rejected one; all numbers are fp32 [pairs],
and so is each loss. h = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DISCOPOP_TAU = 0.05  # the temperature of its blend, as published


@dataclass(frozen=True)
class Answers:
    """Pairs of answers: fp32 [pairs] each.

    Attributes:
        chosen, rejected: log-probabilities of the answers' tokens, summed, of what is trained.
        ref_chosen, ref_rejected: those of the reference; 0 where there is none.
        chosen_tokens, rejected_tokens: how many tokens the sums are over.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi(y_w) - log ref(y_w)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi(y_l) - log ref(y_l)."""
        return self.rejected - self.ref_rejected

    @property
    def preference(self) -> Tensor:
        """h."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_preference(self) -> Tensor:
        """h of ratios divided by the tokens that they are over."""
        return self.chosen_ratio / self.chosen_tokens - self.rejected_ratio / self.rejected_tokens

    @property
    def chosen_mean(self) -> Tensor:
        """log pi(y_w) / its tokens."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        """log pi(y_l) / its tokens."""
        return self.rejected / self.rejected_tokens


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x): labels that are wrong with probability e (cDPO, Mitchell 2023)."""
    return -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing


def sigmoid(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """DPO, https://arxiv.org/abs/2305.18290, equation 7."""
    return smoothed(beta * x.preference, label_smoothing)


def hinge(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """max(0, 1 - beta h): SLiC's loss, https://arxiv.org/abs/2305.10425, of DPO's rewards (https://arxiv.org/abs/2309.06657)."""
    return torch.relu(1 - beta * x.preference)


def ipo(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """(h - 1 / (2 beta))^2 with h over means of tokens: https://arxiv.org/abs/2310.12036, equation 17."""
    return (x.mean_preference - 1 / (2 * beta)).square()


def exo_pair(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """KL(softmax(beta h, 0) || (1 - e, e)): https://arxiv.org/abs/2402.00856, equation 16."""
    logits = beta * x.preference
    chosen = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    return chosen + (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(label_smoothing))


def nca_pair(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """-log s(r_w) - (log s(-r_w) + log s(-r_l)) / 2 with r = beta x log-ratio: https://arxiv.org/abs/2402.05369."""
    good, bad = beta * x.chosen_ratio, beta * x.rejected_ratio
    return -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)


def robust(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """DPO without the bias of labels that are wrong with probability e: https://arxiv.org/abs/2403.00409, equation 12."""
    logits = beta * x.preference
    clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def bco_pair(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """-log s(r_w) - log s(-r_l): https://arxiv.org/abs/2404.04656 with its shift left at 0."""
    return -F.logsigmoid(beta * x.chosen_ratio) - F.logsigmoid(-beta * x.rejected_ratio)


def sppo_hard(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """(log-ratio_w - 1 / (2 beta))^2 + (log-ratio_l + 1 / (2 beta))^2: https://arxiv.org/abs/2405.00675, equation 4.7, P = 1 and 0."""
    return (x.chosen_ratio - 0.5 / beta).square() + (x.rejected_ratio + 0.5 / beta).square()


def apo_zero(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """1 - s(r_w) + s(r_l): https://arxiv.org/abs/2408.06266, equation 7."""
    return 1 - (beta * x.chosen_ratio).sigmoid() + (beta * x.rejected_ratio).sigmoid()


def apo_down(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """s(r_w) + 1 - s(r_w - r_l): https://arxiv.org/abs/2408.06266, equation 8."""
    return (beta * x.chosen_ratio).sigmoid() + 1 - (beta * x.preference).sigmoid()


def discopop(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """Logistic and exponential loss, blended by s(beta h / tau): https://arxiv.org/abs/2406.08414, equation 5."""
    logits = beta * x.preference
    blend = (logits / DISCOPOP_TAU).sigmoid()
    return -F.logsigmoid(logits) * (1 - blend) + (-logits).exp() * blend


def sigmoid_norm(x: Answers, beta: float, label_smoothing: float) -> Tensor:
    """DPO's loss with h over means of tokens, as Tulu 3 has it: https://arxiv.org/abs/2411.15124."""
    return -F.logsigmoid(beta * x.mean_preference)


DPO: dict[str, Callable[[Answers, float, float], Tensor]] = {
    form.__name__: form
    for form in (
        sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, discopop, sigmoid_norm,
    )
}  # fmt: skip


def simpo(x: Answers, beta: float, gamma: float, label_smoothing: float) -> Tensor:
    """-log s(beta (mean log pi(y_w) - mean log pi(y_l)) - gamma): https://arxiv.org/abs/2405.14734, equation 6."""
    return smoothed(beta * (x.chosen_mean - x.rejected_mean) - gamma, label_smoothing)


def cpo(x: Answers, form: str, beta: float, label_smoothing: float) -> Tensor:
    """DPO without a reference: https://arxiv.org/abs/2401.08417, equation 3.

    Args:
        form: sigmoid; hinge, max(0, 1 - beta d); ipo, (d - 1 / (2 beta))^2 with d over means of tokens.
    """
    if form == "ipo":
        return (x.chosen_mean - x.rejected_mean - 1 / (2 * beta)).square()
    logits = beta * (x.chosen - x.rejected)
    return torch.relu(1 - logits) if form == "hinge" else smoothed(logits, label_smoothing)


def orpo(x: Answers, beta: float) -> Tensor:
    """-beta log s(log odds(y_w) - log odds(y_l)) with log odds = m - log(1 - e^m) of the mean m: https://arxiv.org/abs/2403.07691, equation 7."""
    good, bad = x.chosen_mean, x.rejected_mean
    return -beta * F.logsigmoid((good - bad) - (log1mexp(good) - log1mexp(bad)))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact near 0 and far from it (Maechler 2012, https://cran.r-project.org/package=Rmpfr)."""
    x = x.clamp(max=-1e-7)  # a mean of exactly 0, all tokens certain, has infinite odds
    near = x > -math.log(2)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, torch.full_like(x, -1.0)))),
        torch.log1p(-torch.exp(torch.where(near, torch.full_like(x, -1.0), x))),
    )


def own_loss(x: Answers) -> Tensor:
    """-log pi(y_w) / its tokens: of every pair by itself, so that it does not depend on which pairs share a batch.

    The term of RPO (https://arxiv.org/abs/2404.19733, equation 4), CPO and ORPO.
    """
    return -x.chosen_mean


def kto(ratio: Tensor, desirable: Tensor, kl: Tensor, beta: float) -> Tensor:
    """1 - s(beta (ratio - z)) of good answers, 1 - s(beta (z - ratio)) of bad ones: https://arxiv.org/abs/2402.01306, equation 7.

    Args:
        ratio: fp32 [n], log pi(y) - log ref(y) of each answer.
        desirable: bool [n].
        kl: z, at least 0: how far what is trained is from the reference; without gradient.
    """
    away = beta * (ratio - kl)
    return 1 - torch.where(desirable, away, -away).sigmoid()


def apo_zero_unpaired(ratio: Tensor, desirable: Tensor, beta: float) -> Tensor:
    """1 - s(beta ratio) of good answers, s(beta ratio) of bad ones: https://arxiv.org/abs/2408.06266, equation 7 without pairs."""
    value = (beta * ratio).sigmoid()
    return torch.where(desirable, 1 - value, value)
