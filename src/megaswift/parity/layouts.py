"""Layouts by short names: "tp2,pp1,dp2,sp,recompute,padded,mbs2", and the options that each stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megaswift.config.options import SftArguments
from megaswift.errors import UserError

_SIZES = re.compile(r"(tp|pp|vpp|cp|dp|mbs)(\d+)")
_SWITCHES = {
    "sp": {"sequence_parallel": True},
    "recompute": {"gradient_checkpointing": True},
    "padded": {"padding_free": False},
    "math": {"use_flash_attn": False},
    "deterministic": {"deterministic": True},
    "resume": {},
}


@dataclass(frozen=True)
class Layout:
    """One way to compute the same steps.

    Attributes:
        name: as the user wrote it.
        resume: save after half of the steps and go on from there.
    """

    name: str
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    mbs: int | None = None
    switches: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def resume(self) -> bool:
        return "resume" in self.switches

    def apply(self, args: SftArguments, global_batch: int) -> SftArguments:
        """The options of this layout. Raises UserError where its data-parallel ranks cannot share the global batch."""
        batch = self.mbs or args.batch_size
        unit = batch * self.dp
        if global_batch % unit:
            raise UserError(
                f"layout {self.name}: a global batch of {global_batch} rows does not divide into {unit} = {batch} rows x {self.dp} data-parallel ranks.",
                where="--layouts",
                fix="choose --gradient_accumulation_steps and --batch_size so that it does",
            )
        values: dict[str, object] = {
            "tp": self.tp,
            "pp": self.pp,
            "vpp": self.vpp,
            "cp": self.cp,
            "batch_size": batch,
        }
        for switch in self.switches:
            values |= _SWITCHES[switch]
        return args.changed(**values)


def parse_layouts(text: str) -> list[Layout]:
    """Layouts of a --layouts value, separated by spaces. Raises UserError for a part that is not known."""
    found = []
    for word in text.split():
        sizes: dict[str, int] = {}
        switches: list[str] = []
        for part in word.split(","):
            match = _SIZES.fullmatch(part)
            if match and int(match.group(2)) > 0:
                sizes[match.group(1)] = int(match.group(2))
            elif part in _SWITCHES:
                switches.append(part)
            else:
                raise UserError(
                    f"layout {word!r}: {part!r} is not known.",
                    where="--layouts",
                    fix=f"use tpN, ppN, vppN, cpN, dpN, mbsN and {', '.join(_SWITCHES)}, for example: tp2,pp2,sp",
                )
        found.append(Layout(word, switches=tuple(switches), **sizes))
    if len(found) < 2:
        raise UserError(
            "at least two layouts are needed to compare.",
            where="--layouts",
            fix='for example: --layouts "tp1 tp2 pp2 tp2,pp2,sp"',
        )
    return found
