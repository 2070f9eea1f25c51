"""`swift doctor`: would a run start on this machine, and what would make it slow?

    swift doctor [--output_dir DIR] [--network true] [--distributed true] [--json true]

Exit code 0 where a run would start, 2 where not. Nothing is asked of the network unless --network true says so.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaswift.config.options import DoctorArguments, parse
from megaswift.errors import MegaswiftError, UserError
from megaswift.hub.remote import hubs, probe
from megaswift.launch import agent
from megaswift.launch.checks import Finding, checks
from megaswift.launch.exchange import Exchange
from megaswift.terminal import console

_MARKS = {"ok": "  ", "note": "[yellow]! [/yellow]", "bad": "[bold]X [/bold]"}
_KNOWN = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")  # a model that both hubs have


def doctor_main(args: DoctorArguments | list[str]) -> list[Finding]:
    """Print what was found and return it. Raises UserError where no run would start."""
    args = parse(DoctorArguments, args) if isinstance(args, list) else args
    found = list(checks(Path(args.output_dir)))
    exchanged: Exchange | None = None
    if args.network:
        found += _network()
    if args.distributed:
        more, exchanged = _distributed(args)
        found += more
    bad = [one for one in found if one.state == "bad"]
    if args.json:
        told: dict[str, Any] = {"starts": not bad, "findings": [asdict(one) for one in found]}
        print(json.dumps(told | ({"exchange": asdict(exchanged)} if exchanged else {}), indent=1, ensure_ascii=False))
    else:
        _show(found, exchanged)
    if bad:
        raise UserError(
            f"no run would start here: {'; '.join(f'{one.name}: {one.found}' for one in bad)}.",
            where="swift doctor",
            fix=bad[0].fix,
        )
    return found


def _network() -> list[Finding]:
    """Whether the hubs answer."""
    both = hubs()
    answers = probe([hub.address(name, None) for hub, name in zip(both, _KNOWN, strict=True)])
    return [
        Finding(
            hub.title, "note" if why else "ok", f"cannot be reached ({why})" if why else "answers", "models and data must be on this machine" if why else "",
            f"set {'HF_ENDPOINT' if hub.key == 'hf' else 'MODELSCOPE_DOMAIN'} to a mirror, or give local folders" if why else "",
        )
        for hub, why in zip(both, answers, strict=True)
    ]  # fmt: skip


def _distributed(args: DoctorArguments) -> tuple[list[Finding], Exchange | None]:
    """An exchange between all ranks, started as a run starts them."""
    if "NPROC_PER_NODE" not in os.environ:
        os.environ["NPROC_PER_NODE"] = str(_ranks_here())
    with tempfile.TemporaryDirectory(prefix="megaswift-doctor-") as directory:
        job, result = Path(directory) / "job.json", Path(directory) / "result.json"
        job.write_text(json.dumps({"result": str(result), "limit_s": args.exchange_timeout}), encoding="utf-8")
        try:
            agent.start_ranks(agent.cluster(), job, module="megaswift.launch.exchange")
        except MegaswiftError as error:
            return [Finding("exchange", "bad", error.what, "a run of several processes hangs or ends", error.fix)], None
        if not result.exists():  # another machine leads
            return [Finding("exchange", "ok", "done; the machine of rank 0 tells how fast")], None
        exchanged = Exchange(**json.loads(result.read_text(encoding="utf-8")))
    return list(findings_of(exchanged)), exchanged


def _ranks_here() -> int:
    import torch

    return max(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def findings_of(exchanged: Exchange) -> list[Finding]:
    """What an exchange says of its ranks."""
    found = [
        Finding(
            "exchange", "ok", f"{exchanged.world_size} ranks over {exchanged.backend}: all-reduce {exchanged.all_reduce / 1e9:.2f} GB/s, all-to-all "
            f"{exchanged.all_to_all / 1e9:.2f} GB/s, slowest pair {max(exchanged.pairs.values(), default=0.0) * 1e3:.1f} ms there and back",
        )
    ]  # fmt: skip
    for rank in exchanged.slow:
        found.append(
            Finding(
                f"rank {rank}", "note", f"slow with every other rank (machine {exchanged.machines[rank]})", "every step waits for it",
                f"ssh {exchanged.machines[rank]} nvidia-smi; ip -s link   # throttled card, busy host, wrong network",
            )
        )  # fmt: skip
    for pair in exchanged.slow_pairs:
        first, second = (exchanged.machines[int(part)] for part in pair.split("-"))
        found.append(
            Finding(f"ranks {pair}", "note", f"slow with each other ({first}, {second})", "steps wait for this link", "NCCL_DEBUG=INFO swift doctor --distributed true")
        )  # fmt: skip
    return found


def _show(found: list[Finding], exchanged: Exchange | None) -> None:
    out = console()
    for one in found:
        out.print(f"{_MARKS[one.state]}{one.name:24}{one.found}")
        if one.consequence:
            out.print(f"    so: {one.consequence}")
        if one.fix and one.state != "ok":
            out.print(f"    do: {one.fix}")
    notes = sum(one.state == "note" for one in found)
    if not any(one.state == "bad" for one in found):
        out.print(f"\n[bold]a run would start here[/bold]{f'; {notes} things to know, marked with !' if notes else ''}")
