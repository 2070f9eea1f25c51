"""A model folder's config.json as transformers' config object, checked: no code from the folder ever runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megaswift.errors import DataError, UserError
from megaswift.models import family_of
from megaswift.models.family import sizes_of
from megaswift.weights.hf.folder import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_config(directory: Path) -> PreTrainedConfig:
    """The config of a model folder, its family known and every field honoured or neutral.

    Raises:
        DataError: config.json is missing, not JSON, or names sizes that no model has.
        UserError: the family or a field is not supported.
    """
    path = directory / "config.json"
    values = read_config(directory)
    family = family_of(str(values.get("model_type")), str(path))
    if values.get("quantization_config") is not None:
        raise UserError(
            "the weights are quantized.", where=f"{path}: quantization_config", fix="give the model in bf16, fp16 or fp32"
        )
    if values.get("per_layer_config"):
        raise UserError(
            "per_layer_config gives layers of different forms, which is not supported.",
            where=f"{path}: per_layer_config",
            fix="train this model elsewhere; nothing was converted",
        )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except Exception as error:  # transformers validates with several error classes
        reason = (str(error) or "no reason given").splitlines()[0]
        raise DataError(
            f"config.json is not valid: {type(error).__name__}: {reason}", where=str(path), fix="fetch this file again"
        ) from error
    family.audit(config, str(path))
    sizes = sizes_of(config)
    if sizes.heads % sizes.kv_heads:
        raise DataError(f"{sizes.heads} attention heads are no multiple of {sizes.kv_heads} key/value heads.", where=str(path))
    return config
