"""What a layer of a model is made of, by names for which the engine has modules."""

from __future__ import annotations

from dataclasses import dataclass

MAIN = "main"  # the rotation of a model that has one
EXPERTS = "experts"  # the MLP that is many, of which a router chooses some for each token


@dataclass(frozen=True)
class Experts:
    """A layer's experts, and how its router chooses among them.

    Args:
        count: how many there are.
        chosen: how many each token goes to.
        ffn: rows of the gate, and of the up projection, of one expert.
        score: "softmax" over all experts, or "sigmoid" of each by itself.
        renormalise: whether the scores of the chosen experts are divided by their sum.
        factor: what the weights are multiplied by then.
        groups, kept: experts are chosen within the `kept` of so many groups whose two best scores sum up highest; 1: among all.
        bias: whether a bias, which training leaves alone, is added to the scores for the choice, but not to the weights.
        shared_ffn: the same rows of an expert beside them that every token goes to; 0: there is none.
        shared_gate: whether each token weighs what that expert gives by a gate of its own.
    """

    count: int
    chosen: int
    ffn: int
    score: str = "softmax"
    renormalise: bool = True
    factor: float = 1.0
    groups: int = 1
    kept: int = 1
    bias: bool = False
    shared_ffn: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class Kind:
    """What one layer computes. `megatron/layer_specs.py` has a module for each name and refuses any other.

    Args:
        attention, mlp, norm: how the layer attends, what its MLP is, and which norm stands before each of the two.
        rotation: which rotation tables query and key take: MAIN, or the name under which `rope_parameters` has others
            (a layer type); None: the layer knows no positions (NoPE).
        qk_norm: whether each head's query and key go through the norm, before they rotate.
        qk_norm_over_heads: whether that norm goes over all heads together.
        residual_factor: what the results of attention and MLP are multiplied by before they are added.
        experts: what an MLP of the name EXPERTS is made of; None with any other MLP.
    """

    attention: str = "grouped_query"
    mlp: str = "gated"
    norm: str = "rms"
    rotation: str | None = MAIN
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    residual_factor: float = 1.0
    experts: Experts | None = None
