"""The four benchmarks from their own files: Hendrycks' MMLU and C-Eval as CSVs or zip, GSM8K and ARC as jsonl, all as hub Parquet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaswift.errors import DataError, UserError
from megaswift.evaluation.files import Member, csv_rows, json_rows, members
from megaswift.evaluation.items import KINDS, LETTERS, SPLITS, Bench, Item

_HUB = {
    "mmlu": ("cais/mmlu", "all"),
    "ceval": ("ceval/ceval-exam", None),
    "gsm8k": ("openai/gsm8k", "main"),
    "arc": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
}
# The whole name of a file or directory, without its ending: mmlu_pro and gsm8k_platinum are other benchmarks.
_NAMES = {
    "mmlu": r"mmlu|hendrycks.?test",
    "ceval": r"c-?eval(-exam)?",
    "gsm8k": r"gsm8k|grade.?school.?math",
    "arc": r"arc.?challenge",
    "arc_easy": r"arc.?easy",
}
_NAME_ENDS = r"(?:[._-](?:test|val|validation|dev|train|all|main|exam|data|master))*"
_WANTED = {
    "mmlu": "mmlu.zip, or mmlu/ with test/SUBJECT_test.csv, or mmlu/ with the hub's Parquet files",
    "ceval": "ceval.zip, or ceval/ with val/SUBJECT_val.csv, or ceval/ with the hub's Parquet files",
    "gsm8k": "gsm8k_test.jsonl, or gsm8k/ with test.jsonl or the hub's Parquet files",
    "arc": "arc_challenge.jsonl, ARC-Challenge-Test.jsonl, or ARC-Challenge/ with the hub's Parquet files",
    "arc_easy": "arc_easy.jsonl, ARC-Easy-Test.jsonl, or ARC-Easy/ with the hub's Parquet files",
}


def read_bench(name: str, data_dir: str | None) -> Bench:
    """A benchmark with all its questions.

    Args:
        name: ceval, mmlu, gsm8k, arc (the Challenge set) or arc_easy.
        data_dir: --eval_data_dir; None for the hub.

    Raises DataError for a missing split or a malformed file, with file and line; UserError where nothing is found.
    """
    if data_dir is None:
        return _from_hub(name)
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(
            f"there is no directory {root}.", where="--eval_data_dir", fix="name the directory of the benchmark files"
        )
    found = _sources(name, root)
    if not found:
        raise UserError(f"{name} is not in {root}.", where="--eval_data_dir", fix=f"it needs {_WANTED[name]}")
    split, train = SPLITS[name], "dev" if name in ("mmlu", "ceval") else "train"
    scored = [(place, kept) for place, files in found if (kept := _of_split(name, files, (split, None)))]
    if not scored:
        seen = sorted({value for _, files in found for value in map(_split_of, files) if value})
        raise DataError(
            f"{name} has no {split} split here (found: {', '.join(seen) or 'none'}).",
            where=str(root),
            fix=f"it needs {_WANTED[name]}",
        )
    place, files = scored[0]
    if place == root and len(files) > 1 and files[0].name.endswith(".jsonl"):
        names = " and ".join(member.name for member in files[:2])
        raise UserError(f"{name} has its {split} split twice: {names}.", where=str(root), fix="leave one of them there")
    examples = [kept for _, others in found if (kept := _of_split(name, others, (train,)))]
    shots: dict[str, tuple[Item, ...]] = {}
    for item in _items(name, examples[0] if examples else []):
        shots[item.subset] = (*shots.get(item.subset, ()), item)
    return Bench(name, KINDS[name], split, tuple(_items(name, files)), shots, str(place))


def _sources(name: str, root: Path) -> list[tuple[Path, list[Member]]]:
    """Where a benchmark lies in a directory, by the names that its publishers and the hub gave it.

    A directory, a zip, and the loose files together are a source each, in this order. Only one of them is scored, since a zip and what was
    unpacked from it would count every question twice. The names of members begin with the source's own.
    """
    pattern = re.compile(f"(?:{_NAMES[name]}){_NAME_ENDS}", re.IGNORECASE)
    directories: list[tuple[Path, list[Member]]] = []
    zips: list[tuple[Path, list[Member]]] = []
    loose: list[Member] = []
    for path in sorted(root.iterdir()):
        stem = path.name if path.is_dir() else path.name.removesuffix(path.suffix)
        if path.name.startswith(".") or not pattern.fullmatch(stem):
            continue
        if path.is_dir() or path.suffix == ".zip":
            inside = [replace(member, name=f"{stem}/{member.name}") for member in members(path)]
            (directories if path.is_dir() else zips).append((path, _rows_only(inside)))
        elif path.suffix in (".jsonl", ".parquet"):
            loose += members(path)
    found = [*directories, *zips, *([(root, loose)] if loose else [])]
    if not found and name in ("arc", "arc_easy") and (root / "arc").is_dir():
        inside = [member for member in members(root / "arc") if re.search(_NAMES[name], member.name, re.IGNORECASE)]
        found = [(root / "arc", _rows_only(inside))]
    return [(place, files) for place, files in found if files]


def _rows_only(found: Iterable[Member]) -> list[Member]:
    return [member for member in found if member.name.endswith((".csv", ".jsonl", ".parquet"))]


def _of_split(name: str, files: Iterable[Member], splits: Sequence[str | None]) -> list[Member]:
    """The files of a split, each question once.

    The hub has MMLU's questions under `all` and again under each subject, and those of GSM8K under `main` and, with other
    solutions, under `socratic`, as the publisher's own directory has them; a directory may hold two formats.
    """
    found = [member for member in files if _split_of(member) in splits]
    if name == "gsm8k":
        found = [member for member in found if "socratic" not in member.name]
    if name == "mmlu" and any("/all/" in member.name for member in found):
        found = [member for member in found if "/all/" in member.name]
    for ending in (".csv", ".jsonl", ".parquet"):
        kept = [member for member in found if member.name.endswith(ending)]
        if kept:
            return kept
    return []


def _split_of(member: Member) -> str | None:
    """Which split a file holds, from its own name, else from its directory's; None where neither tells."""
    for part in reversed(member.name.split("/")):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in (("test", ("test",)), ("val", ("val", "validation")), ("dev", ("dev",)), ("train", ("train",))):
            if any(word in names for word in words):
                return split
    return None


def _items(name: str, files: Iterable[Member]) -> list[Item]:
    return [item for member in files for item in _READERS[KINDS[name]](member)]


def _mmlu(member: Member) -> list[Item]:
    if not member.name.endswith(".csv"):
        return [
            Item(
                str(row.get("subject") or _subject(member)),
                str(number),
                _text(row, "question", where),
                _choices(row.get("choices"), where),
                _letter(row.get("answer"), where, 4),
            )
            for number, (where, row) in enumerate(json_rows(member))
        ]
    items = []
    for number, (where, row) in enumerate(csv_rows(member)):
        if len(row) != 6:
            raise DataError(
                f"a row of MMLU has 6 fields, but this one has {len(row)}.",
                where=where,
                fix="mend the row, or fetch the file again",
            )
        items.append(Item(_subject(member), str(number), row[0].strip(), _choices(row[1:5], where), _letter(row[5], where, 4)))
    return items


def _ceval(member: Member) -> list[Item]:
    if not member.name.endswith(".csv"):
        rows = [
            (where, {key: "" if value is None else str(value) for key, value in row.items()})
            for where, row in json_rows(member)
        ]
    else:
        table = list(csv_rows(member))
        header = table[0][1] if table else []
        missing = [name for name in ("question", "A", "B", "C", "D", "answer") if name not in header]
        if missing:
            raise DataError(
                f"the header of a C-Eval file lacks: {', '.join(missing)}.", where=member.where, fix="use the dev and val files"
            )
        rows = []
        for where, row in table[1:]:
            if len(row) != len(header):
                raise DataError(f"{len(header)} fields expected, but the row has {len(row)}.", where=where, fix="mend the row")
            rows.append((where, dict(zip(header, row))))
    return [
        Item(
            _subject(member),
            row.get("id") or str(number),
            _text(row, "question", where),
            _choices([row.get(letter) for letter in "ABCD"], where),
            _letter(row.get("answer"), where, 4),
            row.get("explanation", ""),
        )
        for number, (where, row) in enumerate(rows)
    ]


def _gsm8k(member: Member) -> list[Item]:
    items = []
    for number, (where, row) in enumerate(json_rows(member)):
        solution, mark, answer = _text(row, "answer", where).rpartition("####")
        if not mark or not answer.strip():
            raise DataError("an answer of GSM8K ends with #### and the number.", where=where, fix="mend the row")
        items.append(Item("main", str(number), _text(row, "question", where), (), answer.strip(), solution.strip()))
    return items


def _arc(member: Member) -> list[Item]:
    return [_arc_row(row, where, number) for number, (where, row) in enumerate(json_rows(member))]


def _arc_row(row: dict[str, Any], where: str, number: int) -> Item:
    """A row in one of three shapes: query/choices/gold, the hub's, or the publisher's own."""
    subset = "ARC-Easy" if re.search(r"arc.?easy", where, re.IGNORECASE) else "ARC-Challenge"
    if "query" in row:
        question = re.sub(r"^Question:\s*|\s*Answer:\s*$", "", _text(row, "query", where))
        choices = _choices(row.get("choices"), where)
        return Item(subset, str(number), question, choices, _letter(row.get("gold"), where, len(choices)))
    stem, options = row.get("question"), row.get("choices")
    nested = stem if isinstance(stem, dict) else None
    if nested is not None:
        stem, options = nested.get("stem"), nested.get("choices")
    if isinstance(options, list):
        pairs = [option for option in options if isinstance(option, dict)]
        options = {"text": [option.get("text") for option in pairs], "label": [option.get("label") for option in pairs]}
    if not isinstance(options, dict) or not isinstance(stem, str):
        raise DataError("a row of ARC needs question, choices and answerKey.", where=where, fix="mend the row")
    choices, labels = _choices(options.get("text"), where), list(options.get("label") or [])
    if row.get("answerKey") not in labels:
        raise DataError(f"answerKey {row.get('answerKey')!r} is none of the labels {labels}.", where=where, fix="mend the row")
    return Item(subset, str(row.get("id") or number), stem, choices, LETTERS[labels.index(row["answerKey"])])


_READERS: dict[str, Callable[[Member], list[Item]]] = {"mmlu": _mmlu, "ceval": _ceval, "gsm8k": _gsm8k, "arc": _arc}


def _subject(member: Member) -> str:
    """The subject in a file's name (SUBJECT_test.csv), or its directory's where the name is only a split."""
    stem = re.sub(r"(?:^|[_-])(test|val|validation|dev|train)([_-].*)?$", "", member.base.rpartition(".")[0])
    return stem or member.name.split("/")[-2]


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"the row has no {name}.", where=where, fix="mend the row")
    return value.strip()


def _choices(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or not 2 <= len(values) <= len(LETTERS):
        raise DataError(f"the row needs 2 to {len(LETTERS)} choices.", where=where, fix="mend the row")
    texts = tuple("" if value is None else str(value).strip() for value in values)
    if "" in texts and texts.count("") > 1:
        raise DataError("several choices are empty.", where=where, fix="mend the row")
    return texts


def _letter(value: Any, where: str, count: int) -> str:
    """The right choice as a letter, from a letter or a place."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count:
        return LETTERS[value]
    text = str(value).strip().upper()
    if len(text) == 1 and text in LETTERS[:count]:
        return text
    raise DataError(
        f"the right answer is {value!r}; expected one of {', '.join(LETTERS[:count])}.",
        where=where,
        fix="mend the row; a test split without answers cannot be scored (C-Eval: use val)",
    )


def _from_hub(name: str) -> Bench:
    """The same from the Hugging Face hub, through `datasets`."""
    from datasets import get_dataset_config_names, load_dataset

    repository, config = _HUB[name]
    split, train = SPLITS[name], "dev" if name in ("mmlu", "ceval") else "train"
    parts: dict[str, list[Item]] = {split: [], train: []}
    try:
        for part in [config] if config else get_dataset_config_names(repository):
            for which in (split, train):
                for number, row in enumerate(load_dataset(repository, part, split=which)):
                    parts[which].append(_hub_item(name, part, dict(row), number))
    except DataError:
        raise
    except Exception as error:  # each of the libraries below has its own errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} cannot be fetched from the hub ({repository}): {reason}",
            where="--eval_dataset",
            fix=f"give --eval_data_dir DIR with {_WANTED[name]}",
        ) from error
    shots: dict[str, tuple[Item, ...]] = {}
    for item in parts[train]:
        shots[item.subset] = (*shots.get(item.subset, ()), item)
    return Bench(name, KINDS[name], split, tuple(parts[split]), shots, f"hf:{repository}")


def _hub_item(name: str, part: str, row: dict[str, Any], number: int) -> Item:
    import json

    data = json.dumps(row, ensure_ascii=False, default=str).encode()
    place = f"{part}/{_HUB[name][1] or part}"
    [item] = _READERS[KINDS[name]](Member(f"{part}_x.jsonl", f"hub:{place}_x.jsonl", lambda: data))
    subset = str(row.get("subject") or part) if name in ("mmlu", "ceval") else item.subset
    return Item(subset, item.id if item.id != "0" else str(number), item.question, item.choices, item.answer, item.explanation)
