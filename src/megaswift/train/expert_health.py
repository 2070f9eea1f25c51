"""How the experts of a model fare while it is trained: a line at every logging step, experts.json, and a page at the end.

What is counted: for each layer how many choices fell on each expert (padding left out), how undecided routers are, how far
their weights have moved, and, where there are validation rows, the load on the same rows before and after. No expert has a
capacity, so no token is ever dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megaswift.megatron.experts import ExpertsLayer
from megaswift.report.experts import experts_page
from megaswift.store.publish import put
from megaswift.train.callbacks import Callback, Verdict
from megaswift.train.setup import to_device

if TYPE_CHECKING:
    from megaswift.data.batches import EvalBatches
    from megaswift.megatron.router import Router
    from megaswift.train.log import RunLog
    from megaswift.train.trainer import StepResult, Trainer

FILE, PAGE = "experts.json", "experts.html"
WATCHED = 4  # steps of validation rows on which the load before and after is measured


def routers_of(chunks: Iterable[Any]) -> dict[int, Router]:
    """Layer number, from 0, -> router; of this stage."""
    every = (layer for chunk in chunks for layer in chunk.decoder.layers)
    layers = [layer for layer in every if isinstance(layer.mlp, ExpertsLayer)]
    return {int(layer.layer_number) - 1: layer.mlp.router for layer in layers}


class ExpertHealth(Callback):
    """Notes, tells and draws what the routers of all stages and ranks do; all ranks add it where a model has experts.

    Args:
        layers: of the whole model.
        experts: of a layer.
        every: steps between two lines; `last`: the last step.
    """

    def __init__(
        self,
        trainer: Trainer,
        validation: EvalBatches | None,
        device: torch.device,
        run_dir: Path,
        log: RunLog,
        extra: dict[str, Any],
        *,
        layers: int,
        experts: int,
        every: int,
        last: int,
        active: bool,
    ) -> None:
        self.trainer, self.validation, self.device = trainer, validation, device
        self.run_dir, self.log, self.active = run_dir, log, active
        self.layers, self.experts, self.every, self.last = layers, experts, every, last
        self.routers = routers_of(trainer.chunks)
        self.first: dict[int, Tensor] = {}
        self.began = 0
        # Of an earlier process of this run: the load before any training.
        self.found: dict[str, Any] = extra.get("experts") or {}

    def begin(self, step: int) -> None:
        self.began = step
        self.first = {number: router.routing_matrix().clone() for number, router in self.routers.items()}
        if "before" not in self.found and self.validation is not None and step == 0:
            self.found["before"] = self._watched()
        self._clear()

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        if step % self.every and step not in (1, self.last):
            return
        window = self._gathered()
        self._clear()
        self.found |= {"step": step, "window": window, "drift_since": self.began}
        if step == self.last and self.validation is not None:
            self.found["after"] = self._watched()
            self._clear()
        if self.active:
            row = summary(window)
            self.log.experts(step, row, line(row))
            self._write(with_page=step == self.last)

    def boundary(self, step: int, verdict: Verdict) -> None:
        if verdict.stop and self.active and "window" in self.found:
            self._write(with_page=True)

    def state(self) -> dict[str, Any]:
        return {"experts": {"before": self.found["before"]}} if "before" in self.found else {}

    def _watched(self) -> list[dict[str, Any]]:
        """What routers do with the first validation rows; all ranks call it."""
        assert self.validation is not None
        self._clear()
        with watched(self.routers):
            steps = range(min(len(self.validation), WATCHED))
            self.trainer.evaluate(to_device(self.validation.step(k), self.device) for k in steps)
        return self._gathered()

    def _clear(self) -> None:
        for router in self.routers.values():
            if router.seen is not None:
                router.seen.clear()

    def _gathered(self) -> list[dict[str, Any]]:
        return gathered(self.routers, self.first, self.layers, self.experts, self.device)

    def _write(self, with_page: bool) -> None:
        put(self.run_dir / FILE, json.dumps(self.found, ensure_ascii=False) + "\n", durable=False)
        if with_page:
            put(self.run_dir / PAGE, experts_page(self.found), durable=False)


@contextmanager
def watched(routers: Mapping[int, Router]) -> Iterator[None]:
    """Routers note what they do outside of training, too."""
    for router in routers.values():
        router.watching = True
    try:
        yield
    finally:
        for router in routers.values():
            router.watching = False


def gathered(
    routers: Mapping[int, Router], first: Mapping[int, Tensor], layers: int, experts: int, device: torch.device
) -> list[dict[str, Any]]:
    """What all ranks noted since the last time, layer by layer; all ranks call it.

    Args:
        first: the weights that routers are compared with.
        layers: of the whole model; experts: of a layer.
    """
    table = torch.zeros((layers, experts + 7), dtype=torch.float64, device=device)
    alone = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    alone = alone and parallel_state.get_tensor_model_parallel_rank() == 0
    for number, router in routers.items():
        if router.seen is not None:
            table[number, :experts] = router.seen.load
            table[number, experts : experts + 5] = router.seen.figures
        if alone and number in first:
            table[number, -2] = (router.routing_matrix() - first[number]).square().sum()
            table[number, -1] = first[number].square().sum()
    dist.all_reduce(table)
    made = []
    for number, values in enumerate(table.tolist()):
        load, (tokens, entropy, balance, z_loss, weight, moved, size) = values[:experts], values[experts:]
        if tokens <= 0:
            continue  # a layer without experts, or nothing was noted
        made.append(
            {
                "layer": number,
                "tokens": int(tokens),
                "load": [int(value) for value in load],
                "router_entropy": entropy / tokens / math.log(experts) if experts > 1 else 0.0,
                "drift": math.sqrt(moved / size) if size > 0 else 0.0,
                "dropped": 0,
                **({"aux_loss": balance / weight, "z_loss": z_loss / weight} if weight > 0 else {}),
            }
        )
    return made


def summary(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one line: the worst of all layers, or their mean."""
    if not layers:
        return {}
    peaks = {layer["layer"]: max(layer["load"]) * len(layer["load"]) / max(sum(layer["load"]), 1) for layer in layers}
    worst = max(peaks, key=lambda number: peaks[number])
    row: dict[str, Any] = {
        "expert_busiest": round(peaks[worst], 3),
        "expert_busiest_layer": worst,
        "experts_idle": sum(load == 0 for layer in layers for load in layer["load"]),
        "expert_load_entropy": round(sum(load_entropy(layer["load"]) for layer in layers) / len(layers), 4),
        "router_entropy": round(sum(layer["router_entropy"] for layer in layers) / len(layers), 4),
        "router_drift": round(max(layer["drift"] for layer in layers), 6),
    }
    for name in ("aux_loss", "z_loss"):
        if name in layers[0]:
            row[name] = round(sum(layer[name] for layer in layers) / len(layers), 6)
    return row


def load_entropy(load: list[int]) -> float:
    """How evenly the load lies, from 0, all on one expert, to 1, the same on each."""
    total = sum(load)
    if not total or len(load) < 2:
        return 0.0
    return -sum(value / total * math.log(value / total) for value in load if value) / math.log(len(load))


def line(row: dict[str, Any]) -> str:
    """The line that people read."""
    if not row:
        return "experts: nothing was routed"
    moved = f", routers moved {100 * row['router_drift']:.2f} %" if "router_drift" in row else ""
    more = f", balancing loss {row['aux_loss']:.3f}, z loss {row['z_loss']:.3f}" if "aux_loss" in row else ""
    return (
        f"experts: busiest {row['expert_busiest']:.1f} x the mean (layer {row['expert_busiest_layer']}), {row['experts_idle']} idle, "
        f"evenness {row['expert_load_entropy']:.2f}{moved}{more}"
    )
