"""What a layer of a model is made of, by names for which the engine has modules."""

from __future__ import annotations

from dataclasses import dataclass

MAIN = "main"  # the rotation of a model that has one


@dataclass(frozen=True)
class Kind:
    """What one layer computes. `megatron/layer_specs.py` has a module for each name and refuses any other.

    Args:
        attention, mlp, norm: how the layer attends, what its MLP is, and which norm stands before each of the two.
        rotation: which rotation tables query and key take: MAIN, or the name under which `rope_parameters` has others
            (a layer type); None: the layer knows no positions (NoPE).
        qk_norm: whether each head's query and key go through the norm, before they rotate.
    """

    attention: str = "grouped_query"
    mlp: str = "gated"
    norm: str = "rms"
    rotation: str | None = MAIN
    qk_norm: bool = False
