"""The page on a run's experts: for each layer the load of every expert, before and after, as one file without scripts."""

from __future__ import annotations

import html
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right;"
    "font-variant-numeric:tabular-nums}td.l,th.l{text-align:left}svg{display:block;margin:.4rem 0 1.4rem;max-width:100%}"
    "small{color:#666}.bad{color:#b3261e}@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}td,th{border-color:#333}}"
)
_WIDTH = 1000


def page(found: dict[str, Any]) -> str:
    """experts.html from what experts.json holds: the last window of training, and the same rows before and after."""
    window = found.get("window") or []
    parts = [
        "<h1>Experts</h1>",
        f"<p>Up to step {int(found.get('step', 0))}. Routers' movement is counted from step {int(found.get('drift_since', 0))}. "
        "Experts have no capacity: no token was dropped. A cell is one expert; white had its even share of the tokens, blue less, "
        "red more (full colour at four times), black none.</p>",
    ]
    for name, title in (
        ("before", "Validation rows, before training"),
        ("after", "The same rows, after training"),
        ("window", "Training rows since the line before"),
    ):
        if found.get(name):
            parts += [f"<h2>{title}</h2>", _map(found[name])]
    if not found.get("before"):
        parts.append("<p><small>Without validation rows there is no load to compare from before training.</small></p>")
    parts += ["<h2>Layer by layer</h2>", _table(window, found.get("before"), found.get("after"))]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Experts</title><style>{_STYLE}</style>"
    return head + "\n".join(parts) + "</html>\n"


def _map(layers: list[dict[str, Any]]) -> str:
    """Layers from top to bottom, experts from left to right, a colour for each one's load."""
    count = max(len(layer["load"]) for layer in layers)
    left, cell = 60.0, (_WIDTH - 60.0) / count
    height = max(6.0, min(18.0, cell))
    shapes = []
    for row, layer in enumerate(layers):
        even = max(sum(layer["load"]) / len(layer["load"]), 1e-9)
        y = row * height
        shapes.append(
            f"<text x='52' y='{y + height * 0.75:.1f}' font-size='{min(height * 0.8, 11):.1f}' text-anchor='end' fill='#888'>{layer['layer']}</text>"
        )
        for number, load in enumerate(layer["load"]):
            told = html.escape(
                f"layer {layer['layer']}, expert {number}: {load} of {sum(layer['load'])}, {load / even:.2f} x its share"
            )
            shapes.append(
                f"<rect x='{left + number * cell:.1f}' y='{y:.1f}' width='{max(cell - 0.5, 0.5):.1f}' height='{height - 0.5:.1f}' "
                f"fill='{_colour(load / even)}'><title>{told}</title></rect>"
            )
    return f"<svg viewBox='0 0 {_WIDTH} {len(layers) * height:.0f}' role='img' aria-label='load of experts'>{''.join(shapes)}</svg>"


def _colour(share: float) -> str:
    """Of a load in parts of the even share: black for none, blue below 1, red above, full at 4."""
    if share <= 0:
        return "#000"
    if share >= 1:
        part = min((share - 1) / 3, 1.0)
        return f"rgb({245 - int(66 * part)},{int(240 * (1 - 0.85 * part))},{int(238 * (1 - 0.87 * part))})"
    part = 1 - share
    return f"rgb({int(242 * (1 - 0.8 * part))},{int(244 * (1 - 0.55 * part))},{int(248 - 40 * part)})"


def _table(window: list[dict[str, Any]], before: list[dict[str, Any]] | None, after: list[dict[str, Any]] | None) -> str:
    """One line a layer: idle experts, the busiest, how undecided the router is, how far it moved, how the load changed."""
    names = ["layer", "tokens", "idle", "busiest x even share", "router entropy", "router moved", "load moved"]
    losses = [name for name in ("aux_loss", "z_loss") if window and name in window[0]]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in [*names, *losses])
    old, new = ({layer["layer"]: layer["load"] for layer in part or []} for part in (before, after))
    body = []
    for layer in window:
        idle, total, number = sum(load == 0 for load in layer["load"]), max(sum(layer["load"]), 1), layer["layer"]
        cells = [
            f"<td>{number}</td><td>{layer['tokens']:,}</td><td{' class=bad' if idle else ''}>{idle}</td>",
            f"<td>{max(layer['load']) * len(layer['load']) / total:.2f}</td><td>{layer['router_entropy']:.3f}</td>",
            f"<td>{100 * layer['drift']:.3f} %</td><td>{_moved(old.get(number), new.get(number))}</td>",
            *(f"<td>{layer[name]:.4f}</td>" for name in losses),
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    told = "<p><small>Router entropy: 1 where all experts are as good for each token, 0 where one is. Load moved: share of the choices "
    told += "on the same rows that fall on other experts' account after training than before.</small></p>"
    return f"<table><tr>{head}</tr>{''.join(body)}</table>{told}"


def _moved(before: list[int] | None, after: list[int] | None) -> str:
    """Half the sum of differences of two shares of load, in percent."""
    if not before or not after or not sum(before) or not sum(after):
        return "-"
    return f"{50 * sum(abs(a / sum(before) - b / sum(after)) for a, b in zip(before, after)):.1f} %"
