"""The page on a run's experts: for each layer the load of every expert, before and after, as one file without scripts."""

from __future__ import annotations

from typing import Any

from megaswift.report.html import Markup, element, heading, inside, page, paragraph, table

_WIDTH = 1000
_LEFT = 60.0


def experts_page(found: dict[str, Any]) -> str:
    """experts.html from what experts.json holds: the last window of training, and the same rows before and after."""
    window = found.get("window") or []
    parts: list[Any] = [
        paragraph(
            f"Up to step {int(found.get('step', 0))}. Routers' movement is counted from step {int(found.get('drift_since', 0))}. "
            "Experts have no capacity: no token was dropped. A row is a layer, a cell one of its experts: white had its even share of "
            "the tokens, blue less, red more (full colour at four times), black none."
        )
    ]
    for name, title in (
        ("before", "Validation rows, before training"),
        ("after", "The same rows, after training"),
        ("window", "Training rows since the line before"),
    ):
        if found.get(name):
            parts += [heading(title), _map(found[name])]
    if not found.get("before"):
        parts.append(
            paragraph(element("small", "Without validation rows there is no load to compare with from before training."))
        )
    return page("Experts", *parts, heading("Layer by layer"), *_layers(window, found.get("before"), found.get("after")))


def models_page(found: dict[str, Any]) -> str:
    """The page of `swift experts`: one model on given rows, or two on the same.

    Args:
        found: "model", "rows", in words, and "layers"; "compared" and "before" where there is another model.
    """
    other = found.get("before")
    parts: list[Any] = [
        paragraph(
            f"{found['rows']}. Experts have no capacity: no token was dropped. A row is a layer, a cell one of its experts: white had its "
            "even share of the tokens, blue less, red more (full colour at four times), black none."
        )
    ]
    if other:
        parts += [heading(str(found["compared"])), _map(other)]
    parts += [heading(str(found["model"])), _map(found["layers"]), heading("Layer by layer")]
    return page("Experts", *parts, *_layers(found["layers"], other, found["layers"]))


def _map(layers: list[dict[str, Any]]) -> Markup:
    """Layers from top to bottom, experts from left to right, a colour for each one's load."""
    count = max(len(layer["load"]) for layer in layers)
    cell = (_WIDTH - _LEFT) / count
    height = max(6.0, min(18.0, cell))
    shapes = []
    for row, layer in enumerate(layers):
        total, y = sum(layer["load"]), row * height
        even = max(total / len(layer["load"]), 1e-9)
        size = f"{min(height * 0.8, 11):.1f}"
        label = {"x": "52", "y": f"{y + height * 0.75:.1f}", "font-size": size, "text-anchor": "end", "fill": "#888"}
        shapes.append(element("text", layer["layer"], **label))
        for number, load in enumerate(layer["load"]):
            told = f"layer {layer['layer']}, expert {number}: {load} of {total}, {load / even:.2f} x its share"
            place = {"x": f"{_LEFT + number * cell:.1f}", "y": f"{y + 0.01:.2f}"}
            area = {"width": f"{max(cell - 0.5, 0.5):.1f}", "height": f"{height - 0.5:.1f}", "fill": _colour(load / even)}
            shapes.append(element("rect", element("title", told), **place, **area))
    view = {"viewBox": f"0 0 {_WIDTH} {len(layers) * height:.0f}", "role": "img", "aria-label": "load of experts"}
    return element("svg", inside(*shapes), **view)


def _colour(share: float) -> str:
    """Of a load in parts of the even share: black for none, blue below 1, red above, full at 4."""
    if share <= 0:
        return "#000"
    if share >= 1:
        part = min((share - 1) / 3, 1.0)
        return f"rgb({245 - int(66 * part)},{int(240 * (1 - 0.85 * part))},{int(238 * (1 - 0.87 * part))})"
    part = 1 - share
    return f"rgb({int(242 * (1 - 0.8 * part))},{int(244 * (1 - 0.55 * part))},{int(248 - 40 * part)})"


def _layers(
    window: list[dict[str, Any]], before: list[dict[str, Any]] | None, after: list[dict[str, Any]] | None
) -> list[Markup]:
    """One line a layer: idle experts, the busiest, how undecided the router is, how far it moved, how the load changed."""
    names = ["layer", "tokens", "idle", "busiest x even share", "router entropy", "router moved", "load moved"]
    losses = [name for name in ("aux_loss", "z_loss") if window and name in window[0]]
    old, new = ({layer["layer"]: layer["load"] for layer in part or []} for part in (before, after))
    rows = []
    for layer in window:
        idle, total, number = sum(load == 0 for load in layer["load"]), max(sum(layer["load"]), 1), layer["layer"]
        rows.append(
            [
                number,
                f"{layer['tokens']:,}",
                element("span", idle, kind="bad" if idle else ""),
                f"{max(layer['load']) * len(layer['load']) / total:.2f}",
                f"{layer['router_entropy']:.3f}",
                f"{100 * layer['drift']:.3f} %",
                load_moved(old.get(number), new.get(number)),
                *(f"{layer[name]:.4f}" for name in losses),
            ]
        )
    told = (
        "Idle: experts that no token went to. Busiest: tokens of the expert with the most, over an even share. Router entropy: 1 "
        "where all experts are as good for each token, 0 where one is. Router moved: length of the change of its weights over "
        "their own. Load moved: share of the choices on the same rows that other experts have after training than before."
    )
    return [table([*names, *losses], rows, numbers=set(range(len(names) + len(losses)))), paragraph(element("small", told))]


def load_moved(before: list[int] | None, after: list[int] | None) -> str:
    """Half the sum of the differences of two shares of load, in percent; "-" where one is not known."""
    if not before or not after or not sum(before) or not sum(after):
        return "-"
    return f"{50 * sum(abs(a / sum(before) - b / sum(after)) for a, b in zip(before, after)):.1f} %"
