"""A model's config and tokenizer files for a head of scores, in a small directory of the cache; the weights stay where they are."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from megaswift.errors import UserError
from megaswift.models import families
from megaswift.models.head import ENDING, ScoreHead
from megaswift.store.cache import cache_root, published
from megaswift.weights.hf.folder import CONFIG, read_config, side_files
from megaswift.weights.hf.tokenizer import read_tokenizer

HEAD_FIELDS = ("architectures", "id2label", "label2id", "num_labels", "pad_token_id", "problem_type")
_FORMAT = "1"  # changes when other files are made of the same ones


def with_score_head(model_dir: Path, head: ScoreHead) -> Path:
    """The files of a language model for its layers with a head of scores in place of the output layer.

    Their pad token is the tokenizer's, by which transformers finds the token that is scored in rows that this tokenizer padded;
    without one that of the config, or the end token. A model that has a head already keeps its own.

    Raises UserError where transformers has no such class for the model.
    """
    values = read_config(model_dir)
    name = class_with_scores(str(values.get("model_type")), str(model_dir / CONFIG))
    tokenizer = read_tokenizer(model_dir)
    known = [tokenizer.pad_token_id, values.get("pad_token_id"), tokenizer.eos_token_id]
    if any(str(one).endswith(ENDING) for one in values.get("architectures") or ()):
        known.insert(0, values.get("pad_token_id"))
    labels = {str(number): f"LABEL_{number}" for number in range(head.labels)}
    made: dict[str, Any] = {key: value for key, value in values.items() if key not in ("num_labels", "problem_type")}
    made |= {
        "architectures": [name],
        "id2label": labels,
        "label2id": {label: int(number) for number, label in labels.items()},
        "pad_token_id": next(one for one in known if one is not None),
    }
    if head.problem is not None:
        made["problem_type"] = head.problem
    files = side_files(model_dir)
    key = hashlib.sha256(json.dumps([_FORMAT, made]).encode())
    for file in files:
        key.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    target = cache_root() / "heads" / key.hexdigest()[:32]
    if not target.is_dir():
        with published(target) as directory:
            for file in files:
                shutil.copyfile(file, directory / file.name)
            (directory / CONFIG).write_text(json.dumps(made, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return target


def class_with_scores(hf_type: str, where: str) -> str:
    """transformers' class of such a model of a type. Raises UserError where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    name = KNOWN.get(hf_type)
    if name is None:
        others = ", ".join(sorted(one for one in families() if one in KNOWN))
        raise UserError(
            f"transformers has no {ENDING} for model_type {hf_type!r}, so nothing could load what would be trained.",
            where=where,
            fix=f"use a model of another family: {others}",
        )
    return str(name)
