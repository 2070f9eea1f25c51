"""A model folder's config.json as transformers' config object, checked, and the tensors that it asks for: no code of the folder runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megaswift.errors import DataError, UserError, first_line
from megaswift.models import family_of, parameters_of
from megaswift.models.family import is_tied, sizes_of
from megaswift.models.parameters import hf_shapes
from megaswift.models.prediction import layers_ahead
from megaswift.weights.hf.block_fp8 import FIELD, blocks_of, required_blocks
from megaswift.weights.hf.folder import read_config
from megaswift.weights.hf.mxfp4 import is_mxfp4

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
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


def check_source(source: HFCheckpoint, config: PreTrainedConfig) -> None:
    """Raise DataError unless the folder holds exactly the tensors of its config (a tied copy of the embedding, and layers that predict ahead, are allowed)."""
    import torch

    tied = is_tied(config)
    ignorable = {"lm_head.weight"} if tied else set()
    ignorable |= {name for name in source.names if name.endswith(".rotary_emb.inv_freq")}
    ignorable |= set(layers_ahead(config))
    source.check_names(hf_shapes(parameters_of(config)), ignorable)
    copied = tied and "lm_head.weight" in source.names
    if copied and not torch.equal(source.tensor("lm_head.weight"), source.tensor("model.embed_tokens.weight")):
        raise DataError(
            "tie_word_embeddings is true, but lm_head.weight is not equal to the embedding.",
            where="lm_head.weight",
            fix="set tie_word_embeddings to false in config.json if the output layer is its own",
        )
