"""Tables and the picture of a parity run."""

from __future__ import annotations

from pathlib import Path

from megaswift.parity.compare import LIMITS, StepDifference
from megaswift.parity.noise import FACTOR
from megaswift.terminal import console


def print_reference(differences: list[StepDifference], dtype: str) -> None:
    """One line a step: losses and gradient norms of both, and the largest relative differences with the tensor that has them."""
    out = console()
    limits = LIMITS[dtype]
    out.print(
        f"\n{'step':>4}  {'loss, reference':>15}  {'engine':>12}  {'difference':>10}  {'grad norm, reference':>20}  {'engine':>12}  "
        f"{'difference':>10}  worst gradient, worst weight"
    )
    for item in differences:
        out.print(
            f"{item.step:>4}  {item.loss[0]:>15.6f}  {item.loss[1]:>12.6f}  {item.loss_difference:>10.1e}  "
            f"{item.grad_norm[0]:>20.6f}  {item.grad_norm[1]:>12.6f}  {item.grad_norm_difference:>10.1e}  "
            f"{item.worst_gradient[0]:.1e} {item.worst_gradient[1]}, {item.worst_weight[0]:.1e} {item.worst_weight[1]}"
        )
    if differences[0].hidden:
        name, found = max(differences[0].hidden, key=lambda pair: pair[1])
        out.print(f"hidden states before the first step: largest relative difference {found:.1e}, after {name}")
    groups = sorted({group for item in differences for group in item.gradient_groups})
    first = differences[0].gradient_groups
    out.print(
        "largest relative gradient difference in step 1: "
        + ", ".join(f"{group} {first[group]:.1e}" for group in groups if group in first)
    )
    out.print(
        f"limits for {dtype} in step 1: loss {limits['loss']:.0e}, grad norm {limits['grad_norm']:.0e}, gradient {limits['gradient']:.0e}, "
        f"weight {limits['weight']:.0e}; they grow by {limits['growth']:g} with each step\n"
    )


def print_layouts(
    curves: list[tuple[str, list[float]]], table: list[tuple[str, list[float]]], limits: list[float], times: list[float]
) -> None:
    """One line a layout: first and last loss, the largest relative difference from the first layout, and a step's time."""
    out = console()
    width = max(len(name) for name, _ in curves)
    out.print(
        f"\n{'layout':{width}}  {'first loss':>12}  {'last loss':>12}  {'largest relative difference':>27}  {'ms a step':>9}"
    )
    for (name, losses), (_, differences), time in zip(curves, table, times):
        out.print(f"{name:{width}}  {losses[0]:>12.7f}  {losses[-1]:>12.7f}  {max(differences):>27.2e}  {time:>9.1f}")
    if limits[0] == limits[-1]:
        out.print(f"limit {limits[0]:.0e}\n")
    else:
        out.print(
            f"limit {limits[0]:.1e} at the first step to {limits[-1]:.1e} at the last: {FACTOR:g} x the spread of runs whose "
            "weights differ by one rounding\n"
        )


def draw(path: Path, curves: list[tuple[str, list[float]]]) -> None:
    """The loss curves, one above the other, and their difference from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    steps = range(1, len(curves[0][1]) + 1)
    for name, losses in curves:
        top.plot(steps, losses, label=name, linewidth=1.5)
        bottom.plot(steps, [max(abs(a - b) / abs(b), 1e-12) for a, b in zip(losses, curves[0][1])], linewidth=1.5)
    top.set_ylabel("loss per supervised token")
    top.legend(frameon=False)
    bottom.set_ylabel(f"relative difference from {curves[0][0]}")
    bottom.set_yscale("log")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
