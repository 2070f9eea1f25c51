"""AdamW for Megatron-Core's distributed optimizer, in the form in which apex and TransformerEngine offer theirs.

Megatron-Core 0.16.1 cannot reload reshardable state of torch.optim.AdamW (its `step` tensors are taken for weights).
This class keeps the step in the parameter group, as apex's does, which is the form that Megatron-Core saves and reshards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101); the update is one fused kernel a group.

    State of each parameter: `exp_avg` and `exp_avg_sq`, fp32, in its shape. `step` stands in the group.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        **newer: Any,
    ) -> None:
        if any(newer.values()):  # later versions of Megatron-Core pass more: capturable, which is False unless it was asked for
            raise TypeError(f"this AdamW has no such options: {newer}")
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, step=0))
        self.update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    def allocate(self) -> None:
        """Make all moments now: a run that does not fit fails at once, and step 0 can be saved."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        self.allocate()
        for group in self.param_groups:
            group["step"] += 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            step = torch.tensor(float(group["step"]), device=parameters[0].device)
            self.update(
                parameters,
                [parameter.grad for parameter in parameters],
                [self._moment(parameter, "exp_avg") for parameter in parameters],
                [self._moment(parameter, "exp_avg_sq") for parameter in parameters],
                [],
                [step] * len(parameters),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _moment(self, parameter: Tensor, name: str) -> Tensor:
        return self.state[parameter][name]
