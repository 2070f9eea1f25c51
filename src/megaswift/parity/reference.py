"""The reference: transformers' model with torch's AdamW, on the same rows, sample by sample.

Nothing of the engine is used here. A sample is run alone, without padding and without packing, so that a wrong mask,
position or label shift of the engine cannot hide in both sides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.config.options import SftArguments
from megaswift.data.store import TokenRows
from megaswift.data.tokens import Encoded, weights_of
from megaswift.models import family_of
from megaswift.models.head import auto_class, auto_config
from megaswift.models.whole import whole_of
from megaswift.parity.adapters import PeftSide, Tokens
from megaswift.parity.layers import of_transformers
from megaswift.run.resolve import min_lr
from megaswift.terminal import say
from megaswift.weights.hf.config import load_config
from megaswift.weights.torch_dtypes import TORCH_DTYPES


def write_samples(path: Path, samples: Iterable[Encoded]) -> None:
    """One line a sample, as transformers takes them: input_ids, and labels that are -100 where a token has no loss."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            labels = np.where(sample.kept, sample.ids.astype(np.int64), -100)
            file.write(json.dumps({"input_ids": sample.ids.tolist(), "labels": labels.tolist()}) + "\n")


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


def learning_rate(args: SftArguments, step: int, steps: int, warmup: int) -> float:
    """The rate of step 1 ... `steps`, in closed form: linear warm-up, then a decay that reaches min_lr at the last step.

    Only inverse_sqrt ends where its formula ends. warmup_stable_decay stays at the peak and decays in the last tenth.
    """
    peak, floor, style = args.learning_rate, min_lr(args), args.lr_scheduler_type
    if warmup and step <= warmup:
        return peak * step / warmup
    if style in ("constant", "constant_with_warmup"):
        return peak
    if style == "inverse_sqrt":
        return max(floor, peak * math.sqrt(max(warmup, 1) / step))
    last = max(steps, warmup + 1)
    span = max(1, math.ceil(0.1 * (steps - warmup))) if style == "warmup_stable_decay" else last - warmup
    done = max(0.0, (step - (last - span)) / span)
    share = 1 - done if style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return floor + (peak - floor) * share


def learn_every_row(model: Any) -> list[int]:
    """Take padding_idx from a transformers model's embeddings; the tokens whose rows would have had no gradient.

    A pad token may have another work too: in many models it ends every turn.
    """
    frozen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            frozen.append(module.padding_idx)
            module.padding_idx = None
    return frozen


class Reference:
    """transformers' model and torch.optim.AdamW over fp32 master weights; with an adapter PEFT's model of it.

    Takes its numbers from the options, as a user of transformers would, and not from the Run that the engine follows.

    Args:
        folder: Hugging Face folder; dtype: of its weights here.
        steps, warmup: of the run's schedule.
        adapter: what is trained beside the model; None: all weights are.
    """

    def __init__(
        self, folder: Path, args: SftArguments, dtype: str, steps: int, warmup: int, adapter: PeftSide | None = None
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.args, self.steps, self.warmup, self.exact = args, steps, warmup, dtype == "fp32"
        config, options = load_config(folder), {"local_files_only": True, "trust_remote_code": False}
        family, whole = family_of(config.model_type), whole_of(config)
        for field in sorted(family.left_out):
            if getattr(config, field, None):
                say(f"reference: trained without {field}, as the engine trains")
                setattr(config, field, 0.0)
        self.model: Any = auto_class(config).from_pretrained(
            folder, config=auto_config(config), dtype=TORCH_DTYPES[dtype], **options, **family.loading(config)
        )
        for token in learn_every_row(self.model):
            say(f"reference: built without padding_idx; the embedding of token {token}, the pad token, gets its gradient too")
        self.model.to(self.device).train()
        # A bias of a choice that a class calls a parameter gets no gradient; weight decay alone would move it here.
        still = {one.loaded or one.hf[0].in_model for one in family.parameters(config) if not one.trained}
        if whole is not None:  # its towers are no part of what is trained
            text = {name for one in family.parameters(config) for name in (one.loaded, *(part.in_model for part in one.hf))}
            still |= {name for name, _ in self.model.named_parameters()} - text
        self.names: dict[str, Any] = {name: one for name, one in self.model.named_parameters() if name not in still}
        for name, one in self.model.named_parameters():
            one.requires_grad_(name in self.names)
        self.tokens: Tokens | None = None
        self.step = 0  # steps that were made
        if adapter is not None:
            self.model, self.names, self.tokens = adapter.wrap(self.model, folder)
            self.model.train()
        self.masters = {name: parameter.detach().float().clone() for name, parameter in self.names.items()}
        ratio = (adapter.lora.lr_ratio if adapter is not None else None) or 1.0
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, master in self.masters.items():
            matrix = master.ndim > 1 and not name.endswith("bias")  # biases of all experts stand in one matrix
            key = (args.weight_decay if matrix else 0.0, ratio if ".lora_B." in name else 1.0)
            groups.setdefault(key, []).append(master)
        self.optimizer = torch.optim.AdamW(
            [{"params": params, "weight_decay": decay, "ratio": own} for (decay, own), params in groups.items()],
            lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
        )  # fmt: skip

    def run(self, rows: TokenRows, ids_of_step: list[np.ndarray], keep: bool = True) -> Iterator[ReferenceStep]:
        """One result for each step; `ids_of_step` names the rows of each global batch.

        With `keep` False the results have no gradients and weights: a whole run is only followed by its numbers.
        """
        for number, ids in enumerate(ids_of_step, start=1):
            self.step = number - 1
            loss, gradients = self._gradients([sample for row in ids for sample in _placed(rows, int(row))])
            norm = math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in gradients.values()))
            rate = self.rate(number)
            self._update(gradients, norm, rate)
            weights = {name: master.clone() for name, master in self.masters.items()} if keep else {}
            yield ReferenceStep(loss, norm, rate, gradients if keep else {}, weights)

    @torch.no_grad()
    def layers(self, rows: TokenRows, ids: np.ndarray) -> list[float]:
        """The hidden states after every layer as one number each (see layers.py), over the rows of a global batch."""
        self.model.eval()
        with of_transformers(self.model if self.tokens is None else self.model.get_base_model()) as sums:
            for row in ids:
                for sample in rows.samples(int(row)):
                    self._summed_loss(sample)
        self.model.train()
        return sums

    @torch.no_grad()
    def evaluate(self, rows: TokenRows) -> float:
        """Mean loss over all supervised tokens of the rows, by their weights."""
        total, weight = 0.0, 0.0
        self.model.eval()
        for row in range(len(rows)):
            for sample in rows.samples(row):
                total += float(self._summed_loss(sample))
                weight += _weight(sample)
        self.model.train()
        return total / weight if weight else 0.0

    def save(self, folder: Path) -> None:
        """Write the model as it is now as a Hugging Face folder, weights and config."""
        self.model.save_pretrained(folder)

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ..."""
        return learning_rate(self.args, step, self.steps, self.warmup)

    def _summed_loss(self, sample: Encoded) -> Tensor:
        """Cross entropy summed over the supervised tokens of one sample, each times its weight."""
        ids = torch.from_numpy(sample.ids.astype(np.int64))[None].to(self.device)
        labels = ids[0, 1:].masked_fill(~torch.from_numpy(sample.kept[1:].copy()).to(self.device), -100)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        if self.exact and not logits.is_cuda:
            # On CPUs PyTorch's fp32 softmax of 50,000 columns sums up to 1 +- 1e-5, which is more than is compared here.
            logits = logits.double()
        if sample.weights is None:
            return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        return (losses * torch.from_numpy(weights_of(sample)[1:]).to(self.device)).sum()

    def _gradients(self, samples: list[tuple[int, int, Encoded]]) -> tuple[float, dict[str, Tensor]]:
        """Mean loss over all supervised tokens, by their weights, and its gradients, accumulated in fp32."""
        weight = sum(_weight(sample) for *_, sample in samples) or 1.0
        sums = {} if self.exact else {name: torch.zeros_like(master) for name, master in self.masters.items()}
        loss = 0.0
        for row, place, sample in samples:
            if not sample.kept[1:].any():
                continue
            if self.tokens is not None:
                self.tokens.set(row, place, len(sample.ids), self.step)
            summed = self._summed_loss(sample)
            summed.backward()
            loss += float(summed.detach())
            if self.exact:
                continue  # autograd adds up in fp32 itself
            for name, parameter in self.names.items():
                sums[name] += parameter.grad.float()
            self._forget_gradients()
        if self.exact:
            for name, parameter in self.names.items():
                sums[name] = torch.zeros_like(self.masters[name]) if parameter.grad is None else parameter.grad
            self._forget_gradients()
        return loss / weight, {name: value / weight for name, value in sums.items()}

    def _forget_gradients(self) -> None:
        for parameter in self.names.values():  # several may be parts of one tensor: all were read
            parameter.grad = None

    @torch.no_grad()
    def _update(self, gradients: dict[str, Tensor], norm: float, rate: float) -> None:
        limit = self.args.max_grad_norm
        scale = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        for name, master in self.masters.items():
            master.grad = gradients[name] * scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        for name, parameter in self.names.items():
            parameter.copy_(self.masters[name])


def _placed(rows: TokenRows, row: int) -> Iterator[tuple[int, int, Encoded]]:
    """(row, place of its first token in the row, sample) of every sample of a row."""
    place = 0
    for sample in rows.samples(row):
        yield row, place, sample
        place += len(sample.ids)


def _weight(sample: Encoded) -> float:
    """Sum of the weights of what a sample must predict; its first token is predicted by nothing."""
    return float(weights_of(sample)[1:].sum(dtype=np.float64))
