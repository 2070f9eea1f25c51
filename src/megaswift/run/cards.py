"""What known cards reached: memory, products, attention, bytes and links, each with where the figure comes from (cards.tsv)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from megaswift.errors import UserError, nearest

GIB = 1 << 30
CPU = "CPU"
# Marks in the names that drivers give to cards, the longest first, and ours.
_NAMES = {
    "H200": "H200", "H100 PCIe": "H100-PCIe", "H100": "H100", "H800": "H800", "H20": "H20", "B200": "B200", "A100-SXM4-40GB": "A100-40G",
    "A100-PCIE-40GB": "A100-40G", "A100": "A100-80G", "A800": "A800-80G", "L40S": "L40S", "RTX 4090": "RTX-4090",
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """One card.

    Attributes:
        memory: bytes that a process can have, as torch tells them; 0: not known.
        products: FLOP/s of bf16 matrix products that a step reached; of experts: grouped; of causal attention, both directions.
        bytes: a second, that kernels bound by memory reached.
        link: bytes a second in each direction between two cards of a machine.
        launch: seconds a kernel that Python launches took on the machines measured.
        measured: whether these were measured; else they follow from the maker's figures, as `source` says.
    """

    name: str
    memory: int
    products: float
    grouped: float
    attention: float
    bytes: float
    link: float
    launch: float
    measured: bool
    source: str


@cache
def cards() -> dict[str, Card]:
    """Name -> card, in the order of the table."""
    found = {}
    for line in (Path(__file__).parent / "cards.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        name, gib, products, grouped, attention, moved, link, launch, measured, source = line.split("\t")
        found[name] = Card(
            name, int(float(gib) * GIB), float(products) * 1e12, float(grouped) * 1e12, float(attention) * 1e12, float(moved) * 1e12,
            float(link) * 1e9, float(launch) * 1e-3, measured == "yes", source,
        )  # fmt: skip
    return found


def card_of(text: str) -> Card:
    """The card that a user names: H200, a100-80g, or a number of GiB, which stands for an unknown card of the H100's speed.

    Raises UserError for any other word.
    """
    known = {name.lower(): card for name, card in cards().items()}
    if text.lower() in known:
        return known[text.lower()]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gib|gb|g)?", text.strip().lower())
    if size and float(size.group(1)) > 0:
        return sized(cards()["H100"], int(float(size.group(1)) * GIB), f"{size.group(1)} GiB")
    raise UserError(
        f"--card {text!r} is not known.",
        where="--card",
        fix=f"nearest: {nearest(text, list(cards()))}; or its memory in GiB, for example --card 48",
    )


def sized(card: Card, memory: int, name: str | None = None) -> Card:
    """The same card with another memory, whose speed is then a guess where it gets another name."""
    if name is None:
        return replace(card, memory=memory)
    return replace(
        card, memory=memory, name=name, measured=False, source=f"a card of so much memory, taken to be as fast as {card.name}"
    )


def known_as(name: str, memory: int) -> Card:
    """The card that a driver calls so, with the memory that it really has."""
    for mark, ours in _NAMES.items():
        if mark in name:
            return sized(cards()[ours], memory)
    return sized(cards()["H100"], memory, name)
