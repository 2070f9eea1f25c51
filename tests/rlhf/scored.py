"""Rows that are scored, and what plain transformers makes of a step of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaswift.data.store import TokenRows
from megaswift.data.tokens import Encoded
from megaswift.models.head import auto_class
from megaswift.parity.reference import Reference
from megaswift.run.spec import Run
from megaswift.train.head import first_scores
from megaswift.weights.hf.config import load_config
from tests.rlhf.pairs import PAIRS, say


def write_classes(path: Path, label: Callable[[int], Any], count: int = PAIRS) -> Path:
    """Rows with labels: questions, and every third a conversation that ends with an answer, every seventh plain text."""
    with path.open("w", encoding="utf-8") as file:
        for k in range(count):
            turns = [{"role": "user", "content": say(k * 5, 1 + k % 6)}]
            if k % 3 == 0:
                turns.append({"role": "assistant", "content": say(k * 7, 1 + k % 5)})
            row = {"text": say(k * 3, 2 + k % 4)} if k % 7 == 5 else {"messages": turns}
            file.write(json.dumps(row | {"label": label(k)}) + "\n")
    return path


def write_margins(path: Path, pairs: Path) -> Path:
    """The same pairs, each with a margin, but for every fourth."""
    lines = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for k, row in enumerate(lines):
            file.write(json.dumps(row | ({} if k % 4 == 3 else {"margin": 0.1 * (k % 5) - 0.1})) + "\n")
    return path


def scored_folder(folder: Path, run: Run, target: Path) -> Path:
    """What a run begins from as transformers holds it: the layers of a language model, and the run's head."""
    config = load_config(Path(run.model.directory))
    model = auto_class(config).from_pretrained(folder, config=config, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(first_scores(config, run.seed))
    model.save_pretrained(target)
    return target


class PlainScores(Reference):
    """transformers' model, which finds the token that is scored by itself, and torch's AdamW.

    Args:
        worth: (scores [n, labels], values [n, ...]) of all samples of a step -> mean loss.
    """

    def __init__(self, worth: Callable[[Tensor, Tensor], Tensor], *args: Any) -> None:
        super().__init__(*args)
        self.worth = worth
        self.said: Tensor | None = None  # scores of the step before the update
        self.rows: TokenRows | None = None

    def run(self, rows: TokenRows, ids_of_step: list[np.ndarray], keep: bool = True) -> Any:
        self.rows, self.ids = rows, ids_of_step
        return super().run(rows, ids_of_step, keep)

    def _gradients(self, samples: list[tuple[int, int, Encoded]]) -> tuple[float, dict[str, Tensor]]:
        assert self.rows is not None
        values = torch.from_numpy(np.concatenate([self.rows.values(row) for row in self.ids[self.step]]))
        found = []
        for row, place, sample in samples:
            if self.tokens is not None:
                self.tokens.set(row, place, len(sample.ids), self.step)
            found.append(self.model(input_ids=torch.from_numpy(sample.ids.astype(np.int64))[None], use_cache=False).logits[0])
        self.said = torch.stack(found).detach()
        loss = self.worth(torch.stack(found).double(), values.double())
        loss.backward()
        gradients = {
            name: torch.zeros_like(self.masters[name]) if parameter.grad is None else parameter.grad
            for name, parameter in self.names.items()
        }
        self._forget_gradients()
        return float(loss.detach()), gradients
