"""`swift export --to_hf`: converted, trained or old Megatron weights as a Hugging Face model."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.config.files import LAYOUT_OPTIONS, MODEL_OPTIONS, SFT_ARGS, args_file_in, fill_from_file, read_args_file
from megaswift.config.options import ExportArguments
from megaswift.config.parse import size_of
from megaswift.errors import DataError, UserError
from megaswift.export.adapter import adapter_to_hf
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
from megaswift.models.parameters import hf_shapes
from megaswift.models.whole import TEXT_CONFIG, require_language_model_only, whole_of
from megaswift.proof.chain import require_whole
from megaswift.proof.prove import PAGE, prove, summary, write_page
from megaswift.store import paths
from megaswift.store.files import start_reading
from megaswift.store.manifest import MANIFEST, ancestry, read_manifest, sha256_of, versions, write_manifest
from megaswift.store.publish import refuse_unfinished
from megaswift.terminal import say, shown, typed
from megaswift.weights.carried import FIELD as CARRIED
from megaswift.weights.carried import Record, find_carried, planned, read_back, require_same, told_of
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.folder import check_config, read_config, side_files
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.hf.write import dtype_override, write_checkpoint

if TYPE_CHECKING:
    import torch

    from megaswift.weights.convert import Precisions
    from megaswift.weights.convert.model import MegatronReader
    from megaswift.weights.hf.write import WriteResult


@dataclass(frozen=True)
class _Weights:
    """Megatron weights, and what goes with them.

    Args:
        directory: the checkpoint.
        model_dir: where config.json and tokenizer are.
        manifest: the checkpoint's; empty for old ones.
        overrides: fields of config.json that the weights ask to change.
        args: the options, those of the directory filled in.
        carried: where the tensors lie that are carried along, and what is recorded of them; None where there are none.
    """

    reader: MegatronReader
    directory: Path
    config: Any
    model_dir: Path
    manifest: dict[str, Any]
    overrides: dict[str, Any]
    args: ExportArguments
    label: str
    carried: tuple[HFCheckpoint, Record] | None = None

    @property
    def record(self) -> Record:
        """Digest, dtype and shape of the tensors that are carried along."""
        return self.carried[1] if self.carried is not None else {}


def to_hf(args: ExportArguments) -> Path:
    """A Megatron directory -> {ckpt_dir}/{model_type}-hf, and what to do next."""
    target, asks_by = convert_with_proof(args)
    say(f"[bold]{shown(target)}[/bold] is ready. Next: swift infer {asks_by}")
    return target


def convert_with_proof(args: ExportArguments) -> tuple[Path, str]:
    """Convert with proof; the new directory, and the options by which `swift infer` finds it."""
    if not args.ckpt_dir:
        raise UserError(
            "--to_hf needs a Megatron directory.",
            where="--ckpt_dir",
            fix="give --ckpt_dir DIR: one made by --to_megatron, or a run of swift sft",
        )
    root = Path(args.ckpt_dir).absolute()
    refuse_unfinished(root)
    checkpoint = _adapter_checkpoint(root, args)
    if checkpoint is not None:
        return adapter_to_hf(root, checkpoint, _filled(root, args), convert_with_proof)
    if args.merge_lora:
        raise UserError("there is no adapter to merge here.", where=str(root), fix="leave --merge_lora out")
    weights = _old_weights(root, args) or _own_weights(root, args)
    args = weights.args
    # What was meant by the weights they say themselves; for a text model the option would mean nothing.
    require_language_model_only(weights.config, args.language_model_only or whole_of(weights.config) is not None, str(root))
    target = Path(args.hf_output_dir or root / f"{args.model_type}-hf").absolute()
    require_free_name(target, args.overwrite, root, weights.model_dir)
    if args.verify and weights.manifest:
        _require_untouched(weights, root)
    check_tokenizer(weights.model_dir)
    form = _form(weights)
    say(f"{weights.label} -> Hugging Face model, {form.precisions}")
    result, proof = _write(weights, form, target, root)
    report_carried(weights.record, weights.config)
    report_proof(proof)
    equal = _equal_to_source(_digests(result.tensors, target, weights.config), weights.manifest, form, weights.record)
    if equal:
        say(f"  {equal}")
    if (root / SFT_ARGS).exists():
        return target, f"--ckpt_dir {typed(target)}"
    return target, f"--model_type {args.model_type} --model_id_or_path {typed(target)}"


@dataclass(frozen=True)
class _Form:
    """In which precision each tensor is written, and from where.

    Args:
        reader: of the values; for tensors that the source had in more precision than they were trained in, the optimizer's
            fp32 master weights.
        had: of the tensors before: as the source had them, and as they were trained where that was more.
        lost: tensors that are rounded: name -> "fp32 to bf16".
    """

    reader: MegatronReader
    had: Precisions
    precisions: Precisions
    lost: dict[str, str]


def _form(weights: _Weights) -> _Form:
    """--dtype for all tensors; without it each tensor's own precision, of the source and of the training, the wider."""
    from megaswift.weights.convert import Precisions, precisions_of_checkpoint
    from megaswift.weights.convert.precision import chosen, other_dtypes, rounded, wider, with_masters
    from megaswift.weights.torch_dtypes import TORCH_DTYPES

    parameters, args = parameters_of(weights.config), weights.args
    stored, recorded = precisions_of_checkpoint(weights.reader, parameters), other_dtypes(weights.manifest)
    if weights.manifest and not weights.manifest.get("iteration"):  # only converted: as the source was, or as --dtype said
        reader, own = weights.reader, Precisions(TORCH_DTYPES.get(str(weights.manifest.get("dtype")), stored.main), recorded)
        had = own
    else:
        frozen = set(weights.manifest.get("frozen") or ())  # these have no master weights
        reader, own = with_masters(weights.reader, [p for p in parameters if p.name not in frozen], stored, recorded)
        had = Precisions(own.main, {**own.others, **wider(recorded, own)})
    asked = args.dtype if "dtype" in args.explicit() and args.dtype != "AUTO" else None
    own = chosen(own, asked, str(weights.directory))
    return _Form(reader, had, own, rounded(had, own, hf_shapes(parameters)))


def _own_weights(root: Path, args: ExportArguments) -> _Weights:
    """Weights in a directory that export or sft made."""
    checkpoint = paths.find_checkpoint(root, args.iteration)
    start_reading(sorted(checkpoint.glob("*.distcp"), key=lambda path: (len(path.name), path.name)))
    args = _filled(root, args)
    from megaswift.weights.torch_dist.reader import Reader

    config, manifest = load_config(root), read_manifest(checkpoint)
    named = args.model_id_or_path if manifest.get(CARRIED) else None
    carried = find_carried(
        manifest, checkpoint, locate(args.model_type, named, args.model_revision).path if named is not None else None
    )
    if carried is None and whole_of(config) is not None:
        raise DataError(
            "these weights are of a text model alone, and nothing tells of the tensors that make it whole again.",
            where=str(checkpoint),
            fix="convert the model again: swift export --to_megatron true --language_model_only true",
        )
    return _Weights(Reader(checkpoint), checkpoint, config, root, manifest, {}, args, shown(checkpoint), carried)


def _filled(root: Path, args: ExportArguments) -> ExportArguments:
    args = fill_from_file(args, read_args_file(root), (*MODEL_OPTIONS, *LAYOUT_OPTIONS))
    if not args.model_type:
        raise UserError("the directory does not say its model_type.", where=str(root), fix="give --model_type NAME")
    return args


def _adapter_checkpoint(root: Path, args: ExportArguments) -> Path | None:
    """The checkpoint that is to be exported, if it holds an adapter."""
    if not paths.is_megatron_directory(root) or not any(paths.iteration_of(path) for path in paths.candidates(root)):
        return None
    checkpoint = paths.find_checkpoint(root, args.iteration)
    return checkpoint if read_manifest(checkpoint).get("adapter") is not None else None


def _old_weights(root: Path, args: ExportArguments) -> _Weights | None:
    """Weights in the classic layout (mp_rank_XX/model_optim_rng.pt), or None where the directory is another kind."""
    from megaswift.weights import classic

    found = classic.find(root, args.iteration)
    if found is None:
        return None
    from megaswift.export.old import open_classic

    old = open_classic(found, root, args)
    require_text_alone(old.config, root)
    label = f"{shown(found.directory)} (classic, tp {found.tp}, pp {found.pp})"
    return _Weights(old.reader, found.directory, old.config, old.model_dir, {}, old.overrides, old.args, label)


def _require_untouched(weights: _Weights, root: Path) -> None:
    """Raise DataError unless config.json and every file of the checkpoint are those that were written."""
    check_config(root, weights.manifest)
    require_whole(weights.directory)


def _write(weights: _Weights, form: _Form, target: Path, root: Path) -> tuple[WriteResult, dict[str, Any] | None]:
    from megaswift.weights.convert import FiniteCheck, planned_hf_tensors

    values = read_config(weights.model_dir)
    named = str(values.get("dtype", values.get("torch_dtype"))).removeprefix("torch.")
    present = {str(dtype).removeprefix("torch.") for dtype in (form.precisions.main, *form.precisions.others.values())}
    # A mixture may be named after any of its precisions: transformers loads all tensors in the one that stands here.
    overrides = weights.overrides | (dtype_override(values, form.precisions.main) if named not in present else {})
    if named not in present and isinstance(values.get(TEXT_CONFIG), dict):
        text = values[TEXT_CONFIG]
        overrides[TEXT_CONFIG] = text | dtype_override(text, form.precisions.main)
    proofs: list[dict[str, Any]] = []
    finite = FiniteCheck(weights.args.allow_nonfinite)
    begin = time.perf_counter()

    def finish(written: WriteResult) -> None:
        parameters = sum(math.prod(shape) for shape in _shapes(weights.config))
        size = sum(record.size for name, record in written.files.items() if name.endswith(".safetensors"))
        report(parameters, len(written.tensors), size, time.perf_counter() - begin, written.resumed)
        say("  re-opened and audited: names, shapes, dtypes, number of files")
        report_nonfinite(finite.found)
        report_rounded(form.lost, len(written.tensors))
        if weights.args.verify:
            proofs.append(_prove(written.path, weights, form, logits=not finite.found) | {"rounded": form.lost})
        if weights.carried is not None:
            require_same(written.tensors, weights.record, weights.carried[0].path)
        _finish(written, weights, target, form, proofs[0] if proofs else None)

    result = write_checkpoint(
        target,
        [
            *planned_hf_tensors(form.reader, weights.config, form.precisions, finite),
            *(planned(weights.carried[0], weights.record) if weights.carried is not None else ()),
        ],
        side_files(weights.model_dir),
        overrides or None,
        size_of(weights.args.max_shard_size, "max_shard_size"),
        THREADS,
        extra_files=_args_bytes(root),
        before_publish=finish,
        plan=json.dumps(["huggingface", form.precisions.record(), str(weights.directory), _identity(weights)]),
        resume=weights.args.resume,
        replace=target.exists(),
    )
    return result, proofs[0] if proofs else None


def _shapes(config: Any) -> list[tuple[int, ...]]:
    return list(hf_shapes(parameters_of(config)).values())


def _identity(weights: _Weights) -> Any:
    """What tells this checkpoint from another one under the same name."""
    if weights.manifest:
        return sha256_of(weights.directory / MANIFEST)
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(weights.directory.rglob("*.pt"))]


def _prove(written: Path, weights: _Weights, form: _Form, logits: bool) -> dict[str, Any]:
    """Read the folder back, compare it with the Megatron weights, and both models' logits unless a weight is not finite."""
    from megaswift.weights.convert import verify_written

    source = HFCheckpoint.open(written)
    equal = verify_written(source, form.reader, weights.config, form.precisions)
    same = {"carried_tensors": read_back(source, weights.record, written)} if weights.record else {}
    if not logits:
        return {"round_trip_tensors": equal, **same}
    reader = _Rounded(form.reader, form.precisions.stored(parameters_of(weights.config)))
    return prove(load_config(written), source, reader, form.precisions, written, equal) | same


class _Rounded:
    """A reader whose values are rounded to the precisions of the written folder."""

    def __init__(self, reader: Any, dtypes: dict[str, torch.dtype]) -> None:
        self._reader, self._dtypes = reader, dtypes

    def read(self, key: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._reader.read(key, *args, **kwargs).to(self._dtypes[key])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def _finish(written: WriteResult, weights: _Weights, target: Path, form: _Form, proof: dict[str, Any] | None) -> None:
    """conversion.html, and last the manifest, which names the checkpoint's."""
    files = {name: {"size": record.size, "sha256": record.sha256} for name, record in written.files.items()}
    verified: dict[str, Any] = {}
    if proof is not None:
        verified = summary(proof)
    if proof is not None and "logits" in proof:
        facts = [("made from", weights.label), ("precision", str(form.precisions)), ("tensors", str(len(written.tensors)))]
        write_page(written.path, f"{weights.args.model_type}: Megatron to Hugging Face", facts, proof)
        page = written.path / PAGE
        files[PAGE] = {"size": page.stat().st_size, "sha256": sha256_of(page)}
    write_manifest(
        written.path,
        {
            "kind": "huggingface",
            "model_type": weights.args.model_type,
            "iteration": weights.manifest.get("iteration"),
            "made_from": ancestry(weights.directory, target) if weights.manifest else [],
            "source": weights.manifest.get("source") or {"origin": str(weights.directory)},
            **form.precisions.record(),
            **({"rounded": form.lost} if form.lost else {}),
            "versions": versions(),
            "verified": verified,
            "config": read_config(written.path),
            "files": files,
            "hf_tensors": written.tensors,
            **told_of(weights.manifest),
        },
    )
    sign(written.path, weights.args.sign)


def _digests(tensors: dict[str, str], target: Path, config: Any) -> dict[str, str]:
    """SHA-256 of every tensor as a conversion notes it: experts that one tensor holds are noted one by one."""
    from megaswift.weights.convert.model import digest

    parts = [part for parameter in parameters_of(config) for part in parameter.hf if part.index is not None]
    if not parts:
        return tensors
    source = HFCheckpoint.open(target)
    apart = {part.label: digest(source.part(part)) for part in parts}
    return {name: value for name, value in tensors.items() if name not in {part.name for part in parts}} | apart


def _equal_to_source(tensors: dict[str, str], manifest: dict[str, Any], form: _Form, carried: Record) -> str | None:
    """For weights that were only converted: whether every tensor came back as it went in. Raises DataError if not.

    Only a tensor that is written in another precision than it was converted in has other bytes.
    """
    original = manifest.get("hf_tensors")
    if not original:
        return None
    original = {**original, **{name: told["sha256"] for name, told in carried.items()}}
    different = sorted(name for name, value in tensors.items() if original.get(name) != value)
    if not different:
        return f"all {len(tensors)} tensors have the SHA-256 that was recorded when they were converted"
    plain = {name: name.partition("[")[0] for name in different}
    wrong = [name for name in different if name in carried or form.precisions.of(plain[name]) == form.had.of(plain[name])]
    if wrong:
        raise DataError(
            f"{len(wrong)} tensors are not those that were converted.",
            where=", ".join(wrong[:5]),
            fix="use another copy",
        )
    return f"{len(different)} tensors have other bytes than in {manifest.get('dtype')}, as they must"


def _args_bytes(root: Path) -> dict[str, bytes]:
    """sft_args.json of a run, with sft_type full, so that the model is found by --ckpt_dir alone."""
    path = args_file_in(root)
    if path is None or path.name != SFT_ARGS:
        return {}
    values = read_args_file(root) | {"sft_type": "full"}
    return {SFT_ARGS: (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode()}
