"""The proof of a conversion for people: a table in the terminal, and conversion.html."""

from __future__ import annotations

import html
from typing import Any

from megaswift.terminal import console, say

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:left}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.good{color:#187a2f}.bad{color:#b3261e}"
    "code{background:#f3f3f3;padding:0 .25rem}small{color:#666}@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}"
    "td,th{border-color:#333}code{background:#262626}}"
)


def print_proof(proof: dict[str, Any]) -> None:
    """The proof as a table and two lines."""
    from rich.table import Table

    parity = proof["logits"]
    table = Table(title="Megatron form against transformers, every position, fp32", title_justify="left")
    for name in ("prompt", "tokens", "max |difference|", "mean KL (nats)", "same top-1"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    for row in [
        *parity["prompts"],
        {"name": "all", "tokens": parity["positions"], **{key: parity[key] for key in ("max_abs", "mean_kl", "top1")}},
    ]:
        table.add_row(row["name"], str(row["tokens"]), f"{row['max_abs']:.1e}", f"{row['mean_kl']:.1e}", f"{row['top1']:.2%}")
    table.add_row(
        "limit", "", f"{_logit_limit(parity):.1e}", f"{parity['limits']['mean_kl']:.0e}", f"{parity['limits']['top1']:.2%}"
    )
    console().print(table)
    say(f"  round trip: {round_trip(proof)}; config audit: {len(proof['config'])} fields honoured")


def round_trip(proof: dict[str, Any]) -> str:
    """How many tensors came back as they were, in words; "bit for bit" only where none was rounded."""
    count, lost = proof["round_trip_tensors"], len(proof.get("rounded", {}))
    if not lost:
        return f"{count} tensors equal, bit for bit"
    if lost == count:
        return f"all {count} tensors equal to the source's once these are rounded"
    return f"{count} tensors: {count - lost} equal, bit for bit, {lost} equal to the source's once these are rounded"


def _logit_limit(parity: dict[str, Any]) -> float:
    return float(parity["limits"]["max_logit_share"] * max(parity["largest_logit"], 1.0))


def page(title: str, facts: list[tuple[str, str]], proof: dict[str, Any]) -> str:
    """conversion.html: one file, no script, nothing fetched."""
    parity = proof["logits"]
    rows = [
        [item["name"], str(item["tokens"]), f"{item['max_abs']:.2e}", f"{item['mean_kl']:.2e}", f"{item['top1']:.2%}"]
        for item in parity["prompts"]
    ]
    rows.append(
        ["all", str(parity["positions"]), f"{parity['max_abs']:.2e}", f"{parity['mean_kl']:.2e}", f"{parity['top1']:.2%}"]
    )
    limits = f"largest logit {parity['largest_logit']:.3g}; limits: difference {_logit_limit(parity):.2e}, mean KL {parity['limits']['mean_kl']:.0e} nats, top-1 {parity['limits']['top1']:.0%}"
    layers = [
        ["embedding" if number == 0 else f"layer {number - 1}", f"{value:.2e}"] for number, value in enumerate(parity["layers"])
    ]
    audit = [
        [item["field"], item["config"], item["megatron"], "equal" if item["equal"] else "DIFFERENT"] for item in proof["config"]
    ]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table(["", ""], [list(fact) for fact in facts], set()),
        "<h2>Round trip</h2>",
        f"<p class=good>Read back from the written files: {html.escape(round_trip(proof))}.</p>",
        *_lost(proof),
        "<h2>Logits against transformers</h2>",
        _table(["prompt", "tokens", "max |difference|", "mean KL (nats)", "same top-1"], rows, {1, 2, 3, 4}),
        f"<p><small>{html.escape(limits)}</small></p>",
        "<h2>Config audit</h2>",
        _table(["field", "transformers", "Megatron model", ""], audit, set()),
        f"<p><small>No effect on the computation: {html.escape(', '.join(proof['neutral_fields']))}</small></p>",
        "<h2>Difference of a token's state after each layer</h2>",
        _table(["after", "largest, as a share of its length"], layers, {1}),
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return head + "\n".join(parts) + "</html>\n"


def _lost(proof: dict[str, Any]) -> list[str]:
    """Every tensor that was rounded, by name."""
    lost = proof.get("rounded", {})
    return [_table(["rounded", ""], [[name, change] for name, change in lost.items()], set())] if lost else []


def _table(names: list[str], rows: list[list[str]], numbers: set[int]) -> str:
    """An HTML table; columns in `numbers` are set to the right."""
    mark = lambda place: " class=n" if place in numbers else ""  # noqa: E731
    head = "".join(f"<th{mark(place)}>{html.escape(name)}</th>" for place, name in enumerate(names)) if any(names) else ""
    body = "".join(
        "<tr>" + "".join(f"<td{mark(place)}>{html.escape(str(cell))}</td>" for place, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
