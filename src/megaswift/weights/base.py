"""The weights that an adapter stands beside, known by what they hold: SHA-256 over the tensors, whatever form they lie in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError
from megaswift.models import parameters_of
from megaswift.models.head import SCORE
from megaswift.models.parameters import HFTensor
from megaswift.store.cache import cache_root
from megaswift.store.manifest import MANIFEST, read_manifest
from megaswift.store.publish import put
from megaswift.weights.hf.read import HFCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_THREADS = 2


def base_digest(directory: Path, config: PreTrainedConfig) -> str:
    """SHA-256 of the names and the raw values of a model's Hugging Face tensors; of one that holds all experts, of each by itself.

    Args:
        directory: a Hugging Face folder, or converted Megatron weights, whose manifest recorded them.

    Of a model with a head of scores the head is left out, and a language model's output layer: an adapter brings its own head.

    The same for the folder and for what was converted from it without a cast. Raises DataError for trained Megatron weights:
    they have no such record.
    """
    parts = {part.label: part for parameter in parameters_of(config) for part in parameter.hf if part.name != SCORE}
    recorded = read_manifest(directory).get("hf_tensors") if (directory / MANIFEST).is_file() else None
    if isinstance(recorded, dict) and all(label in recorded for label in parts):
        return _of({label: str(recorded[label]) for label in parts})
    if not (directory / "config.json").is_file():
        raise DataError(
            "an adapter cannot begin from these weights: nothing recorded what they hold, tensor by tensor.",
            where=str(directory),
            fix="export them first (swift export --ckpt_dir RUN --to_hf true) and begin from that folder",
        )
    return _of(digests_of(directory, parts))


def _of(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def digests_of(folder: Path, parts: Mapping[str, HFTensor]) -> dict[str, str]:
    """SHA-256 of parts of a folder's tensors by their labels; read once for each state of the files, and kept in the cache."""
    from megaswift.weights.convert.model import digest

    source = HFCheckpoint.open(folder)
    files = sorted({source.file_of(part.name).resolve() for part in parts.values()})
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    kept = cache_root() / "tensors" / f"{hashlib.sha256(json.dumps(state).encode()).hexdigest()}.json"
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        if isinstance(found, dict) and set(parts) <= set(found):
            return {label: found[label] for label in parts}
    except (OSError, ValueError):
        found = None

    def one(part: HFTensor) -> str:
        value = digest(part.of(source.tensor(part.name)))
        source.release(part.name)
        return value

    with ThreadPoolExecutor(_THREADS) as pool:
        made = dict(zip(parts, pool.map(one, parts.values()), strict=True))
    kept.parent.mkdir(parents=True, exist_ok=True)
    put(kept, json.dumps((found if isinstance(found, dict) else {}) | made), durable=False)
    return made


def base_record(checkpoint: Path, root: Path, config: PreTrainedConfig, origin: str | None) -> dict[str, Any]:
    """What a run's checkpoints say of their base.

    Args:
        checkpoint: the weights; root: the directory that was named for them.
        origin: how they are called elsewhere ("hf:owner/name", a directory); None: as the weights' own manifest says.
    """
    named = origin
    if named is None and (checkpoint / MANIFEST).is_file():
        named = dict(read_manifest(checkpoint).get("source") or {}).get("origin")
    return {
        "digest": base_digest(checkpoint, config),
        "path": str(checkpoint.absolute()),
        "origin": named or str(root.absolute()),
    }
