"""Pairs for tests, a run over them, and what plain PyTorch and transformers make of a step of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.config.options import RlhfArguments
from megaswift.data.encode import PreparedData, prepare
from megaswift.data.store import TokenRows
from megaswift.data.tokens import Encoded
from megaswift.parity.reference import Reference
from megaswift.run.setup import preferences_of, resolved, template_of
from megaswift.run.source import resolve_source
from megaswift.run.spec import RUN_FILE, Run
from megaswift.store.cache import cache_root
from tests.engine.test_experts import router_losses

WORDS = "who are you what is this a good day to learn new things about large models and small ones".split()
PAIRS, MAX_LENGTH = 24, 136


def say(start: int, count: int) -> str:
    return " ".join(WORDS[(start + k) % len(WORDS)] for k in range(count))


def write_pairs(path: Path, count: int = PAIRS) -> Path:
    """Pairs of different lengths, some with two turns; the chosen answer of every third is the longer one."""
    with path.open("w", encoding="utf-8") as file:
        for k in range(count):
            asked = [{"role": "user", "content": say(k * 5, 1 + k % 4)}]
            if k % 4 == 0:
                asked += [{"role": "assistant", "content": say(k, 2)}, {"role": "user", "content": say(k + 1, 2)}]
            chosen, rejected = say(k * 7, 1 + k % 5), say(k * 11 + 4, 2 + (k * 2) % 4)
            row = {"messages": [*asked, {"role": "assistant", "content": chosen}], "rejected_response": rejected}
            file.write(json.dumps(row) + "\n")
    return path


def write_labelled(path: Path, count: int = PAIRS) -> Path:
    """Answers with labels, of which two in three are good ones."""
    with path.open("w", encoding="utf-8") as file:
        for k in range(count):
            turns = [
                {"role": "user", "content": say(k * 5, 1 + k % 4)},
                {"role": "assistant", "content": say(k * 7, 1 + k % 5)},
            ]
            file.write(json.dumps({"messages": turns, "label": k % 3 != 1}) + "\n")
    return path


def prepared(start: Path, rows: Path, **options: Any) -> tuple[RlhfArguments, PreparedData, Any, int]:
    """Options as they are resolved, the data, where training starts, and the pad token."""
    options = {"max_length": MAX_LENGTH, "dataset_test_ratio": 0.0, "max_steps": 1, **options}
    arguments = options.pop("arguments", RlhfArguments)
    found = resolve_source(arguments(resume_from_checkpoint=str(start), dataset=[str(rows)], **options))
    args: Any = found.args
    template = template_of(args, found)
    data = prepare(args, template, cache_dir=cache_root(), packing=args.packing, preferences=preferences_of(args))
    return args, data, found, template.pad_id


def job(
    start: Path, rows: Path, world: int, tp: int, pp: int, sp: bool, cp: int, vpp: int = 1, *, batch: int, **more: Any
) -> Run:
    """One step over all rows. `batch`: rows of a micro batch."""
    layout = dict(tp=tp, pp=pp, vpp=vpp, cp=cp, sequence_parallel=sp, batch_size=batch)
    with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world)}):
        args, data, found, pad_id = prepared(start, rows, **layout, **more)
        assert len(data.train) % (batch * world) == 0, f"{len(data.train)} rows are no whole micro batches"
        args = args.changed(gradient_accumulation_steps=len(data.train) // (batch * world))
        return resolved(args, replace(found, args=args), data, world, rows.parent, pad_id)


def kept_files(run_dir: Path) -> list[Path]:
    """Where the cache keeps, or would keep, what the reference of a run says."""
    from megaswift.train.reference import cached, weights_named

    run = Run.read(run_dir / RUN_FILE)
    return [cached(weights_named(run), TokenRows.open(path)) for path in (run.data.train, run.data.val) if path]


def forget(run_dir: Path) -> None:
    """Let the next run over the same compute its reference anew."""
    for path in kept_files(run_dir):
        path.unlink(missing_ok=True)


def any_reference(rows: TokenRows) -> np.ndarray:
    """A reference that is not what is trained, fp32 [places]: numbers that follow from the samples alone, whatever their order.

    A little below what a model that has learnt nothing says of so many tokens, so that KTO's distance is above 0.
    """
    values = []
    for row in range(len(rows)):
        for sample in rows.samples(row):
            values.append(-5.9 * int(sample.kept[1:].sum()) - 0.1 * int(sample.ids.astype(np.int64).sum() % 7))
    return np.array(values, np.float32)


class PlainStep(Reference):
    """transformers' model and torch's AdamW, whose loss is a function of what it says of single samples.

    Args:
        worth: (log-probabilities [n], tokens [n], the reference's [n], desirable [n]) of all samples of a step -> mean loss. Every
            second sample is a mismatched one where rows have them.
    """

    def __init__(self, worth: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *args: Any) -> None:
        super().__init__(*args)
        self.worth = worth
        self.said: Tensor | None = None  # log-probabilities of the step before the update
        self.rows: TokenRows | None = None
        self.balance = 0.0  # weight of the routers' balancing loss, each pair a micro batch
        self.routed: list[Any] = []

    def run(self, rows: TokenRows, ids_of_step: list[np.ndarray], keep: bool = True) -> Any:
        self.rows, self.ids = rows, ids_of_step
        return super().run(rows, ids_of_step, keep)

    def log_probability(self, sample: Encoded) -> Tensor:
        ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
        more = {"output_router_logits": True} if self.balance else {}
        made = self.model(input_ids=ids, use_cache=False, **more)
        logits = made.logits[0, :-1].double()
        if self.balance:
            self.routed.append(made.router_logits)
        found = F.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None]).squeeze(1)
        return (found * torch.from_numpy(sample.kept[1:].copy())).sum()

    def _gradients(self, samples: list[tuple[int, int, Encoded]]) -> tuple[float, dict[str, Tensor]]:
        assert self.rows is not None
        row_ids = self.ids[self.step]
        good = torch.from_numpy(np.concatenate([self.rows.desirable(row) for row in row_ids]))
        assert self.rows.reference is not None
        said = np.concatenate([self.rows.reference[self.rows.places(row)] for row in row_ids])
        found = []
        for row, place, sample in samples:
            if self.tokens is not None:
                self.tokens.set(row, place, len(sample.ids), self.step)
            found.append(self.log_probability(sample))
        counts = torch.tensor([float(sample.kept[1:].sum()) for *_, sample in samples], dtype=torch.float64)
        self.said = torch.stack(found).detach()
        loss = self.worth(torch.stack(found), counts, torch.from_numpy(said).double(), good)
        more: Any = 0.0
        for one, other in zip(self.routed[::2], self.routed[1::2]):
            layers = tuple(torch.cat(parts) for parts in zip(one, other))
            more = more + self.balance * router_losses(layers, self.model.config.num_experts_per_tok)[0] / (len(found) / 2)
        (loss + more).backward()
        gradients = {
            name: torch.zeros_like(self.masters[name]) if parameter.grad is None else parameter.grad
            for name, parameter in self.names.items()
        }
        self._forget_gradients()
        return float(loss.detach()), gradients
