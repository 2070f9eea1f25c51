"""What a run starts from: Megatron weights, a run to go on with, or a Hugging Face folder that needs no conversion."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megaswift.config.files import LAYOUT_OPTIONS, MODEL_OPTIONS, fill_from_file, read_args_file, with_home
from megaswift.config.options import PtArguments, RlhfArguments, SftArguments
from megaswift.errors import DataError, UserError
from megaswift.hub.locate import locate
from megaswift.launch.versions import has_bf16
from megaswift.models import parameters_of
from megaswift.models.adapters import Lora
from megaswift.models.whole import require_language_model_only, whole_of
from megaswift.run.head import TASK_OPTIONS, with_head
from megaswift.run.method import (
    LORA,
    METHOD_OPTIONS,
    adapter_of,
    check_same_adapter,
    check_same_frozen,
    check_same_method,
    frozen_parameters,
    parameters_of_adapter,
    with_method_defaults,
)
from megaswift.run.objective import PREFERENCE_OPTIONS, check_same_objective
from megaswift.run.problems import contradictions, layout_problems, problems, refuse, usable_length
from megaswift.run.resolve import World, resolve
from megaswift.run.resume import check_same_base, check_same_model, newest_run, newest_whole
from megaswift.run.spec import Parallel
from megaswift.store import paths
from megaswift.store.lock import filling, refuse_if_in_use
from megaswift.store.manifest import read_manifest
from megaswift.store.paths import gguf_fix
from megaswift.store.publish import refuse_unfinished
from megaswift.terminal import say, shown
from megaswift.weights.base import base_digest, base_record
from megaswift.weights.carried import of_start
from megaswift.weights.dtypes import TRAINED
from megaswift.weights.hf.config import check_source, load_config
from megaswift.weights.hf.folder import check_config
from megaswift.weights.hf.new_tokens import NewTokens, listed_tokens, with_new_tokens
from megaswift.weights.hf.read import HFCheckpoint


@dataclass(frozen=True)
class TrainingSource:
    """What training starts from."""

    args: SftArguments  # options, those of the directory filled in
    root: Path  # directory with config.json and tokenizer; with new tokens those of the cache
    checkpoint: Path  # torch_dist directory, or the Hugging Face folder itself where that is the start
    config: Any
    dtype: str
    manifest: dict[str, Any]  # of the checkpoint
    run_dir: Path | None  # the run to go on with, if it is one
    first_step: int
    new_tokens: NewTokens | None = None
    adapter: Lora | None = None  # what is trained, where it is not the weights themselves
    base: dict[str, Any] | None = None  # the weights beside the adapter: a record of weights.base
    frozen: list[str] = field(default_factory=list)  # names of parameters that stay as they are in full training
    carried: dict[str, Any] | None = None  # tensors beside what is trained: digests, and where they lie (weights.carried)
    named: Path | None = None  # what the user named, where `root` is a copy of it with another head
    new_head: bool = False  # the weights have no head of scores, and the model gets one


def resolve_source(args: SftArguments, leads: bool = True) -> TrainingSource:
    """Find and check what training starts from: with --resume true the newest run, else --resume_from_checkpoint.

    Args:
        leads: whether this machine holds the lock of the run; on the others the leading one may have it already.
    """
    from megaswift.weights.load_hf import is_hf_folder

    args, origin = with_home(args), None
    root = _newest_run(args, leads) if args.resume else None
    if root is None:
        root, args, origin = _start_root(args)
    refuse_unfinished(root)
    values = read_args_file(root)
    # A run that goes on in another layout is given one: then the old one's other half means nothing.
    relaid = args.explicit() & set(LAYOUT_OPTIONS) and _is_run(root)
    # A Hugging Face folder has no layout: its options file tells the one that it was exported from.
    own_layout = () if relaid or is_hf_folder(root) else LAYOUT_OPTIONS
    args = fill_from_file(args, values, (*MODEL_OPTIONS, *own_layout, *(METHOD_OPTIONS if _is_run(root) else ())))
    if not args.model_type:
        raise UserError("the directory does not say its model_type.", where=str(root), fix="give --model_type NAME")
    converted = not is_hf_folder(root)
    checkpoint = _checkpoint(args, root, leads) if converted else root

    config = load_config(root)
    require_language_model_only(config, args.language_model_only, str(root / "config.json"))
    args = args.changed(new_special_tokens=listed_tokens(args.new_special_tokens))
    args.check_choices()
    manifest = read_manifest(checkpoint) if converted else {}
    goes_on = bool(manifest.get("optimizer")) and paths.iteration_of(checkpoint) > 0
    if goes_on or manifest.get("adapter") is not None:
        check_same_method(args, manifest, shown(root))
    else:
        args = _with_start_adapter(args)
    if goes_on:
        args = fill_from_file(args, values, PREFERENCE_OPTIONS if isinstance(args, RlhfArguments) else TASK_OPTIONS)
        check_same_objective(args, manifest, shown(root))
    refuse(contradictions(args))
    held = config  # what the weights are of
    named = root
    root, config, new_head = (root, config, False) if goes_on else with_head(args, root, config)
    if goes_on:
        with_head(args, root, config)  # only judges
        new_head = bool(manifest.get("new_head"))  # of an adapter's base
    args = with_method_defaults(args)
    refuse(layout_problems(config, Parallel(world_size=args.tp * args.pp * args.cp, tp=args.tp, pp=args.pp, cp=args.cp)))
    adapter, frozen = adapter_of(args, config), frozen_parameters(args, config)
    if goes_on and adapter is not None:
        check_same_adapter(adapter, manifest["adapter"], shown(root))
    _check_tensors(named, checkpoint if converted else None, held, adapter if goes_on else None)
    if not converted:
        manifest = _folder_precisions(named, held)
    base = None
    if goes_on:
        check_same_model(args, values, manifest, shown(root))
        check_config(root, manifest)
        if adapter is None:
            check_same_frozen(frozen, manifest, shown(root))
            check_same_base(_named(args), checkpoint, manifest)
        else:
            adapter, base = Lora.from_record(manifest["adapter"]), base_of(manifest["base"], args, config, shown(root))
    elif adapter is not None:
        _check_start_adapter(args, adapter, config)
        base = base_record(checkpoint, named, config, origin)
    dtype = str(manifest["dtype"]) if goes_on and manifest.get("dtype") else _dtype(args, str(manifest.get("dtype")))
    source = TrainingSource(
        args=args,
        root=root,
        checkpoint=checkpoint,
        config=config,
        dtype=dtype,
        manifest=manifest,
        run_dir=root if goes_on else None,
        first_step=paths.iteration_of(checkpoint) if goes_on else 0,
        adapter=adapter,
        base=base,
        frozen=frozen,
        carried=_carried(checkpoint, config, origin),
        named=named,
        new_head=new_head,
    )
    _check(source)
    if not goes_on:
        _tell_rounded(manifest, dtype, args.save_only_model)
    new_tokens = _new_tokens(args.new_special_tokens, root, goes_on)
    if new_tokens is not None:
        directory = new_tokens.directory
        source = replace(source, root=directory, config=load_config(directory), new_tokens=new_tokens)
    length = usable_length(source.config, args.max_length, given="max_length" in args.explicit())
    return replace(source, args=args.changed(max_length=length))


def _check(source: TrainingSource) -> None:
    """Raise UserError for what is wrong whatever the rows are, and on any number of processes."""
    args = source.args
    refuse(contradictions(args))
    world = World.of(Parallel(tp=args.tp, pp=args.pp, cp=args.cp, ep=args.ep, etp=args.etp).fewest)
    refuse(problems(resolve(args, source, world), source.config))


def _carried(checkpoint: Path, config: Any, origin: str | None) -> dict[str, Any] | None:
    """What is told of the tensors that are carried along. Raises DataError for weights of a part of a model that tell nothing."""
    found = of_start(checkpoint, config, origin)
    if found is None and whole_of(config) is not None:
        raise DataError(
            "these weights are of a text model alone, and nothing tells of the tensors that make it whole again.",
            where=str(checkpoint),
            fix="convert the model again: swift export --to_megatron true --language_model_only true",
        )
    return found


def _new_tokens(tokens: list[str], root: Path, goes_on: bool) -> NewTokens | None:
    """The files with --new_special_tokens, said aloud; None where the model has them. A run keeps those that it began with."""
    found = with_new_tokens(root, tokens)
    if found is None:
        return None
    if goes_on:
        raise UserError(
            f"this run began without the special tokens {', '.join(found.tokens)}, and its optimizer knows nothing of their rows.",
            where=f"--new_special_tokens, {shown(root)}",
            fix="leave the option out to go on; to add them, export the run (--to_hf true) and begin a new one from that",
        )
    say(found.note())
    return found


def _start_root(args: SftArguments) -> tuple[Path, SftArguments, str | None]:
    """The directory to start from, the options with the model type that it tells, and where it came from if it was looked up.

    --resume_from_checkpoint names it; else it is the converted model in {model_type}-tp{tp}-pp{pp}, or without one the
    Hugging Face model itself, whose weights are then loaded straight into the ranks.
    """
    from megaswift.weights.load_hf import is_hf_folder

    named = args.resume_from_checkpoint
    if isinstance(args, PtArguments) and args.init == "random" and (named is None or not _is_run(Path(named))):
        return _random_root(args)
    if named is None and not args.model_type and not args.model_id_or_path:
        raise UserError(
            "nothing says which weights to train.",
            where="swift sft",
            fix="give --resume_from_checkpoint DIR, --model_type NAME or --model_id_or_path DIR",
        )
    default = Path(f"{args.model_type}-tp{args.tp}-pp{args.pp}")
    if named is None and (args.model_id_or_path or not paths.is_megatron_directory(default)):
        found = locate(args.model_type, args.model_id_or_path, args.model_revision)
        say(f"starting from {found.model_type} ({found.origin}), without a conversion")
        return found.path, args.changed(model_type=found.model_type), found.origin
    root = Path(named or default).absolute()
    if paths.is_megatron_directory(root) or is_hf_folder(root):
        return root, args, None
    if fix := gguf_fix(root):
        raise UserError(f"{shown(root)} is no model that can be trained.", where="--resume_from_checkpoint", fix=fix)
    name = args.model_type or "NAME"
    raise UserError(
        f"{shown(root)} is not a directory of Megatron weights.",
        where="--resume_from_checkpoint",
        fix=f"make one with: swift export --model_type {name} --to_megatron true --tp {args.tp} --pp {args.pp}",
    )


def _random_root(args: PtArguments) -> tuple[Path, SftArguments, str | None]:
    """A folder with random weights for the config of the model that is named."""
    from megaswift.weights.hf.random_start import random_folder

    if args.resume_from_checkpoint is not None:
        raise UserError(
            "--init random draws new weights, and --resume_from_checkpoint names some.",
            where="--init, --resume_from_checkpoint",
            fix="give --model_id_or_path DIR, a folder with config.json and a tokenizer",
        )
    if not args.model_type and not args.model_id_or_path:
        raise UserError(
            "nothing says for which config random weights shall be drawn.",
            where="swift pt --init random",
            fix="give --model_id_or_path DIR, a folder with config.json and a tokenizer, or --model_type NAME",
        )
    found = locate(args.model_type, args.model_id_or_path, args.model_revision, weights=False)
    say(f"starting from random weights for {found.model_type} ({found.origin}), drawn with --seed {args.seed}")
    dtype = args.dtype if args.dtype in TRAINED else "fp32"
    origin = f"random weights of seed {args.seed} for {found.origin}"
    return random_folder(found.path, args.seed, dtype), args.changed(model_type=found.model_type), origin


def _newest_run(args: SftArguments, leads: bool) -> Path | None:
    """What --resume true goes on with; None, said aloud, where a new run must start."""
    model_type = args.model_type or _model_type(args)
    with filling(Path(args.output_dir)):
        found = newest_run(Path(args.output_dir).absolute(), str(model_type), args.add_output_dir_suffix, live=leads)
    if found is None:
        say(f"--resume true: no run of {model_type} under {args.output_dir} has saved a checkpoint; starting at step 0.")
    elif leads:
        refuse_if_in_use(found)
    return found


def _model_type(args: SftArguments) -> str | None:
    root, args, _ = _start_root(args)
    return read_args_file(root).get("model_type") or args.model_type


def _named(args: SftArguments) -> Path | None:
    """The directory of weights that the command names."""
    given = args.resume_from_checkpoint or args.model_id_or_path
    return Path(given).absolute() if given else None


def _is_run(root: Path) -> bool:
    """Whether training saved something in a directory, as opposed to converted weights."""
    return any(paths.iteration_of(path) > 0 for path in paths.candidates(root))


def _checkpoint(args: SftArguments, root: Path, leads: bool) -> Path:
    """The checkpoint in `root` to start from; what is passed over is said."""
    if not _is_run(root):
        return paths.find_checkpoint(root)
    if leads:
        refuse_if_in_use(root)
    checkpoint, notes = newest_whole(root, args.verify, need_optimizer=args.resume)
    for note in notes:
        say(f"[yellow]{note}[/yellow]")
    say(f"going on from {shown(checkpoint)}")
    return checkpoint


def base_of(record: dict[str, Any], args: SftArguments, config: Any, where: str) -> dict[str, Any]:
    """The base of an adapter's run: where the run found it, or where the options say that it is now.

    Raises DataError or UserError where it is not there, or holds other weights.
    """
    from megaswift.weights.load_hf import is_hf_folder

    kept = Path(str(record.get("path")))
    named = args.model_id_or_path or (None if _is_weights(kept) else args.model_type)
    if named is None:
        place = kept
    else:
        found = locate(args.model_type, args.model_id_or_path, args.model_revision)
        place = found.path if is_hf_folder(found.path) else paths.find_checkpoint(found.path)
    if base_digest(place, config) != record.get("digest"):
        raise DataError(
            "these are not the weights that the adapter was trained beside.",
            where=f"{where}; {shown(place)}",
            fix=f"name them: --model_id_or_path DIR; they were {record.get('origin')}",
        )
    return {**record, "path": str(place.absolute())}


def _is_weights(place: Path) -> bool:
    from megaswift.weights.load_hf import is_hf_folder

    return is_hf_folder(place) or (place / "metadata.json").is_file()


def _with_start_adapter(args: SftArguments) -> SftArguments:
    """With --adapters rank, alpha, scale and modules are the adapter's own. Raises UserError where options say another."""
    if args.adapters is None:
        return args
    if args.sft_type != LORA:
        raise UserError("--adapters goes with --sft_type lora.", where="--adapters", fix="add --sft_type lora")
    from megaswift.weights.convert.lora import adapter_options

    own = adapter_options(Path(args.adapters))
    differs = [name for name in sorted(own) if name in args.explicit() and getattr(args, name) != own[name]]
    if differs:
        raise UserError(
            f"the adapter has {differs[0]} {own[differs[0]]}, not {getattr(args, differs[0])}.",
            where=f"--{differs[0]}, --adapters",
            fix=f"leave --{differs[0]} out: it is taken from the adapter",
        )
    return args.changed(**own)


def _check_start_adapter(args: SftArguments, adapter: Lora, config: Any) -> None:
    """Raise DataError unless --adapters holds exactly the tensors of the adapter that is to be trained."""
    if args.adapters is None:
        return
    from megaswift.weights.convert.lora import load_adapter

    wanted = {part.name: part.shape for parameter in parameters_of_adapter(adapter, config) for part in parameter.hf}
    found = {name: tuple(value.shape) for name, value in load_adapter(Path(args.adapters)).items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise DataError(
            f"the adapter does not fit the model: {name} has {list(found[name]) if name in found else 'no value'}, "
            f"{list(wanted[name]) if name in wanted else 'nothing'} expected.",
            where=str(args.adapters),
            fix="name the model that it was made for",
        )


def _check_tensors(root: Path, checkpoint: Path | None, config: Any, adapter: Lora | None = None) -> None:
    """Raise DataError unless names and shapes of the weights are those of config.json: before a rank builds that model."""
    if checkpoint is None:
        source = HFCheckpoint.open(root)
        check_source(source, config)
        if source.note:
            say(source.note)
        return
    from megaswift.weights.convert import check_megatron
    from megaswift.weights.torch_dist.reader import Reader

    parameters = parameters_of(config) if adapter is None else parameters_of_adapter(adapter, config)
    check_megatron(Reader(checkpoint), parameters)


def _folder_precisions(folder: Path, config: Any) -> dict[str, Any]:
    """Precisions of a Hugging Face folder's weights, as a manifest would tell them."""
    from megaswift.weights.convert import precisions_of_folder
    from megaswift.weights.torch_dtypes import FLAGS

    found = precisions_of_folder(HFCheckpoint.open(folder), config)
    flag = FLAGS[found.main]
    return found.record() | {"dtype": flag if flag in TRAINED else "fp32"}


def _tell_rounded(manifest: dict[str, Any], dtype: str, only_model: bool) -> None:
    """Say which tensors the source has in more precision than they are trained in."""
    from megaswift.weights.convert import Precisions
    from megaswift.weights.convert.precision import grouped, other_dtypes, wider
    from megaswift.weights.torch_dtypes import TORCH_DTYPES

    names = wider(other_dtypes(manifest), Precisions(TORCH_DTYPES[dtype]))
    if names:
        later = "is saved in it, too (--save_only_model true)" if only_model else "is exported as its fp32 master copy has it"
        say(
            f"[yellow]rounded to {dtype} for training, though the source has more precision ({len(names)} tensors): "
            f"{grouped(names)}. What is learnt {later}.[/yellow]"
        )


def _dtype(args: SftArguments, stored: str) -> str:
    """The training precision: the flag, else bf16 on a GPU that has it and fp32 on a CPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    if "dtype" in args.explicit() and args.dtype != "AUTO":
        if not on_gpu and args.dtype != "fp32":
            say(f"[yellow]{args.dtype} on a CPU is many times slower than fp32; leave --dtype out for fp32.[/yellow]")
        return args.dtype
    if not on_gpu:
        return "fp32"
    if stored == "fp32" and args.dtype == "fp32":
        return "fp32"
    return "bf16" if has_bf16() else "fp16"
