"""Whether a run fits into the memory that is there: refused before a process starts, or changed as `--fit true` asks."""

from __future__ import annotations

from dataclasses import replace

from megaswift.errors import UserError
from megaswift.run.cards import GIB
from megaswift.run.planner import Change, Place, Trial, changed, fewest_gpus, smallest_change, tried, with_changes
from megaswift.run.source import TrainingSource
from megaswift.terminal import say


def fitted(start: TrainingSource, place: Place, tells: bool = True, longest: int | None = None) -> TrainingSource:
    """What training starts from, with options that fit.

    Args:
        tells: say what `--fit true` takes.
        longest: tokens of the longest row that there is; None: rows as long as max_length.

    Raises UserError for a run that cannot fit, with the smallest change that would.
    """
    mode = start.args.fit
    trial = tried(start.args if longest is None else start.args.changed(max_length=longest), start, place)
    if mode == "false" or trial.fits:
        return start
    change = smallest_change(trial, by_itself=mode == "true", layouts=mode != "true" or start.run_dir is None)
    if mode == "true" and change is not None:
        better = with_changes(trial, change)
        if tells:
            say(
                f"[yellow]{lack(trial)}; --fit true takes {in_words(change)}: {size_of(better)}, about "
                f"{100 * (better.speed.step / trial.speed.step - 1):+.0f} % time a step.[/yellow]"
            )
        return replace(start, args=changed(start.args, change))
    raise UserError(f"{lack(trial)}.", where="memory, before any process started", fix=_way_out(trial, change))


def _way_out(trial: Trial, change: tuple[Change, ...] | None) -> str:
    if change is None:
        gpus = fewest_gpus(trial) if trial.place.on_gpu else None
        more = (
            f"{gpus} such GPUs (swift plan --gpus {gpus} says how)"
            if gpus
            else "a smaller model, or a machine with more memory"
        )
        return f"no change of options is enough here; use {more}; --fit false starts anyway"
    taken = "--fit true takes it; " if all(one.by_itself for one in change) else ""
    return f"{in_words(change)} ({size_of(with_changes(trial, change))}); {taken}--fit false starts anyway"


def lack(trial: Trial) -> str:
    """What is needed, by cause, and what is there."""
    memory, place = trial.memory, trial.place
    if place.on_gpu and memory.needed > place.card.memory:
        parts = memory.device | {"activations": memory.working["activations"]}
        parts["the step's height"] = max(memory.working["head"], memory.working["layer"])
        parts["outside"] = sum(memory.outside.values())
        told = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value)
        return f"the fullest rank needs about {memory.needed / GIB:.1f} GiB ({told}), and {place.card.name} has {place.card.memory / GIB:.1f}"
    what = "what is offloaded and saved" if place.on_gpu else "weights, gradients and optimizer alone"
    return (
        f"{what} of {place.local} processes take {trial.host_needed / GIB:.1f} GiB, and this machine has {place.host / GIB:.1f}"
    )


def size_of(trial: Trial) -> str:
    """The memory that a setting takes, in words."""
    if trial.place.on_gpu:
        return f"about {trial.memory.needed / GIB:.1f} GiB"
    return f"{trial.host_needed / GIB:.1f} GiB"


def in_words(changes: tuple[Change, ...]) -> str:
    """Changes as they are typed."""
    return " ".join(change.words for change in changes)
