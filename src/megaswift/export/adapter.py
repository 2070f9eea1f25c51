"""`swift export --to_hf` of a run with an adapter: a PEFT folder, proven against PEFT on the base; or base and adapter merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.config.files import SFT_ARGS, read_args_file
from megaswift.config.options import ExportArguments
from megaswift.errors import DataError, MegaswiftError
from megaswift.export.common import report_proof, require_free_name, sign
from megaswift.hub.locate import locate
from megaswift.models import family_of, parameters_of
from megaswift.models.adapters import Lora
from megaswift.models.head import labels_of
from megaswift.models.parameters import Parameter
from megaswift.models.whole import whole_of
from megaswift.proof.adapter_readers import vllm_rank, vllm_refuses
from megaswift.proof.chain import require_whole
from megaswift.proof.prove import PAGE, summary, write_page
from megaswift.store.cache import alone, cache_root
from megaswift.store.files import FileRecord, write_small
from megaswift.store.manifest import ancestry, quick_check, read_manifest, sha256_of, versions, write_manifest
from megaswift.store.paths import INITIAL_ADAPTER
from megaswift.store.publish import publish, workspace
from megaswift.terminal import say, shown, typed
from megaswift.weights.base import base_digest
from megaswift.weights.carried import FIELD as CARRIED
from megaswift.weights.carried import require_same, told_of
from megaswift.weights.hf.config import load_config, names_in_folder
from megaswift.weights.hf.folder import ADAPTER_CONFIG, check_config, read_config
from megaswift.weights.hf.read import HFCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

    from megaswift.proof.parity import Parity
    from megaswift.proof.streams import TrainedAdapter

Convert = Callable[[ExportArguments], Any]

WEIGHTS = "adapter_model.safetensors"
LARGEST_LOSS = 0.5  # a merge that loses more than this share of what the adapter adds is not made


@dataclass(frozen=True)
class AdapterRun:
    """An adapter in a run's checkpoint, and what it stands beside.

    Args:
        root, checkpoint: the run and its checkpoint; manifest: the checkpoint's.
        base: the base as a Hugging Face folder.
        lora, parameters, tensors: what is written: its description and list, and Hugging Face name -> value in the precision that
            is written. Of an adapter that began as a part of the base it has twice the rank, and stands beside the base as it was.
        trained: the adapter as the engine has it.
    """

    root: Path
    checkpoint: Path
    manifest: dict[str, Any]
    args: ExportArguments
    config: Any
    lora: Lora
    parameters: list[Parameter]
    base: Path
    tensors: dict[str, Tensor]
    trained: TrainedAdapter


def adapter_to_hf(root: Path, checkpoint: Path, args: ExportArguments, convert: Convert) -> tuple[Path, str]:
    """Export the adapter of a run, or with --merge_lora the merged model; the directory, and what `swift infer` is told."""
    run = _read(root, checkpoint, args, convert)
    if args.merge_lora:
        target = Path(args.hf_output_dir or root / f"{args.model_type}-hf").absolute()
        require_free_name(target, args.overwrite, root, run.base)
        return _merge(run, target)
    target = Path(args.hf_output_dir or root / f"{args.model_type}-adapter").absolute()
    require_free_name(target, args.overwrite, root, run.base)
    say(f"{shown(checkpoint)} -> LoRA adapter in PEFT's form, {len(run.tensors)} tensors, rank {run.lora.rank}")
    _write(run, target)
    return target, f"--ckpt_dir {typed(target)}"


def _read(root: Path, checkpoint: Path, args: ExportArguments, convert: Convert) -> AdapterRun:
    """Raises DataError for a checkpoint that was changed, or whose base is not there or has other weights."""
    from megaswift.proof.streams import TrainedAdapter
    from megaswift.weights.convert import FiniteCheck
    from megaswift.weights.convert.lora_start import as_plain, load_start
    from megaswift.weights.convert.model import check_megatron
    from megaswift.weights.torch_dist.reader import Reader
    from megaswift.weights.torch_dtypes import TORCH_DTYPES

    manifest = read_manifest(checkpoint)
    if args.verify:
        check_config(root, manifest)
        require_whole(checkpoint)
    config, lora = load_config(root), Lora.from_record(manifest["adapter"])
    parameters = lora.parameters(family_of(config.model_type), config)
    reader, finite = Reader(checkpoint), FiniteCheck()
    check_megatron(reader, parameters)
    asked = TORCH_DTYPES[args.dtype] if "dtype" in args.explicit() and args.dtype != "AUTO" else None
    tensors, values = {}, {}
    for parameter in parameters:
        value = reader.read(parameter.key, parameter.place)
        value = value.to(asked or value.dtype).clone()
        values[parameter.name] = value[: parameter.shape[0]]
        for part, own in zip(parameter.hf, parameter.arrangement.unpack(value), strict=True):
            finite(part.name, own)
            tensors[part.name] = own.contiguous()
    base = base_folder(manifest["base"], config, args, convert)
    written, start = lora, None
    if lora.is_part_of_base:
        first = load_start(root / INITIAL_ADAPTER)
        start = {
            p.name: p.arrangement.pack([first[part.name].to(tensors[part.name].dtype) for part in p.hf])
            for p in parameters
            if all(part.name in first for part in p.hf)
        }
        written, tensors = as_plain(lora, tensors, first)
        parameters = written.parameters(family_of(config.model_type), config)
        say(f"began as {lora.init}: written as a plain adapter of rank {written.rank}, for the base as it was")
    trained = TrainedAdapter(lora, values, start)
    return AdapterRun(root, checkpoint, manifest, args, config, written, parameters, base, tensors, trained)


def base_folder(record: dict[str, Any], config: Any, args: ExportArguments, convert: Convert) -> Path:
    """The base of an adapter as a Hugging Face folder: where the options say, where the run began, or made from its Megatron form.

    Args:
        convert: makes a Hugging Face folder of Megatron weights.

    Raises DataError where none of these holds the weights that the adapter was trained beside.
    """
    from megaswift.weights.load_hf import is_hf_folder

    tried: list[str] = []

    def fits(place: Path) -> bool:
        with suppress(MegaswiftError):
            if is_hf_folder(place) and base_digest(place, config) == record["digest"]:
                return True
        tried.append(str(place))
        return False

    if args.model_id_or_path:
        place = locate(args.model_type, args.model_id_or_path, args.model_revision).path
        if fits(place):
            return place
    else:
        for place in (Path(record["path"]), Path(str(record.get("origin")))):
            if fits(place):
                return place.resolve()
        release = Path(record["path"])
        if (release / "metadata.json").is_file():
            return _from_megatron(release, record, args, convert)
    raise DataError(
        "the weights that the adapter was trained beside are not to be found.",
        where=", ".join(tried),
        fix=f"name them: --model_id_or_path DIR; they were {record.get('origin')}",
    )


def _from_megatron(release: Path, record: dict[str, Any], args: ExportArguments, convert: Convert) -> Path:
    """The folder that a base's Megatron weights came from, made again in the cache."""
    target = cache_root() / "bases" / str(record["digest"])[:16]
    with alone(target, f"waiting for another process, which makes a model of {release.parent}"):
        if not target.is_dir() or quick_check(target) is not None:
            say("the base as a Hugging Face model, for PEFT to load (it stays in the cache):")
            convert(
                ExportArguments(
                    ckpt_dir=str(release.parent),
                    hf_output_dir=str(target),
                    model_type=args.model_type,
                    to_hf=True,
                    verify=False,
                    overwrite=True,
                )
            )
    return target


def _write(run: AdapterRun, target: Path) -> None:
    """The folder, which appears when it is whole and proven."""
    from safetensors.torch import save

    base = parameters_of(run.config)
    config = run.lora.peft_config(base, _base_name(run))
    shapes = {name: tuple(value.shape) for name, value in run.tensors.items()}
    expected = {part.name: part.shape for parameter in run.parameters for part in parameter.hf}
    assert shapes == expected, "the list of parameters decides names and shapes"
    args_text = json.dumps(read_args_file(run.root), ensure_ascii=False, indent=2) + "\n"
    content = {
        WEIGHTS: save(run.tensors, metadata={"format": "pt"}),
        ADAPTER_CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
        SFT_ARGS: args_text.encode(),
    }
    with workspace(target, sum(map(len, content.values()))) as work:
        files = {name: write_small(work.path / name, data) for name, data in content.items()}
        refused = vllm_refuses(config, shapes)
        proof = _prove(run, work.path) if run.args.verify else None
        _finish(run, work.path, target, files, proof, refused)
        publish(work.path, target, taken="replace" if run.args.overwrite else "refuse")
    report_proof(proof)
    if refused:
        say(f"  [yellow]vLLM does not load this adapter: {refused}. For vLLM: swift export ... --merge_lora true[/yellow]")
    elif whole_of(run.config) is not None:
        say(
            "  [yellow]whether vLLM reads adapters of this model's text was not compared. For vLLM: swift export ... --merge_lora true[/yellow]"
        )
    else:
        say(f"  names and shapes are those that vLLM reads (--max-lora-rank {vllm_rank(config)} or more)")


def _read_by_vllm(run: AdapterRun, refused: str, read: str) -> str:
    """In words whether vLLM reads an adapter; its names within models that read pictures are not known."""
    return refused or (read if whole_of(run.config) is None else "not compared")


def _base_name(run: AdapterRun) -> str:
    """How PEFT and vLLM find the base: its name on a hub, or its directory."""
    origin = str(run.manifest["base"].get("origin"))
    hub, _, name = origin.partition(":")
    return name if hub in ("hf", "ms") and name else str(run.base)


def _prove(run: AdapterRun, folder: Path) -> dict[str, Any]:
    """Read the tensors back, and compare logits of PEFT on the base with the engine's; raises DataError for a difference."""
    from megaswift.weights.convert.lora import load_adapter

    written = load_adapter(folder)
    different = [name for name, value in run.tensors.items() if name not in written or not written[name].equal(value)]
    if different or set(written) != set(run.tensors):
        raise DataError("a tensor that was read back is not the one in the checkpoint.", where=", ".join(different[:5]))
    parity = _compared(run, lambda *given: _adapter_parity(run, folder, *given))
    if parity.failed:
        raise DataError(
            f"PEFT does not compute what the engine computes: {parity.failed}.",
            where=parity.where,
            fix="nothing was made; report it with adapter_config.json (--verify false skips the proof)",
        )
    return _summary(run, parity)


def _adapter_parity(run: AdapterRun, folder: Path, precisions: Any, adapter: Any) -> Parity:
    from megaswift.proof.parity import compare_adapter

    return compare_adapter(run.config, HFCheckpoint.open(run.base), precisions, folder, adapter, run.root)


def _compared(run: AdapterRun, compare: Callable[[Any, Any], Parity]) -> Parity:
    from megaswift.weights.convert import precisions_of_folder

    precisions = precisions_of_folder(HFCheckpoint.open(run.base), run.config)
    return compare(precisions, run.trained)


def _summary(run: AdapterRun, parity: Parity) -> dict[str, Any]:
    from dataclasses import asdict

    from megaswift.proof.audit import neutral_fields, require_equal

    require_equal(parity.config, str(run.root / "config.json"))
    return {
        "round_trip_tensors": len(run.tensors),
        "logits": parity.to_dict(),
        "config": [asdict(finding) for finding in parity.config],
        "neutral_fields": neutral_fields(run.config),
    }


def _finish(
    run: AdapterRun, folder: Path, final: Path, files: dict[str, FileRecord], proof: dict[str, Any] | None, refused: str
) -> None:
    """conversion.html, and last the manifest."""
    records: dict[str, Any] = {name: {"size": record.size, "sha256": record.sha256} for name, record in files.items()}
    if proof is not None:
        facts = [
            ("made from", shown(run.checkpoint)),
            ("base", str(run.manifest["base"]["origin"])),
            ("adapter", f"LoRA, rank {run.lora.rank}, alpha {run.lora.alpha:g}, {len(run.tensors)} tensors"),
            ("vLLM", _read_by_vllm(run, f"does not load it: {refused}" if refused else "", "reads its names and shapes")),
        ]
        write_page(folder, f"{run.args.model_type}: adapter against PEFT on its base", facts, proof)
        page = folder / PAGE
        records[PAGE] = {"size": page.stat().st_size, "sha256": sha256_of(page)}
    write_manifest(
        folder,
        {
            "kind": "adapter",
            "model_type": run.args.model_type,
            "iteration": run.manifest.get("iteration"),
            "made_from": ancestry(run.checkpoint, final),
            "source": run.manifest.get("source"),
            "base": run.manifest["base"],
            "adapter": run.lora.record(),
            "serves": {
                "peft": "loaded and compared" if proof is not None else "not verified",
                "vllm": _read_by_vllm(run, refused, "names and shapes"),
            },
            "versions": versions(),
            "verified": summary(proof) if proof is not None else {},
            "files": records,
        },
    )
    sign(folder, run.args.sign)


def _merge(run: AdapterRun, target: Path) -> tuple[Path, str]:
    """Base and adapter as one model, with what the rounding of the merge does to it."""
    from megaswift.weights.convert.lora import Adapter, merge_adapter

    base, scale = HFCheckpoint.open(run.base), run.lora.scale
    say(f"{shown(run.checkpoint)} merged into {shown(run.base)} -> Hugging Face model")
    adapter = Adapter.of(run.tensors, scale, run.checkpoint, str(run.base)).stored_as(names_in_folder(base))
    proofs: list[tuple[dict[str, Any] | None, dict[str, Any]]] = []

    def finish(written: Any) -> None:
        merged = HFCheckpoint.open(written.path)
        carried = run.manifest.get(CARRIED)
        same = require_same(written.tensors, carried["tensors"], run.base) if carried else 0
        rounding = merge_loss(adapter, base, merged)
        proof = None
        if run.args.verify:
            parity = _compared(run, lambda *given: _merged_parity(run, base, merged, *given))
            proof = _summary(run, parity) | ({"carried_tensors": same} if same else {})
            rounding |= {"logits": parity.max_abs, "largest_logit": parity.largest_logit, "mean_kl": parity.mean_kl}
        proofs.append((proof, rounding))
        if rounding["lost"] > LARGEST_LOSS:
            raise DataError(
                f"rounding to the base's precision would lose {rounding['lost']:.0%} of what the adapter adds to {rounding['tensor']}.",
                where=str(run.base),
                fix="use the adapter itself (leave --merge_lora out), or a base in a wider precision",
            )
        files = {name: {"size": record.size, "sha256": record.sha256} for name, record in written.files.items()}
        write_manifest(
            written.path,
            {
                "kind": "huggingface",
                "model_type": run.args.model_type,
                "iteration": run.manifest.get("iteration"),
                "made_from": ancestry(run.checkpoint, target),
                "source": run.manifest.get("source"),
                "base": run.manifest["base"],
                "merged": run.lora.record() | {"rounding": rounding},
                "versions": versions(),
                "verified": summary(proof) if proof is not None else {},
                "config": read_config(written.path),
                "files": files,
                "hf_tensors": written.tensors,
                **told_of(run.manifest),
            },
        )
        sign(written.path, run.args.sign)

    values = read_args_file(run.root) | {"sft_type": "full"}
    extra = {SFT_ARGS: (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode()}
    sides = run.root if labels_of(run.config) is not None else None
    merge_adapter(adapter, base, target, finish, extra, replace=target.exists(), sides=sides)
    proof, rounding = proofs[0]
    report_proof(proof)
    say(
        f"  rounding of the merge: at most {rounding['lost']:.2g} of what the adapter adds to a matrix is lost ({rounding['tensor']})"
        + (f"; logits are off by up to {rounding['logits']:.1e} of {rounding['largest_logit']:.3g}" if proof else "")
    )
    return target, f"--ckpt_dir {typed(target)}"


def _merged_parity(run: AdapterRun, base: HFCheckpoint, merged: HFCheckpoint, precisions: Any, adapter: Any) -> Parity:
    from megaswift.proof.parity import compare_merged
    from megaswift.weights.convert import precisions_of_folder

    own = precisions_of_folder(merged, run.config)
    return compare_merged(run.config, base, merged, own, adapter, run.root)


def merge_loss(adapter: Any, base: HFCheckpoint, merged: HFCheckpoint) -> dict[str, Any]:
    """What rounding takes from a merge: the largest share of what an adapter adds that a matrix lacks, by Euclidean norms, and where."""
    worst, where = 0.0, ""
    for name in adapter.pairs:
        exact = adapter.added_to(name, base.tensor(name))
        added = (exact - base.tensor(name).float()).norm().clamp_min(1e-30)
        lost = float((merged.tensor(name).float() - exact).norm() / added)
        worst, where = max((worst, where), (lost, name))
        base.release(name)
        merged.release(name)
    return {"lost": worst, "tensor": where}


__all__ = ["adapter_to_hf", "base_folder", "merge_loss"]
