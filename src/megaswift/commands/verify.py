"""`swift verify DIR`: check a directory that this product made, and everything that it was made from.

swift verify qwen2-7b-instruct-tp2-pp1
swift verify output/.../qwen2-7b-instruct-hf --deep true --public_key team.pub
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megaswift.config.files import with_home
from megaswift.config.options import VerifyArguments, parse
from megaswift.errors import DataError, UserError
from megaswift.proof.chain import walk
from megaswift.store import paths
from megaswift.store.manifest import MANIFEST, read_manifest
from megaswift.store.sign import load_public_key
from megaswift.terminal import console, say
from megaswift.weights.carried import FIELD as CARRIED
from megaswift.weights.load_hf import is_hf_folder

if TYPE_CHECKING:
    from megaswift.proof.ahead import Guesses


def verify_main(args: VerifyArguments | list[str]) -> list[Path]:
    """Check, and return the directories that were looked at, newest first.

    Args:
        args: options, or the words of the command line.

    Raises UserError where there is nothing to check, DataError naming the first thing that is not as it was written.
    """
    args = with_home(parse(VerifyArguments, args) if isinstance(args, list) else args)
    if not args.directory:
        raise UserError("no directory is named.", where="swift verify", fix="swift verify DIR")
    if args.mtp_prompts and not args.mtp:
        raise UserError("prompts are for --mtp true.", where="--mtp_prompts", fix="add --mtp true, or leave it out")
    root = Path(args.directory).absolute()
    targets = [] if args.mtp and is_hf_folder(root) and not (root / MANIFEST).is_file() else _targets(root)
    from rich.table import Table

    trusted = None
    if args.public_key:
        trusted = load_public_key(Path(args.public_key))
    table = Table(title="made by (newest first)" if len(targets) == 1 else None, title_justify="left")
    for name in ("directory", "kind", "holds", "signed by", "result"):
        table.add_column(name, overflow="fold")
    seen: list[Path] = []
    problems: list[tuple[Path, str]] = []
    for target in targets:
        for link in walk(target, args.deep, trusted):
            if link.directory in seen:
                continue
            seen.append(link.directory)
            result = link.problem or ("not checked" if link.note.startswith("not here") else "good")
            table.add_row(_shown(link.directory), link.kind, link.note, link.signed_by[:12], result)
            if link.problem:
                problems.append((link.directory, link.problem))
    if targets:
        console().print(table)
    if problems:
        directory, problem = problems[0]
        raise DataError(problem, where=str(directory), fix="use another copy; nothing was changed here")
    if targets:
        say(
            "every file has the recorded SHA-256"
            if args.deep
            else "sizes and records agree; --deep true hashes every file again"
        )
    if args.mtp:
        print_guesses(root, args.mtp_prompts)
    return seen


def print_guesses(root: Path, prompts: str | None) -> dict[str, Guesses]:
    """How often layers that predict ahead guess a model's own token, before training and after; "before" is left out where it is gone.

    Args:
        root: a Hugging Face folder.
        prompts: a file with one prompt a line.

    Raises UserError for any other directory, for a model without such layers, and for a file that cannot be read.
    """
    if not is_hf_folder(root):
        raise UserError(
            "layers that predict ahead are measured in Hugging Face folders.",
            where=f"--mtp, {root}",
            fix="export it first: swift export --ckpt_dir DIR --to_hf true",
        )
    from megaswift.proof.ahead import measure

    texts = None if prompts is None else _prompts(Path(prompts))
    manifest = read_manifest(root) if (root / MANIFEST).is_file() else {}
    origin = Path(str(dict(manifest.get(CARRIED) or {}).get("origin")))
    found: dict[str, Guesses] = {}
    if manifest.get("iteration") and origin.is_dir() and is_hf_folder(origin):
        found["before"] = measure(origin, texts)
    found["after" if found or manifest.get("iteration") else "as it is"] = measure(root, texts)
    for name, guesses in found.items():
        say(
            f"layers that predict ahead, {name}: {guesses.right} of {guesses.tokens} guesses ({guesses.share:.1%}) are the token that the model "
            "itself finds likeliest"
        )
    if manifest.get("iteration"):
        say("they were carried along and not trained: speculative decoding gives the same answers, with fewer guesses taken")
    return found


def _prompts(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("the file of prompts cannot be read as UTF-8 text.", where=f"--mtp_prompts {path}") from error
    found = {f"line {number}": line for number, line in enumerate(lines, start=1) if line.strip()}
    if not found:
        raise UserError("the file has no prompt.", where=f"--mtp_prompts {path}", fix="write one a line")
    return found


def _targets(root: Path) -> list[Path]:
    """The directories with manifests that a name stands for."""
    if not root.is_dir():
        raise UserError(f"there is no directory {root}.", where="swift verify")
    if (root / MANIFEST).is_file():
        return [root]
    found = paths.candidates(root)
    if not found:
        raise UserError(
            "this directory was not made by swift export or swift sft: it has no manifest.json.",
            where=str(root),
            fix="name a directory that was",
        )
    return found


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
