"""Tries of a run that is not one yet: whether it fits, the smallest change that makes it fit, and which layouts are fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from megaswift.config.options import SftArguments
from megaswift.models import family_of
from megaswift.models.family import sizes_of
from megaswift.run.cards import CPU, Card
from megaswift.run.experts import experts_of
from megaswift.run.memory import MemoryEstimate, estimate
from megaswift.run.problem import Problem, divisors
from megaswift.run.problems import contradictions, problems
from megaswift.run.resolve import World, accumulation, resolve
from megaswift.run.source import TrainingSource
from megaswift.run.spec import Run
from megaswift.run.speed import Speed, speed_of

A = TypeVar("A", bound=SftArguments)

LONG = 8192  # tokens from which rows are worth being split over processes
MOST_GPUS = 1024
MOST_TRIES = 4000


@dataclass(frozen=True)
class Place:
    """Where a run would be.

    Attributes:
        gpus: processes, one for each GPU.
        host: bytes of host memory for all processes of a machine together; 0: not known.
        local: processes of a machine.
        cores: of each process.
        kept_batch: rows of a step where an earlier part of the run fixed them.
    """

    gpus: int
    card: Card
    host: int = 0
    local: int = 1
    cores: int = 1
    kept_batch: int | None = None

    @property
    def on_gpu(self) -> bool:
        return self.card.name != CPU


@dataclass(frozen=True)
class Trial:
    """One setting, with what becomes of it."""

    args: SftArguments
    source: TrainingSource
    place: Place
    run: Run

    @cached_property
    def memory(self) -> MemoryEstimate:
        return estimate(self.run, self.source.config, self.place.card.memory if self.place.on_gpu else None)

    @cached_property
    def speed(self) -> Speed:
        return speed_of(self.run, self.source.config, self.memory, self.place.card, self.place.cores)

    @cached_property
    def wrong(self) -> list[Problem]:
        """Why it cannot be, memory apart."""
        return [*contradictions(self.args), *problems(self.run, self.source.config)]

    @property
    def fits(self) -> bool:
        """Whether the memory suffices. On a CPU only what lies there between two steps is judged: the system may swap the rest."""
        place, memory = self.place, self.memory
        if place.on_gpu:
            return memory.needed <= place.card.memory and (not place.host or self.host_needed <= place.host)
        return not place.host or self.host_needed <= place.host

    @property
    def host_needed(self) -> int:
        """Host memory of all processes of a machine."""
        memory = self.memory
        own = sum(memory.host.values()) + sum(memory.saving.values())
        return self.place.local * (own if self.place.on_gpu else own + sum(memory.device.values()))

    @property
    def short(self) -> int:
        """Bytes that lack."""
        place = self.place
        if place.on_gpu and self.memory.needed > place.card.memory:
            return self.memory.needed - place.card.memory
        return max(0, self.host_needed - place.host) if place.host else 0


def tried(args: SftArguments, source: TrainingSource, place: Place) -> Trial:
    """A setting as it is; nothing is judged. What an adapter is made of follows from the options, as far as they may change here."""
    adapter = source.adapter
    if adapter is not None and adapter.bits != args.quantization_bit:
        source = replace(source, adapter=replace(adapter, bits=args.quantization_bit))
    run = resolve(args, source, World(place.gpus, place.on_gpu), earlier_batch=place.kept_batch)
    return Trial(args, source, place, run)


@dataclass(frozen=True)
class Change:
    """Options of one kind with other values.

    Attributes:
        options: name -> value.
        weight: how much it asks for: 1 changes nothing that is learnt and costs nearly nothing.
        by_itself: whether `--fit true` may take it: it changes neither the rows nor the base.
    """

    options: tuple[tuple[str, Any], ...]
    weight: int
    by_itself: bool = True

    @property
    def words(self) -> str:
        """As they are typed."""
        return " ".join(f"--{name} {_typed(value)}" for name, value in self.options)


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def smallest_change(trial: Trial, *, layouts: bool = True, by_itself: bool = False) -> tuple[Change, ...] | None:
    """The smallest set of changes with which a setting fits; () where it does; None where none helps.

    Args:
        layouts: whether the way in which the processes are used may change.
        by_itself: leave out what `--fit true` may not take.
    """
    if trial.fits:
        return ()
    kinds = [[None, *kind] for kind in _kinds(trial, layouts) if kind]
    if by_itself:
        kinds = [[one for one in kind if one is None or one.by_itself] for kind in kinds]
    every: list[tuple[Change, ...]] = [tuple(one for one in made if one is not None) for made in itertools.product(*kinds)]
    every.sort(key=lambda made: (sum(one.weight for one in made), len(made)))
    best: tuple[float, tuple[Change, ...]] | None = None
    least: int | None = None
    for made in every[1:MOST_TRIES]:
        weight = sum(one.weight for one in made)
        if least is not None and weight > least:
            break
        found = with_changes(trial, made)
        if not found.fits or found.wrong:
            continue
        least = weight
        if best is None or found.speed.step < best[0]:
            best = found.speed.step, made
    return best[1] if best is not None else None


def with_changes(trial: Trial, changes: tuple[Change, ...]) -> Trial:
    """The same setting with the changes."""
    return tried(changed(trial.args, changes), trial.source, trial.place)


def changed(args: A, changes: tuple[Change, ...]) -> A:
    """Options with the changes."""
    return args.changed(**{name: value for change in changes for name, value in change.options})


def _kinds(trial: Trial, layouts: bool) -> Iterator[list[Change]]:
    """What may be changed, kind by kind, of which a set of changes has one at most."""
    args, run, config, place = trial.args, trial.run, trial.source.config, trial.place
    yield _smaller_micro_batches(trial)
    adapter, gpu = trial.source.adapter, place.on_gpu
    silu = all(kind.activation == "silu" and kind.mlp != "plain" for kind in family_of(config.model_type).layers(config))
    dense = experts_of(config) is None
    parts = []
    if not args.gradient_checkpointing:
        if silu and dense and adapter is None and run.memory.recompute != "mlp":
            if run.memory.recompute == "none":
                parts.append(Change((("recompute_modules", "swiglu"),), 1))
            parts.append(Change((("recompute_modules", "mlp"),), 4))
        parts.append(Change((("recompute_modules", "auto"), ("gradient_checkpointing", True)), 5))
    yield parts
    moments = []
    if run.optimizer.state_dtype == "fp32" and run.precision.dtype != "fp16" and place.kept_batch is None:
        moments = [Change((("optim", "adamw_bf16"),), 7), Change((("optim", "adamw_8bit"),), 8)]
    yield moments
    if gpu and not run.memory.optimizer_on_host and run.precision.dtype != "fp16" and adapter is None:
        yield [Change((("optimizer_cpu_offload", True),), 9)]
    if adapter is not None and adapter.bits is None and not adapter.is_part_of_base:
        yield [Change((("quantization_bit", 8),), 10, by_itself=False), Change((("quantization_bit", 4),), 11, by_itself=False)]
    if layouts and place.gpus > 1 and gpu:
        yield [Change(options, 6) for options in _layouts(trial) if options != _layout_of(args)]
    if layouts:
        lengths = [run.batch.max_length // part for part in (2, 4) if run.batch.max_length // part >= 512]
        yield [Change((("max_length", length),), 20 + number, by_itself=False) for number, length in enumerate(lengths)]


def _smaller_micro_batches(trial: Trial) -> list[Change]:
    """Micro batches of fewer rows, and as many more of them, so that the step stays the same."""
    size, rows, gpus = trial.run.batch.micro_batch_size, trial.run.batch.global_batch_size, trial.place.gpus
    found: list[Change] = []
    for smaller in sorted((one for one in divisors(size) if one < size), reverse=True):
        if rows % (smaller * gpus) == 0:
            options: tuple[tuple[str, Any], ...] = (("batch_size", smaller),)
            if trial.place.kept_batch is None and rows // (smaller * gpus) != accumulation(
                trial.args.changed(batch_size=smaller), gpus
            ):
                options = (*options, ("gradient_accumulation_steps", rows // (smaller * gpus)))
            found.append(Change(options, 1 + len(found)))
    return found


Options = tuple[tuple[str, Any], ...]


def _layout_of(args: SftArguments) -> Options:
    return tuple((name, getattr(args, name)) for name in ("tp", "pp", "cp", "ep", "sequence_parallel"))


def _layouts(trial: Trial) -> list[Options]:
    """Ways to use the processes that are worth a try, whether or not they are legal; vpp and etp stay as they were asked for."""
    config, gpus, asked = trial.source.config, trial.place.gpus, trial.run
    sizes, experts = sizes_of(config), experts_of(config)
    tps = [
        size
        for size in divisors(gpus)
        if size <= min(8, trial.place.local if trial.place.local > 1 else 8) and not sizes.kv_heads % size
    ]
    cps = [
        size
        for size in divisors(gpus)
        if size in (1, asked.parallel.cp) or (asked.batch.max_length >= LONG * size // 2 and size <= 8)
    ]
    found: list[Options] = []
    for tp, cp, pp in itertools.product(tps, cps, divisors(gpus)):
        if gpus % (tp * cp * pp) or pp > sizes.layers:
            continue
        eps = [1]
        if experts is not None:
            eps = [size for size in divisors(gpus // pp) if size <= 64 and not experts.count % size]
            eps = sorted({1, *eps[-2:], asked.parallel.ep} & set(eps))
        for ep in eps:
            along = [False, True] if tp > 1 else [False]
            found += [(("tp", tp), ("pp", pp), ("cp", cp), ("ep", ep), ("sequence_parallel", sp)) for sp in along]
    return found


def ranked(trial: Trial) -> list[Trial]:
    """Legal layouts that fit, the fastest first, each with the least recomputation that fits.

    Micro batches become larger where that was left open and is faster; the step keeps its rows.
    """
    found = []
    for layout in _layouts(trial):
        args = trial.args.changed(**dict(layout))
        first = tried(args, trial.source, trial.place)
        if first.wrong:
            continue
        best: Trial | None = None
        for size in _micro_batches(trial):
            made = _least_recomputed(tried(args.changed(**dict(size)), trial.source, trial.place))
            if made is not None and (best is None or made.speed.step < best.speed.step * 0.99):
                best = made
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda one: (one.speed.step, one.memory.needed))


def _micro_batches(trial: Trial) -> list[Options]:
    size, rows, gpus = trial.run.batch.micro_batch_size, trial.run.batch.global_batch_size, trial.place.gpus
    if "batch_size" in trial.args.explicit() or trial.place.kept_batch is not None:
        return [()]
    sizes = [many for many in (1, 2, 4) if rows % (size * many * gpus) == 0]
    return [
        (("batch_size", size * many), ("gradient_accumulation_steps", rows // (size * many * gpus))) if many > 1 else ()
        for many in sizes
    ]


def _least_recomputed(trial: Trial) -> Trial | None:
    """The setting itself where it fits, else with as much recomputed as it takes; None where that does not help."""
    if trial.fits:
        return trial
    for change in list(_kinds(trial, layouts=False))[1]:
        made = with_changes(trial, (change,))
        if made.fits and not made.wrong:
            return made
    return None


def fewest_gpus(trial: Trial) -> int | None:
    """The smallest number of such GPUs, doubled again and again, on which some layout fits with everything recomputed; None: none."""
    gpus = trial.place.gpus
    while gpus < MOST_GPUS:
        gpus *= 2
        args = trial.args.changed(gradient_checkpointing=True, recompute_modules="auto", batch_size=1)
        base = tried(args, trial.source, replace(trial.place, gpus=gpus, local=min(gpus, 8), host=0, kept_batch=None))
        for layout in _layouts(base):
            made = tried(args.changed(**dict(layout)), trial.source, base.place)
            if made.fits and not made.wrong:
                return gpus
    return None
