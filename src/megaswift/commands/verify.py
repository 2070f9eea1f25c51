"""`swift verify DIR`: check a directory that this product made, and everything that it was made from.

swift verify qwen2-7b-instruct-tp2-pp1
swift verify output/.../qwen2-7b-instruct-hf --deep true --public_key team.pub
"""

from __future__ import annotations

from pathlib import Path

from megaswift.config.files import with_home
from megaswift.config.options import VerifyArguments, parse
from megaswift.errors import DataError, UserError
from megaswift.proof.chain import walk
from megaswift.store import paths
from megaswift.store.manifest import MANIFEST
from megaswift.store.sign import load_public_key
from megaswift.terminal import console, say


def verify_main(args: VerifyArguments | list[str]) -> list[Path]:
    """Check, and return the directories that were looked at, newest first.

    Args:
        args: options, or the words of the command line.

    Raises UserError where there is nothing to check, DataError naming the first thing that is not as it was written.
    """
    args = with_home(parse(VerifyArguments, args) if isinstance(args, list) else args)
    if not args.directory:
        raise UserError("no directory is named.", where="swift verify", fix="swift verify DIR")
    targets = _targets(Path(args.directory).absolute())
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
    console().print(table)
    if problems:
        directory, problem = problems[0]
        raise DataError(problem, where=str(directory), fix="use another copy; nothing was changed here")
    say("every file has the recorded SHA-256" if args.deep else "sizes and records agree; --deep true hashes every file again")
    return seen


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
