"""What a plan begins from: a model's config, and nothing else of it. No weights, no network."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from megaswift.config.files import LAYOUT_OPTIONS, MODEL_OPTIONS, fill_from_file, read_args_file, with_home
from megaswift.config.options import SftArguments
from megaswift.errors import UserError
from megaswift.hub import packaged
from megaswift.hub.remote import hubs
from megaswift.models.registry import ModelType, by_hub_id, model_type, type_for_directory
from megaswift.run.method import adapter_of, frozen_parameters, with_method_defaults
from megaswift.run.problems import usable_length
from megaswift.run.source import TrainingSource
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.folder import CONFIG

A = TypeVar("A", bound=SftArguments)


def planned_source(args: SftArguments, on_gpu: bool) -> TrainingSource:
    """A start of training that is good for arithmetic: its config is real, its weights need not be there.

    Raises UserError where no config.json is found, with how to get one.
    """
    args = with_home(args)
    root = config_directory(args)
    args = fill_from_file(args, read_args_file(root), (*MODEL_OPTIONS, *LAYOUT_OPTIONS))
    args = args.changed(model_type=args.model_type or type_for_directory(root) or root.name.lower())
    args.check_choices()
    config = load_config(root)
    args = with_method_defaults(args)
    adapter, frozen = adapter_of(args, config), frozen_parameters(args, config)
    dtype = args.dtype if args.dtype != "AUTO" else "bf16" if on_gpu else "fp32"
    length = usable_length(config, args.max_length, given="max_length" in args.explicit())
    return TrainingSource(
        args.changed(max_length=length), root, root, config, dtype, manifest={}, run_dir=None, first_step=0, adapter=adapter,
        frozen=frozen,
    )  # fmt: skip


def config_directory(args: SftArguments) -> Path:
    """The directory of the config.json that the options mean, on this machine."""
    given = args.resume_from_checkpoint or args.model_id_or_path
    if given is not None and Path(given).is_dir():
        return Path(given).absolute()
    if given is None and not args.model_type:
        raise UserError("no model is named.", where="swift plan", fix="give --model_type NAME or --model_id_or_path DIR")
    entry: ModelType | None = by_hub_id(given) if given is not None else model_type(str(args.model_type))
    converted = Path(f"{args.model_type}-tp{args.tp}-pp{args.pp}")
    if given is None and (converted / CONFIG).is_file():
        return converted.absolute()
    names = {"hf": given or "", "ms": given or ""} if entry is None else {"hf": entry.hf_id, "ms": entry.ms_id}
    for hub in hubs():
        if "/" not in names[hub.key]:
            continue
        for place, _ in hub.cached(names[hub.key], args.model_revision):
            if (place / CONFIG).is_file():
                return place
    made = packaged.cache_directory() / packaged.MODEL_TYPE
    if entry is not None and entry.hf_id == packaged.HF_ID and args.model_revision is None and (made / CONFIG).is_file():
        return made
    wanted = given or str(args.model_type)
    name = names["hf"] if "/" in names["hf"] else wanted
    raise UserError(
        f"no {CONFIG} of {wanted!r} is on this machine, and a plan fetches nothing.",
        where="--model_id_or_path" if given is not None else "--model_type",
        fix=f"fetch that one file: hf download {name} {CONFIG} --local-dir DIR (or modelscope download --model {names['ms'] or name} "
        f"{CONFIG} --local_dir DIR), then --model_id_or_path DIR",
    )
