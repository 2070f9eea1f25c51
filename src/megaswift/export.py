"""`swift export`: a Hugging Face model to Megatron weights, and Megatron weights back to a Hugging Face model.

    swift export --model_type qwen2-7b-instruct --to_megatron true --tp 2 --dtype bf16
    swift export --ckpt_dir qwen2-7b-instruct-tp2-pp1 --to_hf true

Runs in one process, without a GPU. The result appears under its name only when it is complete and proven.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from megaswift.checkpoint import classic, layout
from megaswift.errors import DataError, UserError
from megaswift.terminal import say

if TYPE_CHECKING:
    import torch

    from megaswift.convert.model import MegatronReader
    from megaswift.hf.write import WriteResult

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
THREADS = 2  # files written at the same time


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
    if args.sign:
        from megaswift.checkpoint.sign import load_private_key

        load_private_key(Path(args.sign))  # a bad key is found before hours of work
    if args.to_hf:
        return to_hf(args)
    if args.ckpt_dir:
        from megaswift.modernize import modernize

        return modernize(args)
    return to_megatron(args)


def to_megatron(args: ExportArguments) -> Path:
    """Hugging Face folder -> {model_type}-tp{tp}-pp{pp}, with config, tokenizer and export_args.json beside the weights."""
    if not args.model_type and not args.model_id_or_path:
        raise UserError("no model is named.", where="swift export", fix="give --model_type NAME or --model_id_or_path DIR")
    begin = time.perf_counter()
    from megaswift.hf.locate import locate

    located = locate(args.model_type, args.model_id_or_path, args.model_revision)
    from megaswift.checkpoint.torch_dist import Reader
    from megaswift.convert import DTYPES, hf_to_megatron, verify_round_trip
    from megaswift.hf.config import load_config
    from megaswift.hf.publish import publish, workspace
    from megaswift.hf.read import HFCheckpoint
    from megaswift.plan import check_layout
    from megaswift.release import finish_release

    config = load_config(located.path)
    check_layout(config, args.tp, args.pp)
    source = HFCheckpoint.open(located.path)
    dtype = _main_dtype(source) if args.dtype == "AUTO" else args.dtype
    target = Path(args.megatron_output_dir or f"{located.model_type}-tp{args.tp}-pp{args.pp}").absolute()
    require_free_name(target, args.overwrite)
    needed = sum(source.entry(name).nbytes * DTYPES[dtype].itemsize // source.dtype(name).itemsize for name in source.names)
    plan = json.dumps(["megatron", dtype, located.origin, located.revision, _fingerprint(source)])
    with replacing(target) as fresh, workspace(fresh, needed + (64 << 20), plan=plan, resume=args.resume) as work:
        release = work.path / layout.RELEASE
        release.mkdir(exist_ok=True)
        say(f"{located.model_type} ({located.origin}) -> Megatron weights, {dtype}")
        done = hf_to_megatron(source, config, release, dtype, THREADS, work)
        seconds = time.perf_counter() - begin
        work.drop_records()
        proof = None
        if args.verify:
            from megaswift.proof.prove import prove

            equal = verify_round_trip(Reader(release), config, done.tensors)
            proof = prove(config, source, Reader(release), DTYPES[dtype], located.path, equal)
        origin = {"origin": located.origin, "revision": located.revision, "files": {file: size for file, size, _ in _fingerprint(source)}}
        finish_release(work.path, args, located.model_type, _template(located.model_type), source.side_files(), done, proof, {"source": origin, "made_from": []})
        publish(work.path, fresh)
    _report(done.parameters, len(done.tensors), sum(digest.size for digest in done.files.values()), seconds, work.resumed, proof)
    say(f"[bold]{shown(target)}[/bold] is ready. Next: swift sft --resume_from_checkpoint {shown(target)} --dataset NAME")
    return target


def _fingerprint(source: Any) -> list[tuple[str, int, int]]:
    """Name, size and time of every weight file."""
    files = sorted({source.file_of(name) for name in source.names})
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _report(parameters: int, tensors: int, size: int, seconds: float, resumed: list[str], proof: dict[str, Any] | None) -> None:
    say(f"  {parameters:,} parameters in {tensors} tensors, {size / 1e9:.2f} GB, {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s)")
    if resumed:
        say(f"  resumed: {len(resumed)} files of an interrupted conversion were complete and are kept")
    print_result(proof)


def print_result(proof: dict[str, Any] | None) -> None:
    """The proof's table, or one line that says there is none."""
    if proof is None:
        say("  [yellow]not verified (--verify false)[/yellow]")
        return
    from megaswift.proof.page import print_proof

    print_proof(proof)


@dataclass(frozen=True)
class Weights:
    """Megatron weights to make a Hugging Face model from."""

    reader: MegatronReader
    directory: Path
    config: Any
    manifest: dict[str, Any]
    overrides: dict[str, Any]  # of config.json
    label: str


def to_hf(args: ExportArguments) -> Path:
    """A converted or trained Megatron directory -> {ckpt_dir}/{model_type}-hf."""
    if not args.ckpt_dir:
        raise UserError("--to_hf needs a Megatron directory.", where="--ckpt_dir", fix="give --ckpt_dir DIR: one made by --to_megatron, or a run of swift sft")
    begin = time.perf_counter()
    root = Path(args.ckpt_dir).absolute()
    weights = _old_weights(root, args) or _own_weights(root, args)
    args = fill_from_file(args, read_args_file(root), (*MODEL_OPTIONS, *LAYOUT_OPTIONS))
    if not args.model_type:
        raise UserError("the directory does not say its model_type.", where=str(root), fix="give --model_type NAME")
    target = Path(args.hf_output_dir or root / f"{args.model_type}-hf").absolute()
    require_free_name(target, args.overwrite)
    from megaswift.convert import DTYPE_NAMES, DTYPES, planned_hf_tensors
    from megaswift.hf.folder import read_config, side_files
    from megaswift.hf.write import dtype_override, write_checkpoint

    stored = weights.reader.dtype("decoder.final_layernorm.weight")
    dtype: torch.dtype = DTYPES[args.dtype] if "dtype" in args.explicit() and args.dtype != "AUTO" else stored
    say(f"{weights.label} -> Hugging Face model, {DTYPE_NAMES[dtype]}")
    model_dir = Path(weights.config.source_directory)
    values = read_config(model_dir)
    named = str(values.get("dtype", values.get("torch_dtype"))).removeprefix("torch.")
    overrides = dict(weights.overrides) | (dtype_override(values, dtype) if named != str(dtype).removeprefix("torch.") else {})
    proofs: list[dict[str, Any]] = []
    with replacing(target) as fresh:
        result = write_checkpoint(
            fresh,
            planned_hf_tensors(weights.reader, weights.config, dtype),
            side_files(model_dir),
            overrides or None,
            parse_size(args.max_shard_size),
            THREADS,
            extra_files=_args_bytes(root),
            before_publish=lambda written: proofs.extend(_finish_hf(written, weights, dtype, args)),
            plan=json.dumps(["huggingface", str(dtype), str(weights.directory), _identity(weights)]),
            resume=args.resume,
        )
    seconds = time.perf_counter() - begin
    parameters = sum(_count(shape) for shape in _shapes(weights.config))
    say("  re-opened and audited: names, shapes, dtypes, number of files")
    _report(parameters, len(result.tensors), result.bytes, result.written_seconds or seconds, result.resumed, proofs[0] if proofs else None)
    equal = _equal_to_source(result.tensors, weights.manifest, dtype)
    if equal is not None:
        say(f"  {equal}")
    hint = f"--ckpt_dir {shown(target)}" if (root / SFT_ARGS).exists() else f"--model_type {args.model_type} --model_id_or_path {shown(target)}"
    say(f"[bold]{shown(target)}[/bold] is ready. Next: swift infer {hint}")
    return target


def _own_weights(root: Path, args: ExportArguments) -> Weights:
    """Weights in a directory that export or sft made."""
    checkpoint = layout.find_checkpoint(root, args.iteration)
    from megaswift.checkpoint.manifest import check_config, check_hashes, read_manifest
    from megaswift.checkpoint.torch_dist import Reader
    from megaswift.hf.config import load_config

    manifest = read_manifest(checkpoint)
    config = load_config(root)
    config.source_directory = str(root)
    if args.verify:
        check_config(root, manifest)
        from megaswift.proof.chain import require_whole

        require_whole(checkpoint, config)
        check_hashes(checkpoint)
    return Weights(Reader(checkpoint), checkpoint, config, manifest, {}, shown(checkpoint))


def _old_weights(root: Path, args: ExportArguments) -> Weights | None:
    """Weights in the classic layout (mp_rank_XX/model_optim_rng.pt), or None where the directory is another kind."""
    found = classic.find(root, args.iteration)
    if found is None:
        return None
    from megaswift.modernize import open_classic

    reader, config, overrides = open_classic(found, root, args)
    return Weights(reader, found.directory, config, {}, overrides, f"{shown(found.directory)} (classic, tp {found.tp}, pp {found.pp})")
