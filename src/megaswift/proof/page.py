"""The proof of a conversion for people: a table in the terminal, and conversion.html."""

from __future__ import annotations

from typing import Any

from megaswift.report import html
from megaswift.terminal import console, say


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
    count, lost, carried = proof["round_trip_tensors"], len(proof.get("rounded", {})), proof.get("carried_tensors")
    more = f"; {carried} carried along, equal, bit for bit" if carried else ""
    if not lost:
        return f"{count} tensors equal, bit for bit{more}"
    if lost == count:
        return f"all {count} tensors equal to the source's once these are rounded{more}"
    return f"{count} tensors: {count - lost} equal, bit for bit, {lost} equal to the source's once these are rounded{more}"


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
    lost = [[name, change] for name, change in proof.get("rounded", {}).items()]
    return html.page(
        title,
        html.table(["", ""], facts),
        html.heading("Round trip"),
        html.paragraph(f"Read back from the written files: {round_trip(proof)}.", kind="good"),
        *([html.table(["rounded", ""], lost)] if lost else []),
        html.heading("Logits against transformers"),
        html.table(["prompt", "tokens", "max |difference|", "mean KL (nats)", "same top-1"], rows, {1, 2, 3, 4}),
        html.paragraph(html.element("small", limits)),
        html.heading("Config audit"),
        html.table(["field", "transformers", "Megatron model", ""], audit),
        html.paragraph(html.element("small", f"No effect on the computation: {', '.join(proof['neutral_fields'])}")),
        html.heading("Difference of a token's state after each layer"),
        html.table(["after", "largest, as a share of its length"], layers, {1}),
    )
