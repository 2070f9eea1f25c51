"""`swift export --to_megatron`: a Hugging Face model, or an old Megatron checkpoint, as Megatron weights of today."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.config.files import EXPORT_ARGS, write_args_file
from megaswift.config.options import ExportArguments
from megaswift.errors import UserError
from megaswift.export.common import (
    THREADS,
    check_tokenizer,
    report,
    report_carried,
    report_nonfinite,
    report_proof,
    report_rounded,
    require_free_name,
    require_text_alone,
    sign,
)
from megaswift.hub.locate import locate
from megaswift.models import parameters_of
from megaswift.models.family import is_tied
from megaswift.models.whole import require_language_model_only
from megaswift.proof.prove import prove, summary, write_page
from megaswift.run.problems import layout_problems, refuse
from megaswift.run.spec import Parallel
from megaswift.store import paths
from megaswift.store.files import start_reading
from megaswift.store.manifest import digest_files, versions, write_manifest
from megaswift.store.publish import publish, workspace
from megaswift.terminal import say, shown, typed
from megaswift.weights.carried import FIELD as CARRIED
from megaswift.weights.carried import Record, carried_names, nbytes, open_beside, read_back, write_beside
from megaswift.weights.hf.block_fp8 import FIELD, opened
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.folder import read_config, side_files
from megaswift.weights.hf.new_tokens import NewTokens, listed_tokens, with_new_tokens
from megaswift.weights.hf.read import HFCheckpoint

if TYPE_CHECKING:
    from megaswift.store.files import FileRecord
    from megaswift.store.publish import Workspace
    from megaswift.weights.classic import Classic
    from megaswift.weights.convert import Conversion, Precisions


@dataclass(frozen=True)
class _Source:
    """What is converted.

    Args:
        directory: of the weights.
        model_dir: where config.json and tokenizer are.
        config_overrides: fields of config.json that the weights ask to change.
        had, precisions: of every Hugging Face tensor in the source, and as it is converted.
        new_tokens: what --new_special_tokens added to them, or None.
        convert: writes the weights into a directory.
        prove: config, directory and conversion -> the proof.
        note: what a user must know of how the weights are read, or None.
        carried: the folder and names of the tensors that are carried along, or None.
    """

    model_type: str
    label: str
    config: Any
    directory: Path
    model_dir: Path
    config_overrides: dict[str, Any]
    had: Precisions
    precisions: Precisions
    nbytes: int
    identity: list[Any]
    origin: dict[str, Any]
    convert: Callable[[Path, Workspace], Conversion]
    prove: Callable[[Path, Conversion], dict[str, Any]]
    new_tokens: NewTokens | None = None
    note: str | None = None
    carried: tuple[HFCheckpoint, list[str]] | None = None


def to_megatron(args: ExportArguments) -> Path:
    """Hugging Face folder -> {model_type}-tp{tp}-pp{pp}, with config, tokenizer and export_args.json beside the weights."""
    if not args.model_type and not args.model_id_or_path:
        raise UserError("no model is named.", where="swift export", fix="give --model_type NAME or --model_id_or_path DIR")
    located = locate(args.model_type, args.model_id_or_path, args.model_revision, args.allow_pickle)
    source = opened(HFCheckpoint.open(located.path, args.allow_pickle))
    files = sorted({source.file_of(name) for name in source.names})
    start_reading(files)
    from megaswift.weights.convert import hf_to_megatron, precisions_of_folder, verify_round_trip
    from megaswift.weights.convert.new_rows import GrownFolder, require_old_rows
    from megaswift.weights.convert.precision import chosen
    from megaswift.weights.torch_dist.reader import Reader

    args, added, model_dir = _with_new_tokens(args, located.path)
    config = load_config(model_dir, from_fp8=True)
    require_language_model_only(config, args.language_model_only, str(located.path / "config.json"))
    carried = carried_names(source, config)
    had = precisions_of_folder(source, config)
    precisions = chosen(had, None if args.dtype == "AUTO" else args.dtype, str(located.path))
    grown = GrownFolder(source, added.rows_before, added.rows_after) if added else source

    def proof(release: Path, done: Conversion) -> dict[str, Any]:
        written = Reader(release)
        equal = verify_round_trip(written, config, done.tensors, precisions)
        if added:
            require_old_rows(written, source, config, precisions, added.rows_before)
        if done.nonfinite:  # no logit of such a model means anything
            return {"round_trip_tensors": equal}
        return prove(config, grown, written, precisions, model_dir, equal)

    stats = _stats({file.name: file for file in files})
    return _write(
        args,
        _Source(
            model_type=located.model_type,
            label=f"{located.model_type} ({located.origin})",
            config=config,
            directory=located.path,
            model_dir=model_dir,
            config_overrides={FIELD: None} if source.note else {},
            had=had,
            precisions=precisions,
            nbytes=_bytes(config, precisions) + nbytes(source, carried),
            identity=[located.origin, located.revision, stats],
            origin={"origin": located.origin, "revision": located.revision, "files": {name: size for name, size, _ in stats}},
            convert=lambda release, work: hf_to_megatron(
                grown, config, release, precisions, THREADS, work, args.allow_nonfinite
            ),
            prove=proof,
            new_tokens=added,
            note=source.note,
            carried=(source, carried) if carried else None,
        ),
    )


def classic_to_megatron(args: ExportArguments) -> Path:
    """A checkpoint of mp_rank_XX/model_optim_rng.pt files -> the layout that training starts from.

    Values are compared bit for bit; there is no Hugging Face model to compare logits with (--to_hf makes and proves one).
    """
    root = Path(str(args.ckpt_dir)).absolute()
    found = _classic_in(root, args.iteration)
    from megaswift.export.old import open_classic
    from megaswift.weights.convert import megatron_to_megatron, precisions_of_checkpoint, verify_round_trip
    from megaswift.weights.convert.new_rows import GrownReader, require_old_rows
    from megaswift.weights.convert.precision import chosen
    from megaswift.weights.torch_dist.reader import Reader

    old = open_classic(found, root, args)
    require_text_alone(old.config, root)
    had = precisions_of_checkpoint(old.reader, parameters_of(old.config))
    asked = None if args.dtype == "AUTO" or "dtype" not in args.explicit() else args.dtype
    precisions = chosen(had, asked, str(found.directory))
    options, added, model_dir = _with_new_tokens(old.args, old.model_dir)
    reader: Any = old.reader
    if added:
        reader = GrownReader(old.reader, old.config, added.rows_before, added.rows_after)
        old.config.vocab_size = added.rows_after
    stats = _stats({str(file.relative_to(found.directory)): file for _, file in sorted(found.files.items())})
    model_type = str(old.args.model_type)

    def proof(release: Path, done: Conversion) -> dict[str, Any]:
        written = Reader(release)
        if added:
            require_old_rows(written, old.reader, old.config, precisions, added.rows_before)
        return {"round_trip_tensors": verify_round_trip(written, old.config, done.tensors, precisions)}

    return _write(
        options,
        _Source(
            model_type=model_type,
            label=f"{shown(found.directory)} (classic, tp {found.tp}, pp {found.pp})",
            config=old.config,
            directory=root,
            model_dir=model_dir,
            config_overrides=old.overrides,
            had=had,
            precisions=precisions,
            nbytes=sum(size for _, size, _ in stats),
            identity=[str(found.directory), stats],
            origin={"origin": str(found.directory), "revision": None, "files": {name: size for name, size, _ in stats}},
            convert=lambda release, work: megatron_to_megatron(
                reader, old.config, release, precisions, THREADS, work, args.allow_nonfinite
            ),
            prove=proof,
            new_tokens=added,
        ),
    )


def _classic_in(root: Path, iteration: int | None) -> Classic:
    """The old checkpoint in a directory. Raises UserError where there is none."""
    from megaswift.weights import classic

    found = classic.find(root, iteration)
    if found is None:
        raise UserError(
            "--to_megatron with --ckpt_dir reads old checkpoints (mp_rank_XX/model_optim_rng.pt), and there is none here.",
            where=str(root),
            fix="for a Hugging Face model give --model_type NAME or --model_id_or_path DIR",
        )
    return found


def _stats(files: dict[str, Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change (ns) of each file: what tells that a conversion begun before had the same source."""
    return [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()]


def _with_new_tokens(args: ExportArguments, model_dir: Path) -> tuple[ExportArguments, NewTokens | None, Path]:
    """The options with the tokens by name, what --new_special_tokens adds, and where config.json and tokenizer are with it."""
    args = args.changed(new_special_tokens=listed_tokens(args.new_special_tokens))
    added = with_new_tokens(model_dir, args.new_special_tokens)
    return args, added, added.directory if added else model_dir


def _layout_of(args: ExportArguments) -> Parallel:
    """The layout that is asked for, on as many processes as it takes."""
    parallel = Parallel(tp=args.tp, pp=args.pp, ep=args.ep, etp=args.etp)
    return replace(parallel, world_size=parallel.fewest)


def _write(args: ExportArguments, source: _Source) -> Path:
    """Convert, prove, and publish the whole directory."""
    from megaswift.weights.convert.precision import rounded

    refuse(layout_problems(source.config, _layout_of(args)))
    target = Path(args.megatron_output_dir or f"{source.model_type}-tp{args.tp}-pp{args.pp}").absolute()
    require_free_name(target, args.overwrite, source.directory, source.model_dir)
    check_tokenizer(source.model_dir)
    rows = source.new_tokens and [source.new_tokens.rows_before, source.new_tokens.rows_after]
    plan = json.dumps(["megatron", source.precisions.record(), source.identity, *([rows] if rows else [])])
    replaced = target.exists()
    with workspace(target, source.nbytes + (64 << 20), plan=plan, resume=args.resume) as work:
        release = work.path / paths.RELEASE
        release.mkdir(exist_ok=True)
        say(f"{source.label} -> Megatron weights, {source.precisions}")
        if source.note:
            say(f"  [yellow]{source.note}[/yellow]")
        if source.new_tokens:
            say(f"  {source.new_tokens.note()}")
        begin = time.perf_counter()
        done = source.convert(release, work)
        seconds = time.perf_counter() - begin
        report(done.parameters, len(done.tensors), sum(digest.size for digest in done.files.values()), seconds, work.resumed)
        files, record = write_beside(*source.carried, release) if source.carried else ({}, {})
        report_carried(record, source.config)
        report_nonfinite(done.nonfinite)
        lost = rounded(source.had, source.precisions, done.tensors)
        report_rounded(lost, len(done.tensors))
        work.drop_records()
        proof = source.prove(release, done) | {"rounded": lost} if args.verify else None
        if proof is not None and source.carried is not None:
            proof["carried_tensors"] = read_back(open_beside(release), record, release)
            read_back(source.carried[0], record, source.directory)
        _finish(work.path, args, source, done, lost, proof, files, record)
        publish(work.path, target, taken="replace" if replaced else "refuse")
    report_proof(proof)
    if rows and proof is not None:
        tables = "embedding" if is_tied(source.config) else "embedding and output layer"
        say(f"  {tables}: the {rows[0]:,} old rows are those of the source, bit for bit")
    say(f"[bold]{shown(target)}[/bold] is ready. Next: swift sft --resume_from_checkpoint {typed(target)} --dataset NAME")
    return target


def _finish(
    root: Path,
    args: ExportArguments,
    source: _Source,
    done: Conversion,
    lost: dict[str, str],
    proof: dict[str, Any] | None,
    carried_files: dict[str, FileRecord],
    carried: Record,
) -> None:
    """Everything beside the weights, and last the manifest."""
    release = root / paths.RELEASE
    for file in side_files(source.model_dir):
        shutil.copyfile(file, root / file.name)
    if source.config_overrides:
        values = read_config(root) | source.config_overrides
        (root / "config.json").write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    precisions = source.precisions.record()
    extra = {"model_type": source.model_type, "dtype": precisions["dtype"]}
    write_args_file(root, args, extra, name=EXPORT_ARGS)
    (root / paths.TRACKER).write_text(paths.RELEASE, encoding="utf-8")
    verified: dict[str, Any] = {}
    if proof is not None:
        verified = summary(proof)
    if proof is not None and "logits" in proof:
        facts = [
            ("source", source.label),
            ("precision", str(source.precisions)),
            ("parameters", f"{done.parameters:,}"),
            ("tensors", str(len(done.tensors))),
        ]
        write_page(root, f"{source.model_type}: Hugging Face to Megatron", facts, proof)
    content = {
        "kind": "megatron",
        "iteration": 0,
        "optimizer": False,
        "model_type": source.model_type,
        "source": source.origin,
        "made_from": [],
        "layout": {"tp": args.tp, "pp": args.pp},
        **precisions,
        **({"rounded": lost} if lost else {}),
        **({"from_fp8": source.note} if source.note else {}),
        "versions": versions(),
        "verified": verified,
        "config": read_config(root),
        "beside": digest_files(root),
        "files": {name: vars(digest) for name, digest in done.files.items()}
        | {name: {"size": one.size, "sha256": one.sha256} for name, one in carried_files.items()},
        "hf_tensors": done.tensors,
        **({CARRIED: {"tensors": carried}} if carried else {}),
    }
    if (added := source.new_tokens) is not None:
        content["new_tokens"] = {"tokens": added.tokens, "rows_before": added.rows_before, "rows": added.rows_after}
        verified |= {"old_rows_equal": added.rows_before} if proof is not None else {}
    write_manifest(release, content)
    sign(release, args.sign)


def _bytes(config: Any, precisions: Precisions) -> int:
    """Size of a model's Megatron tensors."""
    parameters = parameters_of(config)
    stored = precisions.stored(parameters)
    return sum(parameter.size * stored[parameter.key].itemsize for parameter in parameters)
