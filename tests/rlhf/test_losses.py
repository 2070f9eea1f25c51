"""Every preference loss is TRL's, as value and as gradient, to 1e-5 in fp32: TRL's own methods are called with the same numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaswift.run.objective import FORMS, SMOOTHED
from megaswift.run.spec import ObjectiveSpec
from megaswift.train.objectives import SequenceObjective, shown
from megaswift.train.preference import FIGURES, Labelled, objective_of
from megaswift.train.preference_losses import log1mexp

PAIRS, LONGEST = 7, 9


class TokenScores:
    """What a model says of the tokens of answers: fp32 [answers, LONGEST] with 0 where there is no token, and how many there are."""

    def __init__(self, seed: int, answers: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.counts = torch.randint(1, LONGEST + 1, (answers,), generator=random)
        self.mask = torch.arange(LONGEST)[None] < self.counts[:, None]
        self.values = (-2.0 * torch.rand((answers, LONGEST), generator=random) * self.mask).requires_grad_()

    @property
    def sums(self) -> Tensor:
        return (self.values * self.mask).sum(1)


@pytest.fixture
def policy() -> TokenScores:
    return TokenScores(1, 2 * PAIRS)


@pytest.fixture
def reference(policy: TokenScores) -> Tensor:
    return policy.sums.detach() + torch.randn(2 * PAIRS, generator=torch.Generator().manual_seed(2))


def interleaved(x: Tensor) -> Tensor:
    """Chosen answers first, rejected ones after them -> as a micro batch has them, and what fills its row up."""
    return torch.cat([torch.stack(x.chunk(2), dim=1).flatten(), torch.zeros(1, dtype=x.dtype)])


def ours(spec: ObjectiveSpec, policy: TokenScores, reference: Tensor) -> tuple[float, Tensor]:
    """The mean loss that a run's objective makes of a micro batch, and its gradient by the log-probability of each token."""
    objective = objective_of(spec)
    assert isinstance(objective, SequenceObjective) and objective.weigh is not None
    batch: Any = SimpleNamespace(reference=interleaved(reference)[:-1], desirable=torch.tensor([True, False] * PAIRS))
    loss = objective.worth(interleaved(policy.sums), interleaved(policy.counts.float()), batch)
    assert float(loss.weight) == float(objective.weigh(batch)) == PAIRS
    assert float(loss.metrics["supervised"]) == float(policy.counts.sum())
    mean = loss.total / loss.weight
    [gradient] = torch.autograd.grad(mean, policy.values)
    return float(mean.detach()), gradient


def trainer(**more: Any) -> Any:
    """What TRL's methods ask of their trainer."""
    whole = {name: lambda value: value for name in ("gather", "gather_for_metrics")}
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(device=torch.device("cpu"), **whole),
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, aux_loss_enabled=False, precompute_ref_logps=True,
        **more,
    )  # fmt: skip


def said(scores: TokenScores) -> tuple[Any, dict[str, Tensor]]:
    """A model that says what was drawn, and inputs of which the first token is a question."""
    shape = scores.values.shape
    zeros = torch.zeros(shape)
    mask = torch.cat([torch.zeros(shape[0], 1, dtype=torch.long), scores.mask.long()], dim=1)
    ids = torch.ones_like(mask)
    outputs = SimpleNamespace(log_probs=scores.values * scores.mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return (lambda **_: outputs), {"input_ids": ids, "attention_mask": ids, "completion_mask": mask}


def same(found: tuple[float, Tensor], wanted: Tensor, scores: TokenScores) -> None:
    [gradient] = torch.autograd.grad(wanted, scores.values)
    assert found[0] == pytest.approx(float(wanted.detach()), rel=1e-5, abs=1e-6)
    assert float(gradient.norm()) > 1e-4
    assert float((found[1] - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("form", FORMS["dpo"])
def test_dpo(form: str, beta: float, policy: TokenScores, reference: Tensor) -> None:
    from trl import DPOTrainer

    smoothing = 0.2 if form in ("exo_pair", "robust") else 0.0  # TRL's sigmoid has none any more: see test_cpo
    spec = ObjectiveSpec(kind="dpo", form=form, beta=beta, label_smoothing=smoothing)
    model, inputs = said(policy)
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference.chunk(2)
    it = trainer(
        beta=beta, label_smoothing=smoothing, loss_types=[form], loss_weights=[1.0], ld_alpha=None, use_weighting=False,
        f_divergence_type="reverse_kl", args=SimpleNamespace(discopop_tau=0.05),
    )  # fmt: skip
    same(ours(spec, policy, reference), DPOTrainer._compute_loss(it, model, inputs, False), policy)


def test_ipo_is_dpo_of_that_form(policy: TokenScores, reference: Tensor) -> None:
    one, other = (ours(ObjectiveSpec(kind=kind, form="ipo", beta=0.3), policy, reference) for kind in ("dpo", "ipo"))
    assert one[0] == other[0] and torch.equal(one[1], other[1])


def test_rpo(policy: TokenScores, reference: Tensor) -> None:
    """TRL adds the mean over all tokens of a batch, which is ours where a batch is one pair."""
    from trl import DPOTrainer

    spec = ObjectiveSpec(kind="dpo", form="sigmoid", beta=0.2, nll_weight=0.6)
    wanted = torch.zeros(())
    for k in range(PAIRS):
        pair = [k, PAIRS + k]
        one: Any = SimpleNamespace(values=policy.values[pair], mask=policy.mask[pair], counts=policy.counts[pair])
        model, inputs = said(one)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference[pair].chunk(2)
        it = trainer(
            beta=0.2, label_smoothing=0.0, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.6], ld_alpha=None,
            use_weighting=False, f_divergence_type="reverse_kl", args=None,
        )  # fmt: skip
        wanted = wanted + DPOTrainer._compute_loss(it, model, inputs, False) / PAIRS
    same(ours(spec, policy, reference), wanted, policy)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "form"), [("simpo", "simpo"), ("cpo", "sigmoid"), ("cpo", "hinge"), ("cpo", "ipo")])
@pytest.mark.parametrize("own", [0.0, 0.5])
def test_cpo_and_simpo(kind: Any, form: str, own: float, policy: TokenScores, reference: Tensor) -> None:
    from trl.experimental.cpo import CPOTrainer

    smoothing = 0.15 if (kind, form) in SMOOTHED else 0.0
    gamma = 0.8 if kind == "simpo" else 0.0
    spec = ObjectiveSpec(kind=kind, form=form, beta=0.4, label_smoothing=smoothing, gamma=gamma, nll_weight=own)
    it = trainer(beta=0.4, label_smoothing=smoothing, loss_type=form, simpo_gamma=gamma, alpha=0.0)
    means = policy.sums / policy.counts
    chosen, rejected = (means if form in ("simpo", "ipo") else policy.sums).chunk(2)
    losses, good, bad = CPOTrainer.cpo_loss(it, chosen, rejected)
    same(ours(spec, policy, reference), losses.mean() - own * means[:PAIRS].mean(), policy)
    assert torch.allclose(good - bad, 0.4 * (chosen - rejected).detach(), atol=1e-6)


def test_smoothed_dpo_is_smoothed_cpo_of_ratios(policy: TokenScores, reference: Tensor) -> None:
    from trl.experimental.cpo import CPOTrainer

    spec = ObjectiveSpec(kind="dpo", form="sigmoid", beta=0.4, label_smoothing=0.15)
    it = trainer(beta=0.4, label_smoothing=0.15, loss_type="sigmoid", alpha=0.0)
    losses, *_ = CPOTrainer.cpo_loss(it, *(policy.sums - reference).chunk(2))
    same(ours(spec, policy, reference), losses.mean(), policy)


@pytest.mark.filterwarnings("ignore")
def test_orpo(policy: TokenScores, reference: Tensor) -> None:
    from trl.experimental.orpo import ORPOTrainer

    means = policy.sums / policy.counts
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(beta=0.3), *means.chunk(2))
    spec = ObjectiveSpec(kind="orpo", form="orpo", beta=0.3, nll_weight=1.0)
    same(ours(spec, policy, reference), -losses.mean() - means[:PAIRS].mean(), policy)


def test_the_odds_of_what_is_nearly_certain_are_finite() -> None:
    x = torch.tensor([-1e-9, -1e-4, -0.5, -0.7, -5.0, -200.0], requires_grad=True)
    log1mexp(x).sum().backward()
    assert x.grad is not None and torch.isfinite(log1mexp(x)).all() and torch.isfinite(x.grad).all()
    exact = torch.log(-torch.expm1(x.double()))
    assert torch.allclose(log1mexp(x)[1:].double(), exact[1:], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("form", FORMS["kto"])
@pytest.mark.parametrize("kl", [0.4, -0.4])
def test_kto(form: str, kl: float) -> None:
    """Three good answers in ten; TRL cuts its estimate of the distance off at 0, as the objective does."""
    from trl import KTOTrainer

    scores, beta, weights = TokenScores(3, 10), 0.3, (0.5, 1.7)
    labels = torch.tensor([True, False, False, True, False, False, False, True, False, False])
    reference = scores.sums.detach() + torch.randn(10, generator=torch.Generator().manual_seed(4))
    model, inputs = said(scores)
    inputs |= {"label": labels, "ref_logps": reference, "ref_KL_logps": torch.zeros(10)}
    it = trainer(
        beta=beta, loss_type=form, desirable_weight=weights[0], undesirable_weight=weights[1], calculate_KL=form == "kto",
        _compute_kl_logps=lambda *_: torch.full((10,), kl),
    )  # fmt: skip
    wanted = KTOTrainer._compute_loss(it, model, inputs, False)
    spec = ObjectiveSpec(kind="kto", form=form, beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    objective = objective_of(spec)
    assert isinstance(objective, Labelled) and (objective.ahead is None) == (form != "kto")
    if objective.ahead is not None:
        mismatched: Any = objective.ahead.objective
        beside: Any = SimpleNamespace(reference=torch.full((10,), -4.0), desirable=labels)
        ratio = mismatched.worth(torch.full((10,), kl - 4.0), torch.ones(10), beside)
        assert float(ratio.weight) == 10 and float(ratio.total / ratio.weight) == pytest.approx(kl, abs=1e-6)
        objective.ahead.told(ratio.total.double() / ratio.weight)
    batch: Any = SimpleNamespace(reference=reference, desirable=labels)
    padded = (torch.cat([x, torch.zeros(1)]) for x in (scores.sums, scores.counts.float()))
    loss = objective.worth(*padded, batch)
    mean = loss.total / loss.weight
    [gradient] = torch.autograd.grad(mean, scores.values)
    same((float(mean.detach()), gradient), wanted, scores)
    means = shown({name: float(value) for name, value in loss.metrics.items()}, float(loss.weight))
    logged = {name: values[-1] for name, values in it._metrics["train"].items()}
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl"):
        wanted_value = logged[name] if name != "kl" or form == "kto" else 0.0
        assert means[name] == pytest.approx(wanted_value, rel=1e-5, abs=1e-6), name


def test_the_figures_of_pairs_are_those_of_trl(policy: TokenScores, reference: Tensor) -> None:
    from trl import DPOTrainer

    model, inputs = said(policy)
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference.chunk(2)
    it = trainer(
        beta=0.3, label_smoothing=0.0, loss_types=["sigmoid"], loss_weights=[1.0], ld_alpha=None, use_weighting=False,
        f_divergence_type="reverse_kl", args=None,
    )  # fmt: skip
    DPOTrainer._compute_loss(it, model, inputs, False)
    objective: Any = objective_of(ObjectiveSpec(kind="dpo", form="sigmoid", beta=0.3))
    batch = SimpleNamespace(reference=interleaved(reference)[:-1], desirable=None)
    loss = objective.worth(interleaved(policy.sums), interleaved(policy.counts.float()), batch)
    means = shown({name: float(value) for name, value in loss.metrics.items()}, float(loss.weight))
    for name in FIGURES:
        assert means[name] == pytest.approx(it._metrics["train"][name][-1], rel=1e-5, abs=1e-6), name


def faults() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "beta", {"beta": 0.11}
    yield "own loss", {"nll_weight": 0.1}


@pytest.mark.parametrize(("name", "change"), faults())
def test_a_number_that_is_another_is_seen(name: str, change: dict[str, Any], policy: TokenScores, reference: Tensor) -> None:
    spec = ObjectiveSpec(kind="dpo", form="sigmoid", beta=0.1)
    one, other = (ours(item, policy, reference) for item in (spec, replace(spec, **change)))
    assert abs(one[0] - other[0]) > 1e-4
