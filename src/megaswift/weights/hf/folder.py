"""What a Hugging Face model directory holds: its config, which weight files, and the side files that travel with it.

Names that come from inside the directory (the index) are not trusted: none may lead out of it, except the links of a hub
cache into its own blobs.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megaswift.errors import DataError, UserError
from megaswift.models.whole import TEXT_CONFIG
from megaswift.store.manifest import changed_fields
from megaswift.store.paths import gguf_fix
from megaswift.weights.hf.json_files import inside, read_json
from megaswift.weights.hf.pickled import pickled_files

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"

# What a run's directory holds beside its checkpoints and the model's own files.
RUN_FILES = (
    "sft_args.json", "run.json", "plan.json", "job.json", "logging.jsonl", "latest_checkpointed_iteration.txt", "hang-rank*.txt",
    "nonfinite_step_*.json", "spike_step_*.json",
)  # fmt: skip

# Files that are not side files: weights in any format, code, pickles, traces of a training run, and what hubs and we
# write beside a model and into a run. A model card describes the published model, not the one that comes out of a training.
NOT_SIDE_FILES = (
    ".*", "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npy", "*.npz", "*.h5",
    "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.tar", "*.zip", "*.py", "*.pyc", "*.ipynb", "*.sh",
    "readme*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf", "*.log", "*.lock", "*.tmp", "events.out.*",
    "export_args.json", "args.json", "manifest.json", "conversion.html", "trainer_state.json",
    "training_args.json", "*_results.json", "*.sig", *RUN_FILES,
)  # fmt: skip

# Fields whose value would be used as a size: the largest that is believed.
_SIZE_LIMITS = {
    "num_hidden_layers": 10_000, "hidden_size": 2**20, "intermediate_size": 2**23, "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16, "head_dim": 2**16, "vocab_size": 2**24, "max_position_embeddings": 2**32,
    "num_labels": 2**20,  # transformers makes a name for each
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises UserError where it is missing, not a JSON object, or names absurd sizes.

    Nothing in it is ever run: `auto_map` is data here like any other field.
    """
    file = path / CONFIG
    if not file.exists():
        raise UserError(
            f"{CONFIG} is missing: this is not a Hugging Face model directory.", where=str(path), fix=_other_kind(path)
        )
    try:
        config = read_json(inside(path, file))
    except DataError as error:
        raise UserError(error.what, where=error.where, fix=error.fix) from error
    text = config.get(TEXT_CONFIG)
    for values in (config, text if isinstance(text, dict) else {}):
        for name, limit in _SIZE_LIMITS.items():
            value = values.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise UserError(
                    f"{CONFIG} says {name} = {value!r}; expected a whole number from 1 to {limit:,}.", where=str(file)
                )
    return config


def check_config(root: Path, content: dict[str, Any]) -> None:
    """Raise DataError where config.json in `root` is not the one that the weights were made with, naming the fields."""

    recorded = content.get("config")
    if not isinstance(recorded, dict):
        return
    changed = changed_fields(recorded, read_config(root))
    if changed:
        raise DataError(
            f"config.json was changed since these weights were made: {'; '.join(changed)}.",
            where=str(root / "config.json"),
            fix="put the original file back",
        )


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a LoRA adapter in PEFT's form."""
    return (path / ADAPTER_CONFIG).is_file()


def _other_kind(path: Path) -> str:
    """What to do with a directory that is something else."""
    if any((path / name).exists() for name in ("latest_checkpointed_iteration.txt", "metadata.json", ".metadata")):
        return "it looks like a Megatron checkpoint: give it as --resume_from_checkpoint or --ckpt_dir"
    if fix := gguf_fix(path):
        return fix
    inner = sorted(item.parent.name for item in path.glob(f"*/{CONFIG}"))
    return (
        f"did you mean {path / inner[0]}?" if inner else "give the directory that holds config.json and the safetensors files"
    )


def weight_map(path: Path) -> dict[str, str] | None:
    """Tensor name -> file name from the index, or None where the directory has no index.

    Raises DataError for an index that is not one, or that names a file which cannot be a file of this directory.
    """
    index = path / INDEX
    if not index.exists():
        return None
    named = read_json(inside(path, index)).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise DataError(f"{INDEX} has no weight_map.", where=str(index), fix="fetch this file again")
    for tensor, file in named.items():
        if not isinstance(file, str) or not _plain_name(file):
            raise DataError(
                f"{INDEX} places tensor {tensor!r} in {file!r}; only .safetensors files of this directory are read.",
                where=str(index),
                fix="fetch the model again from a source that you trust",
            )
    return named


def _plain_name(file: str) -> bool:
    printable = file.isprintable() and not any(mark in file for mark in ("/", "\\", "\0", ":"))
    return printable and file.endswith(".safetensors") and not file.startswith(".")


def weight_files(path: Path, allow_pickle: bool = False) -> list[Path]:
    """The weight files that make up the model: those of the index, else the only model file of the directory.

    Args:
        allow_pickle: where there are no safetensors, take pytorch_model.bin files.

    Raises DataError where there are none, or where it is not clear which ones are the model.
    """
    named = weight_map(path)
    shards = sorted(item for item in path.glob("*.safetensors") if not item.name.startswith((".", "consolidated", "adapter_")))
    if named is not None:
        files = sorted({path / name for name in named.values()})
        stray = [item.name for item in shards if item not in files and (item.name == WEIGHTS or "-of-" in item.name)]
        if stray:
            raise DataError(
                f"{len(stray)} weight files are not in {INDEX}: {', '.join(stray[:3])}.",
                where=str(path),
                fix="two models are mixed here: delete what does not belong, or fetch the index again",
            )
        return files
    if len(shards) == 1 and not re.search(r"-of-0*([2-9]|1\d)\d*\.", shards[0].name):  # not one of several
        return shards
    if WEIGHTS in [item.name for item in shards]:
        raise DataError(
            f"{WEIGHTS} and {len(shards) - 1} more weight files, but no {INDEX}.", where=str(path), fix="keep one of them"
        )
    if shards:
        raise DataError(
            f"{INDEX} is missing: {len(shards)} weight files are there.", where=str(path), fix="fetch the index as well"
        )
    pickles = sorted(item.name for item in path.glob("*") if item.suffix in (".bin", ".pt", ".pth"))
    if pickles and allow_pickle and (files := pickled_files(path)):
        return files
    if pickles:
        raise DataError(
            f"the weights are pickles ({pickles[0]}), which are not read: loading one can run code.",
            where=str(path),
            fix="take the safetensors version; or convert it with swift export --to_megatron true --allow_pickle true, "
            "which reads tensors only and runs nothing",
        )
    raise DataError(
        "no safetensors file in the model directory.", where=str(path), fix=gguf_fix(path) or "fetch the model again"
    )


def incomplete(path: Path) -> str:
    """Why a directory cannot be used as a model, or "" where it looks whole (file contents are not looked at)."""
    try:
        read_config(path)
        absent = [file.name for file in weight_files(path) if not file.exists()]
    except (DataError, UserError) as error:
        return error.what
    return f"{len(absent)} weight files are missing, for example {absent[0]}." if absent else ""


def side_files(path: Path) -> list[Path]:
    """Config, tokenizer, chat template, licence: every file of a model directory that is no weight, code or by-product."""
    found = sorted(item for item in path.iterdir() if item.is_file())
    return [inside(path, item) for item in found if not any(fnmatch(item.name.lower(), mark) for mark in NOT_SIDE_FILES)]
