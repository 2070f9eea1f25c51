"""What happens beside the steps of training: callbacks that the loop calls at its moments, in their order, on all ranks.

class Tracker(Callback):                                     # overrides what it needs, and no more
    def step(self, step, result, seconds): ...
    def evaluated(self, step, loss, metrics): ...

callbacks.add(Tracker())
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from types import TracebackType

    from megaswift.launch.signals import StopSignals
    from megaswift.launch.watchdog import Watchdog
    from megaswift.megatron.graphs import Graphs
    from megaswift.train.log import RunLog
    from megaswift.train.trainer import StepResult


@dataclass(frozen=True)
class Verdict:
    """What a rank asks for at a step boundary; or what all ranks agreed to, which is what any of them asks for.

    Attributes:
        stop: save and end the run here, as a signal asks.
        busy: what goes on in the background is not done, so the boundary cannot finish it without waiting.
    """

    stop: bool = False
    busy: bool = False


class Callback:
    """The moments of a run. All ranks call all of them, so what raises must raise on all alike; steps count from 1."""

    def begin(self, step: int) -> None:
        """Before the first step that this process makes; `step` were made by earlier ones."""

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        """A step is done; `seconds` is its time, data and the callbacks of the step before included."""

    def evaluated(self, step: int, loss: float, metrics: dict[str, float]) -> None:
        """The validation loss after a step is known, and the objective's metrics of the validation rows as means."""

    def saved(self, step: int, directory: Path, seconds: float, waited: float) -> None:
        """A checkpoint is safe: seconds since it was begun, and those of them in which training waited for it."""

    def asks(self) -> Verdict:
        """What this rank asks for, at the boundary that comes now."""
        return Verdict()

    def boundary(self, step: int, verdict: Verdict) -> None:
        """Between two steps, once the ranks agreed: the only place where a run may be saved or stopped."""

    def state(self) -> dict[str, Any]:
        """What each checkpoint keeps, so that a run that goes on from it knows it again."""
        return {}

    def end(self) -> None:
        """The run is over, however it ended."""


OfCallback = TypeVar("OfCallback", bound=Callback)


class Callbacks:
    """The callbacks of a run; when the context is left, all of them end, the last one first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._members: list[Callback] = []
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ends.__exit__(kind, error, trace)

    def add(self, callback: OfCallback) -> OfCallback:
        """Put one behind the others."""
        self._members.append(callback)
        self._ends.callback(callback.end)
        return callback

    def agree(self) -> Verdict:
        """What the callbacks of all ranks ask for; called by all ranks at the same place."""
        asked = [callback.asks() for callback in self._members]
        flags = torch.tensor([float(any(x.stop for x in asked)), float(any(x.busy for x in asked))], device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, busy = flags.tolist()
        return Verdict(bool(stop), bool(busy))

    def begin(self, step: int) -> None:
        """See Callback, as for the others."""
        for callback in self._members:
            callback.begin(step)

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        for callback in self._members:
            callback.step(step, result, seconds)

    def evaluated(self, step: int, loss: float, metrics: dict[str, float]) -> None:
        for callback in self._members:
            callback.evaluated(step, loss, metrics)

    def saved(self, step: int, directory: Path, seconds: float, waited: float) -> None:
        for callback in self._members:
            callback.saved(step, directory, seconds, waited)

    def boundary(self, step: int, verdict: Verdict) -> None:
        for callback in self._members:
            callback.boundary(step, verdict)

    def state(self) -> dict[str, Any]:
        return {name: value for callback in self._members for name, value in callback.state().items()}


class StopOnSignal(Callback):
    """Asks for a stop once a signal was heard."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def asks(self) -> Verdict:
        return Verdict(stop=bool(self.signals.asked))


class Heartbeat(Callback):
    """Tells the watchdog that steps are made."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def begin(self, step: int) -> None:
        self.watchdog.long("the first step")  # kernels are compiled in it

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        self.watchdog.beat(f"step {step + 1}")


class GraphNotes(Callback):
    """Tells what was decided about CUDA graphs."""

    def __init__(self, graphs: Graphs, log: RunLog) -> None:
        self.graphs, self.log = graphs, log

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        if note := self.graphs.take_note():
            self.log.note(note)
