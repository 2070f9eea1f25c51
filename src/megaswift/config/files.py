"""sft_args.json and export_args.json: the options of a command, kept beside what it made, and found again from there.

They let `--ckpt_dir DIR` stand alone: model_type, template, system prompt and layout are read from the directory, and a
flag that the user gives wins over the file.
"""

from __future__ import annotations

import copy
import json
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from megaswift.config.options import BaseArguments, ExportArguments
from megaswift.errors import DataError, UserError
from megaswift.store.publish import put

A = TypeVar("A", bound=BaseArguments)

SFT_ARGS = "sft_args.json"
EXPORT_ARGS = "export_args.json"

# What a directory tells about itself; `tp` and `pp` are for commands on Megatron directories.
MODEL_OPTIONS = (
    "model_type",
    "model_revision",
    "template_type",
    "dtype",
    "system",
    "custom_dataset_info",
    "language_model_only",
)
LAYOUT_OPTIONS = ("tp", "pp", "ep", "etp")
DATASET_OPTIONS = (
    "dataset",
    "val_dataset",
    "dataset_test_ratio",
    "dataset_seed",
    "columns",
    "strict",
    "model_name",
    "model_author",
)

# Options that name a file or a directory of this machine; model_id_or_path may be a hub id too.
PATH_OPTIONS = (
    "adapters",
    "ckpt_dir",
    "directory",
    "hf_output_dir",
    "logging_dir",
    "megatron_output_dir",
    "model_id_or_path",
    "mtp_prompts",
    "output_dir",
    "public_key",
    "resume_from_checkpoint",
    "sign",
)

_SECRET_ENDINGS = ("token", "api_key", "password", "secret")


def with_home(args: A) -> A:
    """A copy in which `~` of options that name places is the home directory.

    A shell writes it out only where it begins a word: not in --opt=~/x, nor in an option file.
    """
    values = {name: getattr(args, name, None) for name in PATH_OPTIONS}
    # Of several places, which may have names, each is expanded where it is read.
    return args.changed(
        **{name: os.path.expanduser(value) for name, value in values.items() if isinstance(value, str) and value}
    )


def kept_places(args: BaseArguments) -> dict[str, str]:
    """The options that name places, absolute, so that they mean the same from any directory."""
    values = {name: getattr(args, name, None) for name in PATH_OPTIONS}
    local = {name: Path(value) for name, value in values.items() if value}
    return {name: str(path.absolute()) for name, path in local.items() if name != "model_id_or_path" or path.exists()}


def args_file_in(directory: Path | str) -> Path | None:
    """The options file of a directory: sft_args.json, else export_args.json, else None."""
    for name in (SFT_ARGS, EXPORT_ARGS):
        path = Path(directory) / name
        if path.is_file():
            return path
    return None


def read_args_file(directory: Path | str) -> dict[str, Any]:
    """Options kept in a directory, or an empty dict where it has no options file.

    Raises DataError for a file that is not one JSON object.
    """
    path = args_file_in(directory)
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"cannot read the options file: {error}", where=str(path), fix="delete it and give --model_type"
        ) from error
    if not isinstance(values, dict):
        raise DataError("an options file must hold one JSON object.", where=str(path), fix="delete it and give --model_type")
    return values


def write_args_file(
    directory: Path | str,
    args: BaseArguments | Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
) -> Path:
    """Write the options of a command into `directory`, where it appears whole, and return the file.

    Args:
        directory: must exist.
        args: the options; ExportArguments go to export_args.json, others to sft_args.json.
        extra: more entries, which win over those of `args` (values found from the model, versions).
        name: file name, where the kind of `args` does not tell it.

    Tokens, keys and passwords are left out.
    """
    values = dict(args.to_dict() if isinstance(args, BaseArguments) else args) | dict(extra or {})
    public = {key: value for key, value in values.items() if not key.lower().endswith(_SECRET_ENDINGS)}
    path = Path(directory) / (name or (EXPORT_ARGS if isinstance(args, ExportArguments) else SFT_ARGS))
    text = json.dumps(public, ensure_ascii=False, indent=2, default=str) + "\n"
    put(path, text)
    return path


def fill_from_file(args: A, values: Mapping[str, Any], names: Iterable[str]) -> A:
    """A copy of `args` in which options that the user did not give have the values of an options file.

    Args:
        args: options as given; what `args.explicit()` names is kept.
        values: what read_args_file found; None and missing entries change nothing.
        names: the options to take; those that this command does not have are skipped.

    Raises DataError for a value of another type than the option's.
    """
    hints = typing.get_type_hints(type(args))
    known = {item.name for item in fields(args)}
    result, explicit = copy.copy(args), args.explicit()
    for name in names:
        value = values.get(name)
        if value is None or name not in known or name in explicit:
            continue
        if not _fits(value, hints[name]):
            raise DataError(
                f"the options file says {name} = {value!r}, which is not a value for --{name}.", fix=f"give --{name} yourself"
            )
        setattr(result, name, value)
    _require_plain_name(result)
    try:
        result.check_choices()
    except UserError as error:
        raise DataError(f"the options file holds a value that cannot be: {error.what}", fix=error.fix) from error
    return result


def _require_plain_name(args: BaseArguments) -> None:
    """model_type becomes a part of directory names: one that leads elsewhere is refused, whoever gave it."""
    name = getattr(args, "model_type", None)
    if not name or re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        return
    given = "model_type" in args.explicit()
    raise (UserError if given else DataError)(
        f"{'' if given else 'the options file says '}model_type {name!r}{'' if given else ', which'} cannot be part of a directory name.",
        where="--model_type",
        fix="use letters, digits, - _ ." if given else "give --model_type yourself",
    )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has the type of an option."""
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return True
    return any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind in kinds)
