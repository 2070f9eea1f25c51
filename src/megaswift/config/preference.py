"""The options of `swift rlhf` that `swift sft` has not: which preference loss, and its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megaswift.config.parse import BaseArguments, option

RLHF_TYPES = ("dpo", "ipo", "simpo", "orpo", "cpo", "kto", "rm")


@dataclass(kw_only=True)
class PreferenceArguments(BaseArguments):
    """Preference training: what is learnt from a better and a worse answer."""

    rlhf_type: str = option("dpo", "The method; docs/rlhf.md has the formula of each.", RLHF_TYPES)
    beta: float | None = option(
        None, "Strength of the preference against the reference; default: 0.1, simpo 2; ipo divides by it.", above=0
    )
    loss_type: str | None = option(
        None,
        "Form of the loss. dpo: sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, discopop, "
        "sigmoid_norm; cpo: sigmoid, hinge, ipo; kto: kto, apo_zero_unpaired; default: the first.",
    )
    label_smoothing: float = option(0.0, "Share of pairs that are taken to be labelled the wrong way round.", low=0, below=0.5)
    simpo_gamma: float = option(1.0, "simpo: the margin by which the chosen answer shall be ahead.", low=0)
    rpo_alpha: float | None = option(
        None, "dpo, ipo: weight of the chosen answer's own loss, the mean of its tokens; default: there is none.", low=0
    )
    cpo_alpha: float = option(
        1.0, "cpo, simpo: weight of the chosen answer's own loss, the mean of its tokens; 0: SimPO as published.", low=0
    )
    desirable_weight: float = option(1.0, "kto: weight of the losses of desirable answers.", low=0)
    undesirable_weight: float = option(1.0, "kto: weight of the losses of undesirable answers.", low=0)
    center_rewards_coefficient: float | None = option(
        None, "rm: weight of the square of the sum of both rewards, which keeps them around 0; default: there is none.", low=0
    )
