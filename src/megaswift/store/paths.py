"""Where things lie in a Megatron directory, and which checkpoint in it is the newest complete one.

{name}-tp{tp}-pp{pp}/                 made by `swift export --to_megatron`
    latest_checkpointed_iteration.txt   release
    release/                            torch_dist files and manifest.json
    export_args.json, config.json, tokenizer files
output/{name}-tp{tp}-pp{pp}/vN-time/  made by `swift sft`
    latest_checkpointed_iteration.txt   10
    iter_0000010/                       torch_dist files and manifest.json
    initial_adapter/                    what an adapter began as, where that was taken out of the base
    iter_0000010-hf/                    its Hugging Face copy (--save_safetensors true)
    reference_logps.npz                 what the reference says of every answer (swift rlhf)
    sft_args.json, plan.json, logging.jsonl, runs/, images/, config.json, tokenizer files
"""

from __future__ import annotations

import re
from pathlib import Path

from megaswift.errors import DataError, UserError
from megaswift.store.manifest import quick_check

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
INITIAL_ADAPTER = "initial_adapter"  # of a run whose adapter began as a part of the base
REFERENCE_FILE = "reference_logps.npz"  # of a run whose objective compares with a reference
_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_directory(root: Path, iteration: int) -> Path:
    """Directory of the checkpoint after `iteration` steps."""
    return root / f"iter_{iteration:07d}"


def hf_copy_of(checkpoint: Path) -> Path:
    """Where the Hugging Face copy of a checkpoint lies (--save_safetensors)."""
    return checkpoint.with_name(f"{checkpoint.name}-hf")


def iteration_of(directory: Path) -> int:
    """Steps behind a checkpoint directory; 0 for converted weights."""
    match = _ITERATION.fullmatch(directory.name)
    return int(match.group(1)) if match else 0


def is_megatron_directory(path: Path) -> bool:
    """Whether `path` is a directory that export or sft made, complete or not."""
    return path.is_dir() and ((path / TRACKER).exists() or (path / RELEASE).is_dir() or any(_iterations(path)))


def candidates(root: Path) -> list[Path]:
    """Checkpoint directories under `root`, newest first; converted weights come last. Unfinished ones are left out."""
    found = sorted(_iterations(root), key=iteration_of, reverse=True)
    return found + ([root / RELEASE] if (root / RELEASE).is_dir() else [])


def find_checkpoint(root: Path, iteration: int | None = None) -> Path:
    """The checkpoint to read: the named iteration, or the newest one whose files are all there.

    The tracker file is only a hint: files decide. Raises UserError where `root` is no Megatron directory, DataError
    where every candidate is incomplete.
    """
    if not root.is_dir():
        raise UserError(
            f"there is no directory {root}.",
            where=str(root),
            fix=gguf_fix(root) or "make it with: swift export --model_type NAME --to_megatron true",
        )
    found = candidates(root)
    if iteration is not None:
        found = [path for path in found if iteration_of(path) == iteration]
        if not found:
            raise UserError(
                f"there is no checkpoint of iteration {iteration}.",
                where=str(root),
                fix=f"found: {', '.join(p.name for p in candidates(root)) or 'none'}",
            )
    if not found:
        raise UserError(
            "this directory holds no Megatron checkpoint.",
            where=str(root),
            fix=gguf_fix(root) or "make one with: swift export --model_type NAME --to_megatron true",
        )
    problems = []
    for path in found:
        problem = quick_check(path)
        if problem is None:
            return path
        problems.append(f"{path.name}: {problem}")
    raise DataError(
        "no checkpoint in this directory is complete: " + "; ".join(problems), where=str(root), fix="use another directory"
    )


def _iterations(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and _ITERATION.fullmatch(path.name)]


def gguf_fix(path: Path) -> str:
    """What to do with a GGUF file, or a directory that holds one; "" where there is none."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.suffix.lower() == ".gguf" else []
    if not files:
        return ""
    return (
        "a GGUF file is what llama.cpp runs, most often rounded to few bits: give the model that it was made from; where that is lost, "
        f"transformers (with `pip install gguf`) turns it into a folder: AutoModelForCausalLM.from_pretrained({str(files[0].parent)!r}, "
        f"gguf_file={files[0].name!r}).save_pretrained('FOLDER'), and the same with AutoTokenizer"
    )
