"""The reference: transformers' model with torch's AdamW, on the same rows, sample by sample.

Nothing of the engine is used here. A sample is run alone, without padding and without packing, so that a wrong mask,
position or label shift of the engine cannot hide in both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.arguments import SftArguments
from megaswift.data.store import TokenRows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ReferenceStep:
    """One step of the reference.

    Attributes:
        gradients, weights: by Hugging Face name; gradients before clipping, weights after the update. fp32.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class Reference:
    """transformers' model and torch.optim.AdamW over fp32 master weights."""

    def __init__(self, folder: Path, args: SftArguments, dtype: str, steps: int, warmup: int) -> None:
        from transformers import AutoModelForCausalLM

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.args, self.steps, self.warmup = args, steps, warmup
        load: Any = AutoModelForCausalLM.from_pretrained
        self.model: Any = load(folder, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False)
        self.model.to(self.device).train()
        self.names: dict[str, Any] = dict(self.model.named_parameters())
        self.masters = {name: parameter.detach().float().clone() for name, parameter in self.names.items()}
        decayed = [master for master in self.masters.values() if master.ndim > 1]
        spared = [master for master in self.masters.values() if master.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": args.weight_decay}, {"params": spared, "weight_decay": 0.0}],
            lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
        )  # fmt: skip

    def run(self, rows: TokenRows, ids_of_step: list[np.ndarray]) -> Iterator[ReferenceStep]:
        """One result for each step; `ids_of_step` names the rows of each global batch."""
        for number, ids in enumerate(ids_of_step, start=1):
            samples = [sample for row in ids for sample in rows.samples(int(row))]
            loss, gradients = self._gradients(samples)
            norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
            rate = self.rate(number)
            self._update(gradients, norm, rate)
            yield ReferenceStep(loss, norm, rate, gradients, {name: master.clone() for name, master in self.masters.items()})

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ...: linear warm-up, then decay to min_lr at the last step."""
        args, peak, floor = self.args, self.args.learning_rate, float(self.args.min_lr or 0.0)
        if self.warmup and step <= self.warmup:
            return peak * step / self.warmup
        if args.lr_scheduler_type in ("constant", "constant_with_warmup"):
            return peak
        if args.lr_scheduler_type == "inverse_sqrt":
            return max(floor, peak * math.sqrt(max(self.warmup, 1) / step))
        done = (step - self.warmup) / (max(self.steps, self.warmup + 1) - self.warmup)
        share = 1 - done if args.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return floor + (peak - floor) * share

    def _gradients(self, samples: list[Any]) -> tuple[float, dict[str, Tensor]]:
        """Mean loss over all supervised tokens and its gradients, accumulated in fp32."""
        total = sum(int(sample.kept[1:].sum()) for sample in samples)
        sums = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        loss = 0.0
        for sample in samples:
            ids = torch.from_numpy(sample.ids.astype(np.int64))[None].to(self.device)
            labels = ids[0, 1:].masked_fill(~torch.from_numpy(sample.kept[1:].copy()).to(self.device), -100)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            summed = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
            if not bool((labels != -100).any()):
                continue
            summed.backward()
            loss += float(summed.detach())
            for name, parameter in self.names.items():
                sums[name] += parameter.grad.float()
                parameter.grad = None
        count = max(total, 1)
        return loss / count, {name: value / count for name, value in sums.items()}

    @torch.no_grad()
    def _update(self, gradients: dict[str, Tensor], norm: float, rate: float) -> None:
        limit = self.args.max_grad_norm
        scale = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        for name, master in self.masters.items():
            master.grad = gradients[name] * scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        for name, parameter in self.names.items():
            parameter.copy_(self.masters[name])
