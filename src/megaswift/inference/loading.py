"""Loads a Hugging Face folder into transformers: strict, local, quiet, and without running code from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megaswift.errors import DataError, UserError, first_line
from megaswift.launch.versions import has_bf16
from megaswift.models import families
from megaswift.models.head import ENDING
from megaswift.models.prediction import without_layers_ahead
from megaswift.models.whole import text_of
from megaswift.weights.hf.config import check_source, text_config
from megaswift.weights.hf.read import UNTIED, HFCheckpoint
from megaswift.weights.hf.tokenizer import load_tokenizer, quiet_transformers
from megaswift.weights.torch_dtypes import TORCH_DTYPES

__all__ = ["load_model", "load_tokenizer", "pick_dtype", "quiet_transformers"]


def pick_dtype(name: str) -> torch.dtype:
    """The torch dtype of --dtype; AUTO is bf16 on a GPU that has it (fp16 on older ones) and fp32 on a CPU."""
    if name != "AUTO":
        return TORCH_DTYPES[name]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if has_bf16() else torch.float16


def load_model(path: Path, dtype: str = "AUTO") -> Any:
    """The model of a folder in evaluation mode, on the GPU if there is one.

    Raises DataError where a weight is missing, left over or of another shape, UserError where memory is too small.
    """
    source = HFCheckpoint.open(path)  # names the damaged file; transformers' errors do not
    options = _require_tensors(source)
    weight_bytes = source.total_bytes
    with quiet_transformers():
        try:
            pair: Any = _class_of(source).from_pretrained(
                path,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=pick_dtype(dtype),
                device_map=_device_map(weight_bytes),
                output_loading_info=True,
                **options,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the GPU's memory is too small for the model.", where=str(path), fix="use --dtype bf16, or a larger GPU"
            ) from error
        except Exception as error:
            fix = "the folder must hold a text model that this version of transformers knows, as safetensors"
            raise DataError(f"the model cannot be read: {first_line(error)}", where=str(path), fix=fix) from error
    model, report = pair
    _require_complete(report, path, model.config)
    return model.eval()


def _require_tensors(source: Any) -> dict[str, Any]:
    """Raise DataError where the files hold other tensors than config.json asks for: before memory is taken for what it asks for.

    Returns what else transformers must be told to load the model (`Family.loading`). Only for families whose tensors we know; transformers compares the names of the others after it has built the model.
    """
    if source.config.get("model_type") not in list(families()):
        return {}
    try:
        config = text_config(families()[source.config["model_type"]], source.config)
    except Exception:  # transformers says below what is wrong with it
        return {}
    check_source(source, config)
    return families()[config.model_type].loading(config)


def _class_of(source: Any) -> Any:
    """transformers' class for what a folder's config.json names: with an output layer, a head of scores, or a tower for pictures, too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification

    if any(str(name).endswith(ENDING) for name in source.config.get("architectures") or ()):
        return AutoModelForSequenceClassification
    family = families().get(str(source.config.get("model_type")))
    return AutoModelForCausalLM if family is None or family.whole is None else AutoModelForImageTextToText


def _device_map(weight_bytes: int) -> str | None:
    """Where weights go: CPU, one GPU, or several GPUs when one has too little free memory."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return "auto" if torch.cuda.device_count() > 1 and weight_bytes * 1.3 > free else "cuda"


def _require_complete(loaded: dict[str, Any], path: Path, config: Any) -> None:
    """transformers fills missing weights with random numbers and goes on; we do not."""
    for key, what in (
        ("missing_keys", "are missing"),
        ("mismatched_keys", "have another shape"),
        ("unexpected_keys", "are not part of the model"),
    ):
        names = sorted(name if isinstance(name, str) else name[0] for name in loaded.get(key) or ())
        if key == "unexpected_keys" and getattr(config, "model_type", None) in families():
            names = without_layers_ahead(names, text_of(config))
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            fix = UNTIED if names == ["lm_head.weight"] and key == "missing_keys" else "convert or download the model again"
            raise DataError(f"{len(names)} tensors {what}: {shown}", where=str(path), fix=fix)
