"""Options that name data, as sft_args.json keeps them: local paths are absolute, so that they mean the same from any directory."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaswift.config.options import DataArguments, PtArguments
from megaswift.data.blend import parse_weighted, written
from megaswift.data.registry import SAME
from megaswift.data.spec import DatasetSpec, parse_specs
from megaswift.errors import UserError

_PATHS = ("path", *(key for key, same in SAME.items() if same == "path"))


def kept_data(args: DataArguments) -> dict[str, Any]:
    """dataset, val_dataset and custom_dataset_info with absolute local paths; names and hub ids stay as they are."""
    return {
        "dataset": _weighted(args, args.dataset) if isinstance(args, PtArguments) else _items(args.dataset),
        "val_dataset": _weighted(args, args.val_dataset) if isinstance(args, PtArguments) else _items(args.val_dataset),
        "custom_dataset_info": _info(args.custom_dataset_info),
    }


def _items(items: list[str]) -> list[str]:
    result = []
    for spec in parse_specs(items):
        item = spec.text
        if spec.is_local:
            name = _absolute(spec.name)
            item = f"{name}{spec.text[len(spec.name) :]}"  # with its :subset and #N
            if not _means(item, replace(spec, text=item, name=name)):
                item = spec.text  # a mark of the grammar, as ::, is in the name of a directory above
        result.append(item)
    return result


def _weighted(args: PtArguments, items: list[str]) -> list[str]:
    """Items of a blend, as they are written in full."""
    return [written(spec, weight) for spec, weight in parse_weighted(items, args.custom_dataset_info)]


def _means(item: str, spec: DatasetSpec) -> bool:
    try:
        return parse_specs([item]) == [spec]
    except UserError:
        return False


def _info(custom: str | None) -> str | None:
    """A file of datasets, which itself says what its paths are relative to, or JSON text, whose paths are made absolute."""
    if not custom:
        return custom
    if not custom.lstrip().startswith(("{", "[")):
        return _absolute(custom)
    try:
        table = json.loads(custom)
    except (ValueError, RecursionError):  # nobody needed it, or it would have been refused
        return custom
    for entry in table.values() if isinstance(table, dict) else table:
        for key in _PATHS if isinstance(entry, dict) else ():
            if not isinstance(entry.get(key), str):
                continue
            if isinstance(table, list) and not any(entry.get(name) for name in ("ms_dataset_id", "hf_dataset_id")):
                entry.setdefault("dataset_name", entry[key])  # an entry of a list is named by its path where nothing else does
            entry[key] = _absolute(entry[key])
    return json.dumps(table, ensure_ascii=False)


def _absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute())
