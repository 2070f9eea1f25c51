"""Pictures of a run, made from its files alone: logging.jsonl, plan.json, runs/. They also work on a run that crashed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError
from megaswift.store.publish import appearing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_SMOOTHING = 0.9  # weight of the past in a long run's smoothed curve
_SMOOTH_FROM = 10  # points; with fewer, the raw curve says it all
_BLUE, _LIGHT, _GREY = "#1f5fa8", "#a9c8ea", "#666666"


@dataclass(frozen=True)
class Tag:
    """One picture: its file name, title, unit, and the names under which logs hold its values."""

    name: str
    title: str
    unit: str
    keys: tuple[str, ...]
    smooth: bool = False
    number: str = ".4g"


TAGS: tuple[Tag, ...] = (
    Tag(
        "train_loss",
        "Training loss",
        "loss per supervised token",
        ("loss", "train_loss", "train/loss"),
        smooth=True,
        number=".4f",
    ),
    Tag("eval_loss", "Validation loss", "loss per supervised token", ("eval_loss", "val_loss", "eval/loss"), number=".4f"),
    Tag("learning_rate", "Learning rate", "learning rate", ("learning_rate", "lr", "train/learning_rate"), number=".3g"),
    Tag("grad_norm", "Gradient norm", "norm before clipping", ("grad_norm", "train/grad_norm")),
    Tag(
        "tokens_per_second",
        "Speed",
        "tokens per second",
        ("tokens_per_second", "train/tokens_per_second"),
        smooth=True,
        number=",.0f",
    ),
)
TAGS += tuple(
    Tag(
        f"{part}{name}",
        f"{title}{of}",
        unit,
        (f"{part}rewards/{name.removeprefix('rewards_')}", f"{board}/rewards/{name.removeprefix('rewards_')}"),
    )
    for part, board, of in (("", "train", ""), ("eval_", "eval", ", validation"))
    for name, title, unit in (
        ("rewards_margins", "Margin of rewards", "chosen - rejected"),
        ("rewards_accuracies", "Accuracy of rewards", "share of pairs"),
        ("rewards_chosen", "Reward of chosen answers", "reward"),
        ("rewards_rejected", "Reward of rejected answers", "reward"),
    )
)  # of preference training
_STEP_KEYS = ("step", "global_step", "iteration", "global_step/max_steps")


@dataclass(frozen=True)
class Series:
    """Values of one tag in the order of their steps; what is not finite is left out."""

    tag: Tag
    steps: tuple[int, ...]
    values: tuple[float, ...]


def read_log(run_dir: Path | str) -> list[dict[str, Any]]:
    """The rows of logging.jsonl; torn and foreign lines are left out, a missing file gives no rows."""
    path = Path(run_dir) / "logging.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_plan(run_dir: Path | str) -> dict[str, Any]:
    """plan.json, or an empty dict where it is missing or torn: pictures need it for a subtitle only."""
    try:
        plan = json.loads((Path(run_dir) / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) else {}


def read_series(run_dir: Path | str) -> dict[str, Series]:
    """The curves of a run by tag name, from logging.jsonl, else from the TensorBoard files in runs/.

    A run that went on from a checkpoint logs some steps twice; the later value counts.
    """
    points: dict[str, dict[int, float]] = {}
    for step, key, value in _logged(run_dir):
        tag = _TAG_OF.get(key)
        if tag is not None and math.isfinite(value):
            points.setdefault(tag.name, {})[step] = value
    ordered = {name: sorted(pairs.items()) for name, pairs in points.items()}
    return {
        tag.name: Series(tag, tuple(step for step, _ in ordered[tag.name]), tuple(value for _, value in ordered[tag.name]))
        for tag in TAGS
        if tag.name in ordered
    }


_TAG_OF = {key: tag for tag in TAGS for key in tag.keys}


def write_images(run_dir: Path | str) -> list[Path]:
    """Draw one picture for each tag that the run has logged, into images/; returns the files.

    Raises DataError where the directory does not exist.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise DataError("there is no run directory to draw.", where=str(directory))
    series = read_series(directory)
    if not series:
        return []
    images, subtitle = directory / "images", _subtitle(read_plan(directory))
    images.mkdir(exist_ok=True)
    files = []
    for name, curve in series.items():
        path = images / f"{name}.png"
        with appearing(path, durable=False) as temporary:
            draw(curve, subtitle).savefig(temporary, dpi=150, format="png")
        files.append(path)
    return files


def draw(curve: Series, subtitle: str = "") -> Figure:
    """The picture of one curve, 8 x 4.5 inches."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # "building the font cache" on first use
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_curve(axes, curve)
    _label(axes, curve.tag, subtitle)
    return figure


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average, divided by 1 - weight^n so that it does not start from zero.

    The weight of the past is n / (n + 12) for n values, at most 0.9: a short curve must not lag behind itself.
    """
    weight = min(_MOST_SMOOTHING, len(values) / (len(values) + 12))
    result, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**count))
    return result


def _draw_curve(axes: Axes, curve: Series) -> None:
    steps, values = curve.steps, curve.values
    marker = "o" if len(steps) <= 30 else None
    shown: list[float] = list(values)
    if curve.tag.smooth and len(steps) >= _SMOOTH_FROM:
        shown = smoothed(values)
        axes.plot(steps, values, color=_LIGHT, linewidth=1.2, label="as logged")
        axes.plot(steps, shown, color=_BLUE, linewidth=2.2, label="smoothed")
        axes.legend(frameon=False, fontsize=11)
    else:
        axes.plot(steps, values, color=_BLUE, linewidth=2, marker=marker, markersize=4)
    last = format(shown[-1], curve.tag.number)
    axes.annotate(
        last,
        (steps[-1], shown[-1]),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=11,
        color=_BLUE,
        annotation_clip=False,
    )


def _label(axes: Axes, tag: Tag, subtitle: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # Left-aligned and above each other: the title, then the run in grey.
    axes.set_title(f"{tag.title}\n" if subtitle else tag.title, loc="left", fontsize=15, fontweight="bold")
    if subtitle:
        axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=10.5, color=_GREY)
    axes.set_xlabel("step", fontsize=12)
    axes.set_ylabel(tag.unit, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if tag.name == "tokens_per_second":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylim(bottom=0)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _subtitle(plan: dict[str, Any]) -> str:
    """The run in one line: model, precision and layout, as far as plan.json tells."""
    parts = [str(plan[key]) for key in ("model_type", "dtype") if plan.get(key)]
    sizes = {
        key: plan[key]
        for key in ("tp", "pp", "vpp", "cp", "dp")
        if plan.get(key) and (plan[key] != 1 or key not in ("vpp", "cp"))
    }
    layout = ", ".join(f"{key} {size}" for key, size in sizes.items())
    return "   ".join([*parts, *([layout] if layout else [])])


def _logged(run_dir: Path | str) -> Iterator[tuple[int, str, float]]:
    """(step, key, value) of everything logged, in the order of writing."""
    rows = read_log(run_dir)
    if not rows:
        yield from _tensorboard(Path(run_dir) / "runs")
    for row in rows:
        step = _step_of(row)
        if step is None:
            continue  # a closing summary has no step
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield step, key, float(value)


def _step_of(row: dict[str, Any]) -> int | None:
    """The step of a row: a number, or the first part of "5/94"."""
    for key in _STEP_KEYS:
        value = row.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value.partition("/")[0].strip().isdigit():
            return int(value.partition("/")[0])
    return None


def _tensorboard(directory: Path) -> Iterator[tuple[int, str, float]]:
    if not directory.is_dir():
        return
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            yield event.step, key, float(event.value)
