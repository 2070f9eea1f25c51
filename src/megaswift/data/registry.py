"""Dataset names that users know, read from registry.json and from `--custom_dataset_info`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from megaswift.data.conversation import BadRow
from megaswift.errors import UserError

HERE = Path(__file__).parent
# Names of the same keys in ms-swift's dataset_info.json.
SAME = {"dataset_id": "ms", "ms_dataset_id": "ms", "hf_dataset_id": "hf", "dataset_path": "path"}
KNOWN = ("ms", "hf", "path", "subsets", "default", "split", "columns", "converter", "help", "tags", "dataset_name")


@dataclass(frozen=True)
class Entry:
    """A registered dataset.

    Attributes:
        name: what users write.
        ms, hf: ids on ModelScope and Hugging Face, where it is there.
        path: local file or folder instead; relative to the file that registers it.
        subsets: names that users may ask for; those used when none is asked for are `default`.
        split: splits that are joined.
        columns: column to read -> name under which it is read; "-" drops it.
        converter: name in CONVERTERS, for rows that renaming cannot mend.
    """

    name: str
    ms: str | None = None
    hf: str | None = None
    path: str | None = None
    subsets: tuple[str, ...] = ()
    default: tuple[str, ...] = ()
    split: tuple[str, ...] = ("train",)
    columns: dict[str, str] = field(default_factory=dict)
    converter: str | None = None


@cache
def builtin() -> dict[str, Entry]:
    """The entries of registry.json."""
    return _entries(json.loads((HERE / "registry.json").read_text(encoding="utf-8")), HERE, "registry.json")


def entries(custom: str | None) -> dict[str, Entry]:
    """All entries; those of `--custom_dataset_info` (a JSON file, or JSON text) win. Raises UserError."""
    if not custom:
        return builtin()
    text, base = custom, Path.cwd()
    if not custom.lstrip().startswith(("{", "[")):
        path = Path(custom).expanduser()
        try:
            text, base = path.read_text(encoding="utf-8-sig"), path.resolve().parent
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the file of datasets: {error}.", where=f"--custom_dataset_info {custom}") from error
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}.", where="--custom_dataset_info") from error
    if isinstance(table, list):  # ms-swift's newer form: a list of entries, named by dataset_name or their id
        table = {
            item.get("dataset_name") or item.get("ms_dataset_id") or item.get("hf_dataset_id") or item.get("dataset_path"): item
            for item in table
            if isinstance(item, dict)
        }
    if not isinstance(table, dict) or not all(isinstance(item, dict) for item in table.values()):
        raise UserError("expected an object from name to entry, or a list of entries.", where="--custom_dataset_info")
    return builtin() | _entries(table, base, "--custom_dataset_info")


def _entries(table: dict[str, Any], base: Path, where: str) -> dict[str, Entry]:
    result = {}
    for name, item in table.items():
        item = {SAME.get(key, key): value for key, value in item.items()}
        unknown = sorted(set(item) - set(KNOWN))
        if unknown:
            raise UserError(
                f"dataset {name!r} has unknown keys: {', '.join(unknown)}.", where=where, fix=f"use: {', '.join(KNOWN)}"
            )
        if item.get("converter") not in (None, *CONVERTERS):
            raise UserError(
                f"dataset {name!r} names an unknown converter {item['converter']!r}.",
                where=where,
                fix=f"use: {', '.join(CONVERTERS)}",
            )
        if not any(item.get(key) for key in ("ms", "hf", "path")):
            raise UserError(
                f"dataset {name!r} names no place.", where=where, fix="give ms (ModelScope id), hf (Hugging Face id) or path"
            )
        subsets = tuple(part["name"] if isinstance(part, dict) else part for part in item.get("subsets", ()))
        path = item.get("path")
        result[name] = Entry(
            name=name,
            ms=item.get("ms"),
            hf=item.get("hf"),
            path=str((base / Path(path).expanduser()).resolve()) if path else None,
            subsets=subsets,
            default=tuple(item.get("default", subsets)),
            split=tuple([item["split"]] if isinstance(item.get("split"), str) else item.get("split", ("train",))),
            columns=dict(item.get("columns", {})),
            converter=item.get("converter"),
        )
    return result


def _dolly(row: dict[str, Any]) -> dict[str, Any]:
    return {"instruction": row.get("instruction"), "input": row.get("context"), "output": row.get("response")}


def _first_answer(row: dict[str, Any]) -> dict[str, Any]:
    answers = row.get("chatgpt_answers") or row.get("human_answers")
    if not answers:
        raise BadRow("empty content", "no answer")
    return {"query": row.get("question"), "response": answers[0]}


def _sql_context(row: dict[str, Any]) -> dict[str, Any]:
    context = row.get("context") or row.get("sql_context") or ""
    question = row.get("question") or row.get("sql_prompt") or ""
    return {
        "query": f"Given this database:\n{context}\n\nWrite an SQL query: {question}",
        "response": row.get("answer") or row.get("sql"),
    }


def _empty_think(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"response": f"<think>\n\n</think>\n\n{row.get('response', '')}"}


def _no_think(row: dict[str, Any]) -> dict[str, Any]:
    return _empty_think(row) | {"query": f"{row.get('query', '')} /no_think"}


# Row functions by name, for registry entries and subsets.
CONVERTERS = {
    "dolly": _dolly,
    "first_answer": _first_answer,
    "sql_context": _sql_context,
    "empty_think": _empty_think,
    "no_think": _no_think,
}
