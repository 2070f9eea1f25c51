"""Whether a Hugging Face folder holds exactly the tensors that its config asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaswift.errors import DataError
from megaswift.models import parameters_of
from megaswift.models.family import is_tied
from megaswift.models.parameters import hf_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.weights.hf.read import HFCheckpoint


def check_source(source: HFCheckpoint, config: PreTrainedConfig) -> None:
    """Raise DataError unless the folder holds exactly the tensors of its config (a tied copy of the embedding is allowed)."""
    import torch

    tied = is_tied(config)
    ignorable = {"lm_head.weight"} if tied else set()
    ignorable |= {name for name in source.names if name.endswith(".rotary_emb.inv_freq")}
    source.check_names(hf_shapes(parameters_of(config)), ignorable)
    copied = tied and "lm_head.weight" in source.names
    if copied and not torch.equal(source.tensor("lm_head.weight"), source.tensor("model.embed_tokens.weight")):
        raise DataError(
            "tie_word_embeddings is true, but lm_head.weight is not equal to the embedding.",
            where="lm_head.weight",
            fix="set tie_word_embeddings to false in config.json if the output layer is its own",
        )
