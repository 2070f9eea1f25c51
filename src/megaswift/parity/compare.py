"""Differences between two runs, and the limits that they are judged by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

# Relative differences that are allowed in the first step; they grow by `growth` with each further step, because every
# update builds on the one before. fp32 limits are ten times what all families and layouts show; those of bf16 are what
# two orders of summation give in 8 bits.
LIMITS = {
    "fp32": {"hidden": 5e-6, "loss": 2e-6, "grad_norm": 2e-5, "gradient": 2e-4, "weight": 2e-5, "growth": 1.5},
    "bf16": {"hidden": 1e-2, "loss": 5e-3, "grad_norm": 5e-2, "gradient": 2e-1, "weight": 2e-3, "growth": 1.5},
    "fp16": {"hidden": 3e-3, "loss": 2e-3, "grad_norm": 3e-2, "gradient": 1e-1, "weight": 2e-3, "growth": 1.5},
}
# A weight that starts at zero is all update, and Adam's update has the size of the learning rate even where the gradient
# is as small as its rounding. Weights count as no smaller than this many learning rates, so that the fp32 limit is a
# thousandth of an update.
UPDATES = 50.0
GROUPS = (("embed", "embedding"), ("lm_head", "output"), ("self_attn", "attention"), ("mlp", "mlp"), ("norm", "norm"))


@dataclass
class StepDifference:
    """Relative differences of one step: |a - b| / |b| for numbers, the same with Euclidean norms for tensors."""

    step: int
    loss: tuple[float, float]  # reference, engine
    grad_norm: tuple[float, float]
    loss_difference: float
    grad_norm_difference: float
    gradient_groups: dict[str, float] = field(default_factory=dict)  # group -> largest difference of a tensor in it
    worst_gradient: tuple[float, str] = (0.0, "")
    worst_weight: tuple[float, str] = (0.0, "")  # in half precisions: of all weights together
    hidden: list[tuple[str, float]] = field(default_factory=list)  # first step: module, difference of its output's square sum

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def relative(value: float, wanted: float) -> float:
    """|value - wanted| / |wanted|."""
    return abs(value - wanted) / max(abs(wanted), 1e-12)


def relative_tensor(value: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of the reference, or over that of a tensor full of `floor` if that is larger.

    Infinite where it is no number, so that it is the largest of many.
    """
    norm = torch.linalg.vector_norm(wanted.double()).clamp_min(max(floor * wanted.numel() ** 0.5, 1e-30))
    found = float(torch.linalg.vector_norm(value.double() - wanted.double()) / norm)
    return math.inf if math.isnan(found) else found


def group_of(name: str) -> str:
    """The kind of layer that a tensor belongs to."""
    return next((group for mark, group in GROUPS if mark in name), "other")


def worst(
    pairs: Iterable[tuple[str, Tensor, Tensor]], groups: dict[str, float] | None = None, floor: float = 0.0
) -> tuple[float, str]:
    """The largest relative difference among (name, value, wanted), and its name; `groups` collects it for each kind."""
    largest, where = 0.0, ""
    for name, value, wanted in pairs:
        difference = relative_tensor(value, wanted, floor)
        if groups is not None:
            groups[group_of(name)] = max(groups.get(group_of(name), 0.0), difference)
        if difference > largest or not where:
            largest, where = difference, name
    return largest, where


def overall(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> tuple[float, str]:
    """The relative difference of all tensors as one vector.

    In half precision a single tensor may move by the sign of noise: Adam's first steps have the size of the learning rate
    however small the gradient is, so a bias that starts at zero tells nothing.
    """
    difference = norm = 0.0
    for _, value, wanted in pairs:
        difference += float(torch.linalg.vector_norm(value.double() - wanted.double())) ** 2
        norm += float(torch.linalg.vector_norm(wanted.double())) ** 2
    return (difference / max(norm, 1e-30)) ** 0.5, "all weights together"


def verdict(differences: list[StepDifference], dtype: str) -> str | None:
    """None if every difference is within its limit, else the first one that is not: step, what, where, how much."""
    limits = LIMITS[dtype]
    for item in differences:
        factor = limits["growth"] ** (item.step - 1)
        for name, found in item.hidden:
            if not found <= limits["hidden"]:
                return f"step {item.step}: the hidden states after {name} differ by {found:.2e}, allowed {limits['hidden']:.1e}"
        for what, found, where in (
            ("loss", item.loss_difference, ""),
            ("gradient", item.worst_gradient[0], item.worst_gradient[1]),
            ("grad_norm", item.grad_norm_difference, ""),
            ("weight", item.worst_weight[0], item.worst_weight[1]),
        ):
            limit = limits[what] * factor
            if not found <= limit:
                place = f" of {where}" if where else ""
                text = f"step {item.step}: the {what.replace('_', ' ')}{place} differs by {found:.2e}, allowed {limit:.1e}"
                if not where and item.worst_gradient[1]:  # numbers have no name: say which tensor shows it most
                    text += f"; the gradient that differs most is {item.worst_gradient[1]}'s, by {item.worst_gradient[0]:.1e}"
                return text
    return None


def beyond(table: list[tuple[str, list[float]]], limits: list[float]) -> str | None:
    """None if every layout's loss is within its step's limit, else the first layout and step that is not.

    Args:
        table: (layout, relative difference from the first layout at each step); the first entry is that layout itself.
        limits: one for each step.
    """
    for name, differences in table:
        for step, (found, limit) in enumerate(zip(differences, limits), start=1):
            if not found <= limit:
                return f"layout {name}, step {step}: the loss differs by {found:.2e} from {table[0][0]}, allowed {limit:.1e}"
    return None
