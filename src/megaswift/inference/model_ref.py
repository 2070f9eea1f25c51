"""The model that `infer`, `eval` and `deploy` are told to use: a folder, a name, or a Megatron run that may still go on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.config.files import MODEL_OPTIONS, fill_from_file, read_args_file
from megaswift.config.options import BackendArguments, ExportArguments
from megaswift.errors import DataError, UserError
from megaswift.export.adapter import base_folder
from megaswift.export.to_hf import convert_with_proof
from megaswift.hub.locate import locate
from megaswift.models.head import ENDING, ScoreHead
from megaswift.store import paths
from megaswift.store.cache import alone, cache_root
from megaswift.store.manifest import MANIFEST, older_links, quick_check, read_manifest, sha256_of, versions, write_manifest
from megaswift.store.paths import TRACKER, gguf_fix, is_megatron_directory, iteration_of
from megaswift.store.publish import refuse_unfinished
from megaswift.terminal import say, typed
from megaswift.weights.base import base_digest
from megaswift.weights.hf.config import load_config, names_in_folder
from megaswift.weights.hf.folder import ADAPTER_CONFIG, is_adapter, read_config
from megaswift.weights.hf.json_files import read_json
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.hf.score_head import with_score_head

if TYPE_CHECKING:
    from megaswift.hub.locate import Located

KEPT = 2  # exports of one run, and merged models of one adapter: a conversation may still use the one before

_handed_out: set[Path] = set()  # what this process was given: a comparison of several models still reads it


@dataclass(frozen=True)
class ModelRef:
    """A model as the options name it, before anything is converted or loaded.

    Attributes:
        args: options, those of the model's options file filled in.
        directory: the local directory that was named, or None for a model that is looked up by name.
        megatron: whether that directory holds Megatron weights.
        values: what the directory's options file says.
        adapter: directory of a LoRA adapter that is merged into the model.
        named: name -> directory of LoRA adapters that are loaded beside the model.
    """

    args: Any
    directory: Path | None
    megatron: bool
    values: dict[str, Any]
    adapter: Path | None = None
    named: Mapping[str, Path] = field(default_factory=dict)

    @property
    def home(self) -> Path | None:
        """The directory that was named, where results may go: the adapter's where there is one."""
        return self.adapter or self.directory

    def locate(self) -> Located:
        """Where the Hugging Face folder is; for Megatron weights, and with an adapter, it is made first.

        Raises UserError or DataError.
        """
        found = self._locate_model()
        for adapter in self.named.values():
            _require_own_base(found, adapter)
        return found if self.adapter is None else _with_adapter(found, self.adapter)

    def _locate_model(self) -> Located:
        from dataclasses import replace

        args = self.args
        if self.directory is None:
            return locate(args.model_type, args.model_id_or_path, args.model_revision)
        if not self.megatron:
            return locate(args.model_type, str(self.directory), args.model_revision)
        folder, checkpoint = exported(self.directory, args.model_type)
        origin = f"{self.directory.resolve()}/{checkpoint}"
        if is_adapter(folder):
            base = _base_of(folder, args.model_type)
            return replace(_with_adapter(base, folder), origin=f"{base.origin} + {origin}")
        found = locate(args.model_type, str(folder), args.model_revision)
        return replace(found, origin=origin)


def choose(args: BackendArguments, more: Iterable[str] = ()) -> ModelRef:
    """Find out which model the options name and read its options file.

    Args:
        args: options as given.
        more: further options that are taken from the file, beside those of the model.

    Raises UserError for options that name no model or two, or a directory without a model. Loads nothing.
    """
    if args.adapters:
        named = _named_adapters(args.adapters)
        if "" in named:
            return _choose_adapter(args.changed(adapters=[]), named[""], more)
        return _choose_beside(args.changed(adapters=[]), named, more)
    if args.ckpt_dir is not None and is_adapter(Path(args.ckpt_dir).expanduser()):
        return _choose_adapter(args.changed(ckpt_dir=None), Path(args.ckpt_dir).expanduser(), more)
    directory, megatron = _model_directory(args)
    if directory is None:
        return ModelRef(args, None, False, {})
    values = read_args_file(directory)
    return ModelRef(fill_from_file(args, values, (*MODEL_OPTIONS, *more)), directory, megatron, values)


def gives_scores(chosen: ModelRef) -> bool:
    """Whether a model that options name has a head of scores; nothing is converted to find out."""
    if chosen.adapter is not None:
        return bool(read_json(chosen.adapter / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS")
    directory = chosen.directory if chosen.directory is not None else chosen.locate().path
    names = read_config(directory).get("architectures") if (directory / "config.json").is_file() else None
    return any(str(name).endswith(ENDING) for name in names or ())


def _named_adapters(words: Sequence[str]) -> dict[str, Path]:
    """Name -> directory of --adapters; "" is the name of a single directory. Raises UserError for what is no adapter."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or is_adapter(Path(word).expanduser()):
            name, place = "", word
        adapter = Path(place).expanduser()
        if not is_adapter(adapter):
            raise UserError(
                f"{adapter} holds no adapter in PEFT's form.",
                where="--adapters",
                fix="export it: swift export --ckpt_dir RUN --to_hf true; a run itself is given as --ckpt_dir",
            )
        if name in found or (not name and len(words) > 1):
            raise UserError(
                f"several adapters need a name each, and {word} has {'none' if not name else 'that of another'}.",
                where="--adapters",
                fix="for example: --adapters first=DIR second=DIR",
            )
        found[name] = adapter
    return found


def _choose_beside(args: BackendArguments, named: dict[str, Path], more: Iterable[str]) -> ModelRef:
    """Adapters by name, with the base that the options name, or else the one that all of them name."""
    from dataclasses import replace

    from megaswift.weights.convert.lora import check_adapter

    bases = {}
    for name, adapter in named.items():
        check_adapter(adapter)
        bases[name] = _choose_adapter(args, adapter, more)
        if gives_scores(bases[name]):
            raise UserError(
                f"the adapter {name} gives scores and no answers.",
                where="--adapters",
                fix=f"give it alone: --ckpt_dir {typed(adapter)}",
            )
    first = next(iter(named))
    other = next((name for name, chosen in bases.items() if _place(chosen) != _place(bases[first])), None)
    if other is not None:
        raise UserError(
            f"{first} and {other} were trained on {_place(bases[first])} and {_place(bases[other])}.",
            where="--adapters",
            fix="name adapters of one model, or name that model: --model_id_or_path DIR",
        )
    return replace(bases[first], args=bases[first].args.changed(ckpt_dir=args.ckpt_dir), adapter=None, named=named)


def _place(chosen: ModelRef) -> str:
    """Which model is meant, in words."""
    return str(chosen.directory or chosen.args.model_id_or_path or chosen.args.model_type)


def _choose_adapter(args: BackendArguments, adapter: Path, more: Iterable[str]) -> ModelRef:
    """An adapter, with the base model that the options name, or else the one that the adapter's config names."""
    from dataclasses import replace

    values = read_args_file(adapter)
    base, given = args.model_id_or_path, args.ckpt_dir
    if base is None and args.model_type is None and given is None:
        named = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise UserError(
                "the adapter does not say which model it was trained on.",
                where=str(adapter / ADAPTER_CONFIG),
                fix="name it: --model_type NAME or --model_id_or_path DIR",
            )
        base = named
    filled = fill_from_file(args, values, (*MODEL_OPTIONS, *more))  # a run's adapter brings its template and system prompt
    chosen = choose(filled.changed(model_id_or_path=base), more)
    return replace(chosen, args=chosen.args.changed(ckpt_dir=str(adapter)), adapter=adapter, values=values or chosen.values)


def _base_of(adapter: Path, model_type: str | None) -> Located:
    """The base of an adapter that was just exported, as a Hugging Face folder."""
    manifest = read_manifest(adapter)
    args = ExportArguments(model_type=model_type or str(manifest.get("model_type")))
    folder = base_folder(manifest["base"], _config_of(adapter, manifest), args, convert_with_proof)
    return locate(args.model_type, str(folder))


def _config_of(adapter: Path, manifest: dict[str, Any]) -> Any:
    """The config of the model that an adapter of ours was trained on: it stands beside the run's checkpoint, or in its base."""
    places = [(adapter / link["directory"]).resolve().parent for link in older_links(manifest)] + [
        Path(manifest["base"]["path"])
    ]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        raise DataError(
            "the run that made this adapter is gone.", where=str(adapter), fix="name its base: --model_id_or_path DIR"
        )
    return load_config(found)


def _require_own_base(base: Located, adapter: Path) -> None:
    """Raise DataError for a base that is not the one that an adapter of ours was trained beside."""
    if not (adapter / MANIFEST).is_file():
        return
    record = read_manifest(adapter).get("base")
    head = read_json(adapter / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
    config = load_config(with_score_head(base.path, ScoreHead(1)) if head else base.path)
    if isinstance(record, dict) and base_digest(base.path, config) != record.get("digest"):
        raise DataError(
            "these are not the weights that the adapter was trained beside.",
            where=f"{adapter}; {base.path}",
            fix=f"name them: --model_id_or_path DIR; they were {record.get('origin')}",
        )


def _with_adapter(base: Located, adapter: Path) -> Located:
    """Base and adapter merged, in the cache; made once for each pair."""
    from dataclasses import replace

    from megaswift.weights.convert.lora import WEIGHTS, require_weights

    stats = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in sorted(base.path.glob("*.safetensors"))]
    require_weights(adapter)
    _require_own_base(base, adapter)
    digest = sha256_of(adapter / WEIGHTS)
    key = hashlib.sha256(repr((digest, (adapter / ADAPTER_CONFIG).read_bytes(), str(base.path.resolve()), stats)).encode())
    target = _made_once("merged", adapter, key.hexdigest(), "", lambda place: _merge(base, adapter, digest, place))
    return replace(base, path=target, origin=f"{base.origin} + {adapter.resolve()}")


def _merge(base: Located, adapter: Path, digest: str, target: Path) -> None:
    from megaswift.weights.convert.lora import Adapter, merge_adapter

    model = HFCheckpoint.open(base.path)
    opened = Adapter.open(adapter).stored_as(names_in_folder(model))

    def manifest(written: Any) -> None:
        write_manifest(
            written.path,
            {
                "kind": "huggingface",
                "model_type": base.model_type,
                "made_from": [],
                "source": {
                    "origin": base.origin,
                    "revision": base.revision,
                    "adapter": str(adapter),
                    "adapter_sha256": digest,
                },
                "versions": versions(),
                "config": read_config(written.path),
                "files": {name: vars(record) for name, record in written.files.items()},
                "hf_tensors": written.tensors,
            },
        )

    with contextlib.redirect_stdout(sys.stderr):
        say(f"merging {len(opened.pairs)} LoRA matrices of {adapter} into {base.origin}")
    merge_adapter(opened, model, target, manifest)


def exported(root: Path, model_type: str | None = None) -> tuple[Path, str]:
    """A verified Hugging Face folder of a Megatron directory's newest complete checkpoint, in the cache.

    Returns the folder and the checkpoint's name. A run that still goes on may remove a checkpoint while it is read, or
    while another process is waited for; the one after it is taken then.
    """
    refuse_unfinished(root)
    checkpoint = paths.find_checkpoint(root)
    try:
        return _export(root, checkpoint, model_type), checkpoint.name
    except (DataError, UserError):
        newer = paths.find_checkpoint(root)
        if newer == checkpoint:
            raise
        return _export(root, newer, model_type), newer.name


def _export(root: Path, checkpoint: Path, model_type: str | None) -> Path:
    def convert(target: Path) -> None:
        words: dict[str, Any] = {"model_type": model_type} if model_type else {}
        with contextlib.redirect_stdout(sys.stderr):  # stdout holds questions and answers
            convert_with_proof(
                ExportArguments(
                    ckpt_dir=str(root), to_hf=True, iteration=iteration_of(checkpoint), hf_output_dir=str(target), **words
                )
            )

    return _made_once("exports", root, sha256_of(checkpoint / MANIFEST), model_type or "model", convert)


def _made_once(kind: str, owner: Path, key: str, name: str, make: Callable[[Path], None]) -> Path:
    """A model folder in the cache: {kind}/{owner}-{its place}-{key}/{name}, made now if it is not there.

    Processes that want the same at once wait for the first. The newest few of each owner are kept.

    Args:
        owner: run or adapter that the folder is made from; others may have the same name in other places.
        key: SHA-256 of what it is made from.
    """
    owner = owner.resolve()
    group = cache_root() / kind / f"{owner.name}-{hashlib.sha256(os.fsencode(owner)).hexdigest()[:8]}"
    place = group.with_name(f"{group.name}-{key[:16]}")
    target = place / name
    _handed_out.add(place)
    if not _whole(target):
        with alone(group, f"waiting for another process, which makes a model of {owner}"):
            if not _whole(target):  # the process that was waited for may have made it
                shutil.rmtree(target, ignore_errors=True)
                make(target)
            _used(place)
            for old in _older(group):
                shutil.rmtree(old, ignore_errors=True)
    _used(place)
    return target


def _whole(folder: Path) -> bool:
    return folder.is_dir() and quick_check(folder) is None


def _used(place: Path) -> None:
    """Other processes remove what was not used for long first."""
    with contextlib.suppress(OSError):  # the cache may be read-only
        os.utime(place)


def _older(group: Path) -> list[Path]:
    """What else the same owner has in the cache, but for the newest few and what this process uses."""
    found = [path for path in group.parent.iterdir() if path.is_dir() and path.name.rpartition("-")[0] == group.name]
    return [path for path in sorted(found, key=lambda path: -path.stat().st_mtime)[KEPT:] if path not in _handed_out]


def _model_directory(args: BackendArguments) -> tuple[Path | None, bool]:
    """The local directory of the model (None for a model that is looked up by name), and whether it is Megatron's."""
    if args.ckpt_dir is None:
        if args.model_type is None and args.model_id_or_path is None:
            fix = "give --ckpt_dir DIR, or --model_type NAME, or --model_id_or_path DIR"
            raise UserError("no model is named.", where="command line", fix=fix)
        path = Path(args.model_id_or_path).expanduser() if args.model_id_or_path else None
        if path is None or not path.is_dir():
            return None, False
        return path, _is_megatron(path)
    if args.model_id_or_path is not None:
        raise UserError(
            "--ckpt_dir and --model_id_or_path both name a model.", where="command line", fix="leave one of them out"
        )
    path = Path(args.ckpt_dir).expanduser()
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "does not exist"
        fix = gguf_fix(path) or "give a run of swift sft, or a directory made by swift export"
        raise UserError(f"{path} {what}.", where="--ckpt_dir", fix=fix)
    if _is_megatron(path):
        return path, True
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} holds no config.json, so it is no Hugging Face model.",
            where="--ckpt_dir",
            fix=gguf_fix(path) or _nearby_models(path),
        )
    return path, False


def _is_megatron(path: Path) -> bool:
    """Whether a directory holds Megatron weights; one with safetensors is a Hugging Face model, whatever else lies in it."""
    return is_megatron_directory(path) and not any(path.glob("*.safetensors"))


def _nearby_models(path: Path) -> str:
    """What to do about a directory without a model: name those just below it."""
    below = sorted(path.glob("*-weights/hf/config.json"), key=lambda file: file.stat().st_mtime) or sorted(
        path.glob("*/config.json")
    )
    runs = sorted(file.parent for file in path.glob(f"*/{TRACKER}"))
    if runs:
        return f"--ckpt_dir {typed(runs[-1])}"
    if below:
        return f"--ckpt_dir {typed(below[-1].parent)}"
    return "give a run of swift sft, or a directory made by swift export"
