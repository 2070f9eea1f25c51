"""A model folder's config.json as transformers' config object, checked, and the tensors that it asks for: no code of the folder runs."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError, UserError, first_line
from megaswift.models import families, family_of, parameters_of
from megaswift.models.family import is_tied, sizes_of
from megaswift.models.parameters import hf_shapes
from megaswift.models.whole import text_of
from megaswift.weights.hf.block_fp8 import FIELD, blocks_of, required_blocks
from megaswift.weights.hf.folder import read_config
from megaswift.weights.hf.mxfp4 import is_mxfp4

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

    from megaswift.models.family import Family
    from megaswift.weights.hf.read import HFCheckpoint


def load_config(directory: Path, from_fp8: bool = False) -> PreTrainedConfig:
    """The config of a model folder, its family known and every field honoured or neutral.

    Args:
        from_fp8: take a folder whose weights are in FP8 by blocks, which are read as bf16 (`block_fp8`).

    Raises:
        DataError: config.json is missing, not JSON, or names sizes that no model has.
        UserError: the family or a field is not supported.
    """
    path = directory / "config.json"
    values = read_config(directory)
    family = family_of(str(values.get("model_type")), str(path))
    if is_mxfp4(values):  # what is read of such a folder is bf16
        values = {name: value for name, value in values.items() if name != FIELD}
    if values.get(FIELD) is not None:
        if from_fp8:
            required_blocks(values, str(path))
            values = {**values, FIELD: None}
        else:
            readable = blocks_of(values) is not None
            raise UserError(
                "the weights are quantized" + (" (FP8 in blocks)." if readable else "."),
                where=f"{path}: {FIELD}",
                fix="convert the folder first: swift export --to_megatron true --model_id_or_path DIR"
                if readable
                else "give the model in bf16, fp16 or fp32, or in MXFP4",
            )
    if values.get("per_layer_config"):
        raise UserError(
            "per_layer_config gives layers of different forms, which is not supported.",
            where=f"{path}: per_layer_config",
            fix="train this model elsewhere; nothing was converted",
        )
    try:
        config = text_config(family, values)
    except Exception as error:  # transformers validates with several error classes
        reason = first_line(error) if str(error).strip() else "no reason given"
        raise DataError(
            f"config.json is not valid: {type(error).__name__}: {reason}", where=str(path), fix="fetch this file again"
        ) from error
    family.audit(config, str(path))
    sizes = sizes_of(config)
    if sizes.heads % sizes.kv_heads:
        raise DataError(f"{sizes.heads} attention heads are no multiple of {sizes.kv_heads} key/value heads.", where=str(path))
    return config


def text_config(family: Family, values: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' config of what a config.json says, of whole models that of their text; nothing is checked."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    said = {**(family.whole.defaults if family.whole is not None else {}), **values}
    return text_of(CONFIG_MAPPING[values["model_type"]].from_dict(said))


def names_in_folder(source: HFCheckpoint) -> dict[str, str]:
    """Names of tensors in transformers' loaded model -> in this folder, where these differ; {} for models of a family that is not known."""
    family = families().get(str(source.config.get("model_type")))
    if family is None or family.whole is None:
        return {}
    parameters = parameters_of(load_config(source.path))
    return {part.held: part.name for parameter in parameters for part in parameter.hf if part.held is not None}


def check_source(source: HFCheckpoint, config: PreTrainedConfig) -> None:
    """Raise DataError unless the folder holds exactly the tensors of its config (a tied copy of the embedding, and what is carried along, are allowed)."""
    import torch

    family, parameters = family_of(config.model_type), parameters_of(config)
    head = family.whole.head if family.whole is not None else "lm_head.weight"
    tied = is_tied(config)
    ignorable = {head} if tied else set()
    ignorable |= {name for name in source.names if name.endswith(".rotary_emb.inv_freq")}
    ignorable |= set(family.carried(config))
    source.check_names(hf_shapes(parameters), ignorable)
    if family.whole is not None:
        absent = [mark for mark in family.whole.carried if not fnmatch.filter(source.names, mark)]
        if absent:
            raise DataError(
                f"the folder has the text model alone, without {', '.join(absent)}, and config.json is that of the whole model.",
                where=str(source.path),
                fix="fetch the model again",
            )
    copied = tied and head in source.names
    if copied and not torch.equal(source.tensor(head), source.tensor(parameters[0].hf[0].name)):
        raise DataError(
            f"tie_word_embeddings is true, but {head} is not equal to the embedding.",
            where=head,
            fix="set tie_word_embeddings to false in config.json if the output layer is its own",
        )
