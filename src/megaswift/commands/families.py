"""`swift families`: which models can be trained, made from the families themselves; for one folder what of its config counts.

swift families
swift families --model_id_or_path DIR
swift families --markdown true > table.md
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaswift.config.files import with_home
from megaswift.config.options import FamiliesArguments, parse
from megaswift.errors import UserError
from megaswift.models import describe, family_of
from megaswift.models.lengths import trained_length
from megaswift.terminal import console, say
from megaswift.weights.hf.config import load_config


def families_main(args: FamiliesArguments | list[str]) -> list[dict[str, str]]:
    """Print the table of families, or what a folder's config means; returns the rows.

    Raises UserError for a folder that is not there, or whose config no family takes as it is.
    """
    args = with_home(parse(FamiliesArguments, args) if isinstance(args, list) else args)
    if args.model_id_or_path is not None:
        return _of_folder(Path(args.model_id_or_path))
    with _without_remarks():
        rows = describe.table()
    if args.markdown:
        say(markdown(rows))
    else:
        _print([_narrow(row) for row in rows])
        say("all of them take packed rows and adapters. One model's config: swift families --model_id_or_path DIR")
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows as a table of Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _narrow(row: dict[str, str]) -> dict[str, str]:
    """A row in the width of a terminal: what layers are made of in one column."""
    made = [f"{part}: {row[part]}" for part in ("attention", "MLP", "norms")] + [row["embeddings and logits"]]
    return {"model_type": row["model_type"], "layers": "; ".join(part for part in made if part), "layouts": row["layouts"]}


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """transformers comments on the tiny configs that the table is made from."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _of_folder(folder: Path) -> list[dict[str, str]]:
    if not folder.is_dir():
        raise UserError(
            f"there is no directory {folder}.", where="--model_id_or_path", fix="name a model folder on this machine"
        )
    config: Any = load_config(folder)
    family = family_of(config.model_type)
    rows = [{"field": name, "value": value, "is": meaning} for name, value, meaning in describe.fields(family, config)]
    _print(rows)
    kinds = family.layers(config)
    say(f"attention: {describe.attention(family, config)}; MLP: {describe.mlp(kinds)}; norms: {describe.norms(kinds)}")
    for numbers, words in describe.layers(kinds):
        say(f"layers {numbers}: {words}")
    if patterns := family.carried(config):
        say(f"carried along as it is, and not trained, where the folder has it: {', '.join(patterns)}")
    limit, reason = trained_length(config)
    say(f"samples of up to {limit} tokens ({reason})")
    return rows


def _print(rows: list[dict[str, str]]) -> None:
    from rich.table import Table

    table = Table()
    for number, name in enumerate(rows[0]):
        table.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row.values())
    console().print(table)
