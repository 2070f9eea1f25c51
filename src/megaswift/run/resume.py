"""Which run and which checkpoint to go on with, and whether the run is still the same one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megaswift.config.options import SftArguments
from megaswift.errors import DataError, UserError
from megaswift.run.resolve import global_batch_size
from megaswift.store.lock import in_use
from megaswift.store.manifest import (
    LONGEST_CHAIN,
    MANIFEST,
    changed_fields,
    check_hashes,
    older_links,
    quick_check,
    read_manifest,
    sha256_of,
)
from megaswift.store.paths import TRACKER, candidates, is_megatron_directory, iteration_of
from megaswift.terminal import typed
from megaswift.weights.hf.folder import read_config
from megaswift.weights.hf.score_head import HEAD_FIELDS

_RUN = re.compile(r"v(\d+)-(\d{8}-\d{6})")


def newest_run(output_dir: Path, model_type: str, suffix: bool, live: bool = True) -> Path | None:
    """The newest run of a model type under `output_dir` that has saved something or is in use; its tp and pp may be any.

    Args:
        suffix: runs stand in {model_type}-tpN-ppM/vN-time; False: `output_dir` is the run.
        live: count a run that is in use, even if it has saved nothing.
    """
    if not suffix:
        return output_dir if (live and in_use(output_dir)) or _saved(output_dir) else None
    layout = re.compile(re.escape(model_type) + r"-tp\d+-pp\d+")
    found = []
    for parent in output_dir.iterdir() if output_dir.is_dir() else ():
        if layout.fullmatch(parent.name) and parent.is_dir():
            found += [
                (match.group(2), int(match.group(1)), path) for path in parent.iterdir() if (match := _RUN.fullmatch(path.name))
            ]
    for _, _, path in sorted(found, reverse=True):
        if (live and in_use(path)) or _saved(path):
            return path
    return None


def _saved(run_dir: Path) -> bool:
    return any(iteration_of(path) > 0 for path in candidates(run_dir))


def newest_whole(run_dir: Path, verify: bool, need_optimizer: bool = True) -> tuple[Path, list[str]]:
    """The newest checkpoint of a run that can be read, and what was passed over or found odd, as sentences.

    Args:
        verify: read every byte and compare SHA-256; False: sizes only.
        need_optimizer: pass over checkpoints of weights alone.

    Raises DataError where no checkpoint is good: a run with damaged checkpoints is never begun anew silently.
    """
    problems: list[str] = []
    for path in [path for path in candidates(run_dir) if iteration_of(path) > 0]:
        problem = _problem(path, verify, need_optimizer)
        if problem is None:
            notes = [f"{note}; it was passed over." for note in problems]
            return path, notes + _tracker_note(run_dir, path, passed=bool(problems))
        problems.append(f"{path.name}: {problem}")
    raise DataError(
        "no checkpoint of this run is good: " + "; ".join(problems),
        where=str(run_dir),
        fix="mend the disk or copy a good one back; to begin anew, leave --resume out",
    )


def _problem(path: Path, verify: bool, need_optimizer: bool) -> str | None:
    problem = quick_check(path)
    if problem is None and need_optimizer and not read_manifest(path).get("optimizer"):
        return "it has weights only (--save_only_model true)"
    if problem is None and verify:
        try:
            check_hashes(path)
        except DataError as error:
            return error.what.rstrip(".")
    return problem


def _tracker_note(run_dir: Path, chosen: Path, passed: bool) -> list[str]:
    """One sentence where the tracker file names something else; files decide."""
    try:
        text = (run_dir / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        text = ""
    if passed or text == str(iteration_of(chosen)):
        return []
    return [f"{TRACKER} says {text[:40]!r}; the newest whole checkpoint is {chosen.name}, which is used."]


def kept_batch(args: SftArguments, manifest: dict[str, Any], world_size: int, where: str) -> tuple[int, str]:
    """Rows of the run's global batch, which stays whatever the number of processes; and a sentence where options say another.

    Raises UserError where the data-parallel ranks cannot share it, naming the batch sizes and numbers of processes that can.
    """
    saved = manifest.get("resume", {}).get("global_batch")
    if not isinstance(saved, int) or saved < 1:
        raise DataError(
            "the checkpoint does not say its global batch.",
            where=where,
            fix="give the directory as --resume_from_checkpoint of a new run",
        )
    model = args.tp * args.pp * args.cp  # processes that hold one copy of it; where they do not fit, `problems` says so
    dp, uneven = divmod(world_size, model)
    if uneven or dp < 1:
        return saved, ""
    if saved % (args.batch_size * dp):
        sizes = [size for size in range(1, saved + 1) if saved % (size * dp) == 0]
        worlds = [ranks * model for ranks in range(1, saved + 1) if saved % (args.batch_size * ranks) == 0]
        fixes = [f"--batch_size {_any_of(sizes)}"] if sizes else []
        fixes += [f"{_any_of(worlds)} processes"] if worlds else []
        if not fixes:
            worlds = [ranks * model for ranks in range(1, saved + 1) if saved % ranks == 0]
            fixes = [f"--batch_size 1 and {_any_of(worlds)} processes"]
        raise UserError(
            f"this run has a global batch of {saved} rows, which {dp} data-parallel ranks x --batch_size {args.batch_size} do not divide.",
            where=where,
            fix=f"use {', or '.join(fixes)}",
        )
    return saved, _other_accumulation(args, saved, world_size, dp)


def _any_of(values: list[int]) -> str:
    """At most eight of the values, the smallest, in words."""
    return " or ".join(str(value) for value in values[:8]) + (", ..." if len(values) > 8 else "")


def _other_accumulation(args: SftArguments, saved: int, world_size: int, dp: int) -> str:
    """What keeps the global batch where the accumulation that was given, or is the default here, would not; else nothing."""
    unit = args.batch_size * world_size
    if global_batch_size(args, world_size) == saved:
        return ""
    steps, rest = divmod(saved, unit)
    here = f"--gradient_accumulation_steps {steps}"
    if rest:
        here = f"{saved // (args.batch_size * dp)} micro batches a step on each of {dp} data-parallel ranks"
    given = args.gradient_accumulation_steps
    return (
        f"the run's global batch of {saved} rows stays: with --batch_size {args.batch_size} on {world_size} processes that is {here}"
        + (f", not --gradient_accumulation_steps {given}" if given else "")
    )


def check_unchanged(args: SftArguments, manifest: dict[str, Any], fingerprint: str, where: str) -> list[str]:
    """Raise UserError where data or seed are not those of the run; returns what differs when that is allowed.

    Args:
        fingerprint: of the data as it is now (data.batches.Batches.fingerprint).
    """
    saved = manifest.get("resume", {})
    then = str(saved.get("data_fingerprint", "")).rsplit("-", 2)
    now = fingerprint.rsplit("-", 2)
    differs = []
    if saved.get("seed") != args.seed:
        differs.append(f"the seed was {saved.get('seed')} and is {args.seed}")
    steps = saved.get("train_iters")
    if then[0] != now[0] and args.streaming and steps != args.max_steps:
        differs.append(
            f"--max_steps was {steps} and is {args.max_steps}, and the order of streamed rows is drawn over all that the run needs"
        )
    elif then[0] != now[0]:
        differs.append("the training rows, their order, or the way they become tokens changed")
    if then[-1] != now[-1]:
        differs.append(f"--group_by_length was {str(then[-1][-1:] == '1').lower()} and is {str(args.group_by_length).lower()}")
    if differs and not args.allow_data_change:
        raise UserError(
            "this run cannot go on: " + "; ".join(differs) + ".",
            where=where,
            fix="give the data, template, seed and, with --streaming, --max_steps of the run again; or accept rows seen twice or never with --allow_data_change true",
        )
    return differs


def check_same_base(named: Path | None, checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Raise UserError where the weights that a command names are not those that the run began from.

    Args:
        named: directory of --resume_from_checkpoint or --model_id_or_path; None, or the run itself: nothing to compare.
        checkpoint: of the run; links in its manifest carry the SHA-256 of its ancestors' manifests.
    """
    run_dir = checkpoint.parent
    if named is None or not named.is_dir() or named.resolve() == run_dir.resolve():
        return
    links, differs = older_links(manifest), ""
    if is_megatron_directory(named):
        named_ones = {sha256_of(path / MANIFEST) for path in candidates(named) if (path / MANIFEST).is_file()}
        if not links:
            differs = f"it began from {dict(manifest.get('source') or {}).get('origin', 'other weights')}"
        elif len(links) < LONGEST_CHAIN and not named_ones & {link.get("manifest_sha256") for link in links}:
            differs = f"it began from {(checkpoint / links[-1]['directory']).resolve()}"
    elif isinstance(manifest.get("config"), dict):
        began, rows = manifest["config"], manifest.get("rows_before")  # the run itself may have added rows for new tokens
        began, now = began | ({"vocab_size": rows} if rows is not None else {}), read_config(named)
        if manifest.get("new_head"):  # and a head
            began, now = ({key: value for key, value in one.items() if key not in HEAD_FIELDS} for one in (began, now))
        differs = "; ".join(changed_fields(began, now))
    if differs:
        raise UserError(
            f"this run cannot go on with other weights: {differs}.",
            where=f"{run_dir}; {named}",
            fix=f"name the run itself, --resume_from_checkpoint {typed(run_dir)}; or leave --resume out to begin a new one",
        )


def check_same_model(args: SftArguments, values: dict[str, Any], manifest: dict[str, Any], where: str) -> None:
    """Raise UserError where --model_type or --dtype are given and are not those of the run."""
    for name, saved in (("model_type", values.get("model_type")), ("dtype", manifest.get("dtype"))):
        given = getattr(args, name)
        if name in args.explicit() and given not in ("AUTO", None) and saved is not None and given != saved:
            raise UserError(
                f"this run has {name} {saved}, not {given}.", where=where, fix=f"leave --{name} out, or start a new run"
            )
