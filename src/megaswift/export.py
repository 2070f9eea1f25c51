"""`swift export`: a Hugging Face model to Megatron weights, and Megatron weights back to a Hugging Face model.

    swift export --model_type qwen2-7b-instruct --to_megatron true --tp 2 --dtype bf16
    swift export --ckpt_dir qwen2-7b-instruct-tp2-pp1 --to_hf true

Runs in one process, without a GPU. The result appears under its name only when it is complete and verified.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.args_file import (
    EXPORT_ARGS,
    LAYOUT_OPTIONS,
    MODEL_OPTIONS,
    SFT_ARGS,
    args_file_in,
    fill_from_file,
    read_args_file,
    write_args_file,
)
from megaswift.arguments import ExportArguments, parse
from megaswift.checkpoint import layout
from megaswift.errors import DataError, UserError
from megaswift.terminal import say

if TYPE_CHECKING:
    from megaswift.hf.write import WriteResult

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export_main(args: ExportArguments | list[str]) -> Path:
    """Convert, and return the directory that was made.

    Args:
        args: options, or the words of the command line.

    Raises UserError or DataError; then nothing was made.
    """
    args = parse(ExportArguments, args) if isinstance(args, list) else args
    if args.to_megatron == args.to_hf:
        raise UserError(
            "exactly one of --to_megatron true and --to_hf true is needed.",
            where="swift export",
            fix="--to_megatron true makes Megatron weights, --to_hf true makes a Hugging Face model",
        )
    return to_megatron(args) if args.to_megatron else to_hf(args)


def to_megatron(args: ExportArguments) -> Path:
    """Hugging Face folder -> {model_type}-tp{tp}-pp{pp}, with config, tokenizer and export_args.json beside the weights."""
    if args.ckpt_dir:
        raise UserError("--ckpt_dir belongs to --to_hf.", where="--ckpt_dir", fix="name the model with --model_type or --model_id_or_path")
    if not args.model_type and not args.model_id_or_path:
        raise UserError("no model is named.", where="swift export", fix="give --model_type NAME or --model_id_or_path DIR")
    begin = time.perf_counter()
    from megaswift.hf.locate import locate

    located = locate(args.model_type, args.model_id_or_path, args.model_revision)
    from megaswift.checkpoint.torch_dist import Reader
    from megaswift.convert import DTYPE_NAMES, hf_to_megatron, verify_round_trip
    from megaswift.hf.config import load_config
    from megaswift.hf.read import HFCheckpoint
    from megaswift.plan import check_layout

    config = load_config(located.path)
    check_layout(config, args.tp, args.pp)
    source = HFCheckpoint.open(located.path)
    dtype = _main_dtype(source) if args.dtype == "AUTO" else args.dtype
    target = Path(args.megatron_output_dir or f"{located.model_type}-tp{args.tp}-pp{args.pp}").absolute()
    _require_free_name(target, args.overwrite)
    with _published(target, source.total_bytes * 4 // 2) as temporary:
        release = temporary / layout.RELEASE
        release.mkdir()
        say(f"{located.model_type} ({located.origin}) -> Megatron weights, {dtype}")
        done = hf_to_megatron(source, config, release, dtype)
        checked = verify_round_trip(Reader(release), config, done.tensors) if args.verify else 0
        for file in source.side_files():
            shutil.copyfile(file, temporary / file.name)
        extra = {"model_type": located.model_type, "dtype": dtype, "template_type": _template(located.model_type)}
        write_args_file(temporary, args, extra, name=EXPORT_ARGS)
        _write_release_manifest(release, done, located, args, checked)
        (temporary / layout.TRACKER).write_text(layout.RELEASE, encoding="utf-8")
    seconds = time.perf_counter() - begin
    size = sum(digest.size for digest in done.files.values())
    say(f"  {done.parameters:,} parameters in {len(done.tensors)} tensors, {size / 1e9:.2f} GB, {seconds:.1f} s")
    if args.verify:
        say(f"  verified: all {checked} tensors read back from the Megatron files have the SHA-256 of their source")
    say(f"[bold]{_shown(target)}[/bold] is ready. Next: swift sft --resume_from_checkpoint {_shown(target)} --dataset NAME")
    return target


def _write_release_manifest(release: Path, done: Any, located: Any, args: ExportArguments, checked: int) -> None:
    from megaswift.checkpoint.manifest import write_manifest

    write_manifest(
        release,
        {
            "kind": "megatron",
            "iteration": 0,
            "optimizer": False,
            "model_type": located.model_type,
            "source": {"origin": located.origin, "revision": located.revision},
            "layout": {"tp": args.tp, "pp": args.pp},
            "dtype": done.dtype,
            "versions": versions(),
            "files": {name: vars(digest) for name, digest in done.files.items()},
            "hf_tensors": done.tensors,
            "verified": {"round_trip_tensors": checked},
        },
    )


def to_hf(args: ExportArguments) -> Path:
    """A converted or trained Megatron directory -> {ckpt_dir}/{model_type}-hf."""
    if not args.ckpt_dir:
        raise UserError("--to_hf needs a Megatron directory.", where="--ckpt_dir", fix="give --ckpt_dir DIR: one made by --to_megatron, or a run of swift sft")
    begin = time.perf_counter()
    root = Path(args.ckpt_dir).absolute()
    checkpoint = layout.find_checkpoint(root, args.iteration)
    args = fill_from_file(args, read_args_file(root), (*MODEL_OPTIONS, *LAYOUT_OPTIONS))
    if not args.model_type:
        raise UserError("the directory does not say its model_type.", where=str(root), fix="give --model_type NAME")
    target = Path(args.hf_output_dir or root / f"{args.model_type}-hf").absolute()
    _require_free_name(target, args.overwrite)
    import torch

    from megaswift.checkpoint.manifest import check_hashes, read_manifest
    from megaswift.checkpoint.torch_dist import Reader
    from megaswift.convert import DTYPE_NAMES, DTYPES, planned_hf_tensors
    from megaswift.hf.config import load_config
    from megaswift.hf.folder import read_config, side_files
    from megaswift.hf.write import dtype_override, write_checkpoint

    config = load_config(root)
    if args.verify:
        check_hashes(checkpoint)
    reader = Reader(checkpoint)
    stored = reader.dtype("decoder.final_layernorm.weight")
    dtype: torch.dtype = DTYPES[args.dtype] if "dtype" in args.explicit() and args.dtype != "AUTO" else stored
    say(f"{_shown(checkpoint)} -> Hugging Face model, {DTYPE_NAMES[dtype]}")
    values = read_config(root)
    named = str(values.get("dtype", values.get("torch_dtype"))).removeprefix("torch.")
    overrides = dtype_override(values, dtype) if named != str(dtype).removeprefix("torch.") else None
    source_manifest = read_manifest(checkpoint)
    with _replacing(target) as fresh:
        result = write_checkpoint(
            fresh,
            planned_hf_tensors(reader, config, dtype),
            side_files(root),
            overrides,
            parse_size(args.max_shard_size),
            extra_files=_args_bytes(root),
            before_publish=lambda written: _write_hf_manifest(written, checkpoint, source_manifest, args),
        )
    equal = _equal_to_source(result.tensors, source_manifest)
    seconds = time.perf_counter() - begin
    say(f"  {len(result.tensors)} tensors, {result.bytes / 1e9:.2f} GB, {seconds:.1f} s; re-opened and audited: names, shapes, dtypes")
    if equal is not None:
        say(f"  {equal}")
    hint = f"--ckpt_dir {_shown(target)}" if (root / SFT_ARGS).exists() else f"--model_type {args.model_type} --model_id_or_path {_shown(target)}"
    say(f"[bold]{_shown(target)}[/bold] is ready. Next: swift infer {hint}")
    return target


def _write_hf_manifest(written: WriteResult, checkpoint: Path, source: dict[str, Any], args: ExportArguments) -> None:
    from megaswift.checkpoint.layout import MANIFEST
    from megaswift.checkpoint.manifest import sha256_of, write_manifest

    write_manifest(
        written.path,
        {
            "kind": "huggingface",
            "model_type": args.model_type,
            "made_from": {"directory": checkpoint.name, "iteration": source.get("iteration"), "manifest_sha256": sha256_of(checkpoint / MANIFEST)},
            "versions": versions(),
            "files": {name: {"size": record.size, "sha256": record.sha256} for name, record in written.files.items()},
            "hf_tensors": written.tensors,
        },
    )


def _equal_to_source(tensors: dict[str, str], source_manifest: dict[str, Any]) -> str | None:
    """For weights that were only converted: whether every tensor came back as it was in the original model."""
    original = source_manifest.get("hf_tensors")
    if not original:
        return None
    different = sorted(name for name, value in tensors.items() if original.get(name) != value)
    if not different:
        return f"verified: all {len(tensors)} tensors have the SHA-256 of the original model's"
    return f"{len(different)} tensors differ from the original model's, as they must after a change of dtype"


def _args_bytes(root: Path) -> dict[str, bytes]:
    """sft_args.json of a run, with sft_type full, so that the model is found by --ckpt_dir alone."""
    path = args_file_in(root)
    if path is None or path.name != SFT_ARGS:
        return {}
    values = read_args_file(root) | {"sft_type": "full"}
    return {SFT_ARGS: (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode()}


def _main_dtype(source: Any) -> str:
    """The precision that most of a folder's bytes have."""
    from megaswift.convert import DTYPE_NAMES

    totals: dict[Any, int] = {}
    for name in source.names:
        totals[source.dtype(name)] = totals.get(source.dtype(name), 0) + source.entry(name).nbytes
    main = max(totals, key=lambda dtype: totals[dtype])
    if main not in DTYPE_NAMES:
        raise UserError(f"the weights are {main}, which is not a training precision.", where=str(source.path), fix="give --dtype bf16, fp16 or fp32")
    return DTYPE_NAMES[main]


def _template(model_type: str) -> str:
    from megaswift.families.model_types import MODEL_TYPES

    return MODEL_TYPES[model_type].template if model_type in MODEL_TYPES else "AUTO"


def parse_size(text: str) -> int:
    """Bytes of a size like 5GB, 500MB or 2GiB."""
    import re

    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    if not match or match.group(2).upper() not in _UNITS or float(match.group(1)) <= 0:
        raise UserError(f"--max_shard_size {text!r} is no size.", where="--max_shard_size", fix="use for example 5GB or 500MB")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def versions() -> dict[str, str]:
    """Versions of what made a file."""
    from importlib.metadata import version

    return {name: version(name) for name in ("megaswift", "torch", "megatron-core", "transformers", "safetensors")}


def _require_free_name(target: Path, overwrite: bool) -> None:
    """Raise UserError for a name that is taken, unless it may be replaced and is something that this command made."""
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UserError("the output directory exists already.", where=str(target), fix="use --overwrite true to replace it, or name another one")
    known = (layout.TRACKER, layout.MANIFEST, EXPORT_ARGS)
    if not target.is_dir() or (any(target.iterdir()) and not any((target / name).exists() for name in known)):
        raise UserError("this was not made by swift export, so it is not replaced.", where=str(target), fix="remove it yourself, or name another one")


@contextlib.contextmanager
def _published(target: Path, needed: int) -> Iterator[Path]:
    """A temporary directory that becomes `target` at the end, and is removed if anything fails."""
    from megaswift.checkpoint.manifest import sync_directory
    from megaswift.checkpoint.save import require_space

    with _replacing(target) as fresh:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the output directory cannot be made: {error.strerror}.", where=str(target.parent)) from error
        require_space(target.parent, needed, "the conversion")
        temporary = fresh.with_name(f".{fresh.name}.tmp-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            yield temporary
            sync_directory(temporary)
            temporary.rename(fresh)
            sync_directory(target.parent)
        except OSError as error:
            raise DataError(f"the conversion could not be written: {error}", where=str(target), fix="free space or check the disk") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """The name to write under: `target`, or a fresh one beside it that takes its place only once it is complete."""
    if not target.exists():
        yield target
        return
    fresh = target.with_name(f"{target.name}.new-{secrets.token_hex(4)}")
    yield fresh
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
