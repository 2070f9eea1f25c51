"""Own benchmarks from --custom_eval_config: multiple choice files like C-Eval's, and questions with a text answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaswift.errors import DataError, UserError
from megaswift.evaluation.files import Member, csv_rows, json_rows, members
from megaswift.evaluation.items import KINDS, LETTERS, Bench, Item

_PATTERNS = ("ceval", "general_qa")


def read_config(path: str) -> list[dict[str, Any]]:
    """The entries of a configuration: {name, pattern: ceval | general_qa, dataset: DIR, subset_list}.

    Raises UserError for a file that is not such a list.
    """
    try:
        entries = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the configuration: {error}", where="--custom_eval_config") from error
    if not isinstance(entries, list) or not entries:
        raise UserError("the configuration must hold a list of benchmarks.", where=path, fix='for example [{"name": ...}]')
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "pattern", "dataset")):
            raise UserError("an entry needs name, pattern and dataset.", where=where)
        if entry["pattern"] not in _PATTERNS:
            raise UserError(f"pattern {entry['pattern']!r} is not known.", where=where, fix=f"use {' or '.join(_PATTERNS)}")
        if entry["name"] in KINDS:
            raise UserError(f"{entry['name']} is the name of a built-in benchmark.", where=where, fix="choose another name")
        subsets = entry.get("subset_list")
        if subsets is not None and not (isinstance(subsets, list) and all(isinstance(name, str) for name in subsets)):
            raise UserError("subset_list must be a list of names.", where=where)
    return entries


def read_custom(entry: dict[str, Any], config: str) -> Bench:
    """The benchmark of one entry. A dataset path is relative to the configuration file, else to the current directory.

    Files: ceval: {subset}_val.csv and, for solved examples, {subset}_dev.csv, with columns question, A, B, ..., answer;
    general_qa: {subset}.jsonl with query and response.
    """
    given = Path(entry["dataset"]).expanduser()
    root = next((place for place in (Path(config).expanduser().parent / given, given) if place.is_dir()), None)
    if root is None:
        raise UserError(
            f"there is no directory {given}.", where=f"{config}: {entry['name']}", fix="name a directory in dataset"
        )
    files = {member.base: member for member in members(root)}
    choice = entry["pattern"] == "ceval"
    ending = "_val.csv" if choice else ".jsonl"
    subsets = entry.get("subset_list") or sorted(name.removesuffix(ending) for name in files if name.endswith(ending))
    if not subsets:
        raise DataError(f"no file ends in {ending}.", where=str(root))
    items: list[Item] = []
    shots: dict[str, tuple[Item, ...]] = {}
    for subset in subsets:
        if subset + ending not in files:
            raise DataError(f"{subset}{ending} is missing.", where=str(root), fix="add it, or leave it out of subset_list")
        items += _choices(files[subset + ending], subset) if choice else _pairs(files[subset + ending], subset)
        if choice and f"{subset}_dev.csv" in files:
            shots[subset] = tuple(_choices(files[f"{subset}_dev.csv"], subset))
    return Bench(entry["name"], "ceval" if choice else "general_qa", "val", tuple(items), shots, str(root), custom=True)


def _choices(member: Member, subset: str) -> list[Item]:
    table = list(csv_rows(member))
    header = table[0][1] if table else []
    letters = [letter for letter in LETTERS if letter in header]
    if len(letters) < 2 or "question" not in header or "answer" not in header:
        raise DataError("the header needs question, A, B, ... and answer.", where=member.where)
    items = []
    for number, (where, row) in enumerate(table[1:]):
        if len(row) != len(header):
            raise DataError(f"{len(header)} fields expected, but the row has {len(row)}.", where=where, fix="mend the row")
        values = dict(zip(header, row))
        texts = [values[letter].strip() for letter in letters]
        choices = tuple(filter(None, texts))
        if list(choices) != texts[: len(choices)]:  # left out, it would give its letter to the next one
            raise DataError(
                "a choice before the last one is empty.", where=where, fix="fill it; unused choices stand at the end"
            )
        answer = values["answer"].strip().upper()
        if len(answer) != 1 or answer not in LETTERS[: len(choices)] or not values["question"].strip():
            raise DataError(f"the right answer is {values['answer']!r}; a letter of a choice is needed.", where=where)
        items.append(
            Item(
                subset,
                values.get("id") or str(number),
                values["question"].strip(),
                choices,
                answer,
                values.get("explanation", ""),
            )
        )
    return items


def _pairs(member: Member, subset: str) -> list[Item]:
    items = []
    for number, (where, row) in enumerate(json_rows(member)):
        query, response = row.get("query"), row.get("response")
        if not (isinstance(query, str) and query.strip() and isinstance(response, str) and response.strip()):
            raise DataError("a row needs query and response.", where=where, fix="mend the row")
        items.append(Item(subset, str(number), query, (), response))
    return items
