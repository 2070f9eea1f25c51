"""What both directions of `swift export` share: names of outputs, sizes, and what is said at the end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megaswift.config.files import EXPORT_ARGS
from megaswift.errors import UserError
from megaswift.models.prediction import notes_on_carried
from megaswift.models.whole import whole_of
from megaswift.proof.page import print_proof, round_trip
from megaswift.store import paths
from megaswift.store.manifest import MANIFEST
from megaswift.store.sign import load_private_key, sign_manifest
from megaswift.terminal import say, shown
from megaswift.weights.hf.tokenizer import has_tokenizer, load_tokenizer

THREADS = 2  # files written at the same time
_ITERATION = r"iter_\d+"
_CHECKPOINT = re.compile(rf"{paths.RELEASE}|{_ITERATION}|mp_rank_\d+\w*")  # a directory of weights in a Megatron directory


def require_free_name(target: Path, overwrite: bool, *sources: Path) -> None:
    """Raise UserError for a name that is taken, unless it may be replaced and is something that this command made.

    Never replaced: a training run, and what is read to make the target.

    Args:
        sources: the directories that are read.
    """
    for source in sources:
        _require_apart(target, source)
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UserError(
            "the output directory exists already.",
            where=str(target),
            fix="use --overwrite true to replace it, or name another one",
        )
    known = (paths.TRACKER, MANIFEST, EXPORT_ARGS)
    if not target.is_dir() or (any(target.iterdir()) and not any((target / name).exists() for name in known)):
        raise UserError(
            "this was not made by swift export, so it is not replaced.",
            where=str(target),
            fix="remove it yourself, or name another one",
        )
    run = _run_in(target)
    if run is not None or any(target.glob("*.distcp")):
        what = "is a checkpoint" if run is None else "is a training run" if run == target else "holds a training run"
        raise UserError(
            f"this {what}, so it is not replaced.", where=str(run or target), fix="remove it yourself, or name another one"
        )


def _require_apart(target: Path, source: Path) -> None:
    """Raise UserError for a target that would take the place of what it is made from, or lie among its checkpoints.

    Elsewhere in the source it may lie: the default of --to_hf does.
    """
    place, origin = target.resolve(), source.resolve()
    if place == origin:
        what = "is the directory that is converted"
    elif origin.is_relative_to(place):
        what = "holds the directory that is converted"
    elif place.is_relative_to(origin) and _CHECKPOINT.fullmatch(place.relative_to(origin).parts[0]):
        what = "is a place of checkpoints of the directory that is converted"
    else:
        return
    raise UserError(f"the output directory {what} ({source}).", where=str(target), fix="name another one")


def _run_in(directory: Path) -> Path | None:
    """A training run in a directory: itself, or one below it."""
    for place, folders, files in os.walk(directory):
        if "plan.json" in files or any(re.fullmatch(_ITERATION, name) for name in folders):
            return Path(place)
    return None


def report(parameters: int, tensors: int, size: int, seconds: float, resumed: list[str]) -> None:
    """Say what was written, and how fast."""
    say(
        f"  {parameters:,} parameters in {tensors} tensors, {size / 1e9:.2f} GB, {seconds:.1f} s ({size / 1e9 / max(seconds, 1e-9):.2f} GB/s)"
    )
    if resumed:
        say(f"  resumed: {len(resumed)} files of an interrupted conversion were complete and are kept")


def require_text_alone(config: Any, root: Path) -> None:
    """Raise UserError for old checkpoints beside a whole model's config: they hold its text model alone."""
    if whole_of(config) is not None:
        raise UserError(
            f"old checkpoints hold a text model alone, and config.json is that of a whole {config.model_type}.",
            where=str(root),
            fix="convert its Hugging Face folder: swift export --to_megatron true --model_id_or_path DIR --language_model_only true",
        )


def report_carried(names: Iterable[str], config: Any) -> None:
    """Say which tensors are carried along, where there are such."""
    for note in notes_on_carried(names, config):
        say(f"  [yellow]{note}[/yellow]")


def report_nonfinite(names: set[str]) -> None:
    """Say which tensors have NaN or infinite values, where --allow_nonfinite true let them pass."""
    if names:
        shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        say(f"  [yellow]NaN or infinite values (--allow_nonfinite true): {shown}. Logits cannot be compared.[/yellow]")


def report_rounded(found: dict[str, str], count: int) -> None:
    """Say which of a model's tensors hold less than in the source."""
    if found:
        from megaswift.weights.convert.precision import rounded_text

        say(f"  [yellow]{rounded_text(found, count)}[/yellow]")


def report_proof(proof: dict[str, Any] | None) -> None:
    """The proof as a table, or one line that says there is none."""
    if proof is None:
        say("  [yellow]not verified (--verify false)[/yellow]")
        return
    if "logits" not in proof:
        say(f"  round trip: {round_trip(proof)}")
        return
    print_proof(proof)


def sign(directory: Path, key: str | None) -> None:
    """Sign a manifest with --sign KEY, if that was given."""
    if key:
        sign_manifest(directory, load_private_key(Path(key)))


def check_tokenizer(model_dir: Path) -> None:
    """Raise DataError where the tokenizer is damaged or has tokens without a row in the embedding; say where there is none."""
    if has_tokenizer(model_dir):
        load_tokenizer(model_dir)
    else:
        say(f"  [yellow]no tokenizer in {shown(model_dir)}: put its files there, training and inference need them[/yellow]")
