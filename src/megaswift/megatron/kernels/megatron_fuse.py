"""Lets a GPTModel's input embedding use this folder's operation, without a change of names or checkpoints."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

from megaswift.megatron.compat import become
from megaswift.megatron.kernels.megatron_layer import FusedEmbedding


def fuse_embedding(model: Any) -> Any:
    """Let the embedding add its gradient to main_grad; to be called before the model is wrapped for data parallelism.

    A tied output layer must then compute its loss by `linear_cross_entropy(..., shared_with_embedding=model.pre_process)`.
    """
    if not model.pre_process or type(model.embedding.word_embeddings) is not VocabParallelEmbedding:
        return model
    become(model.embedding.word_embeddings, FusedEmbedding)
    # Megatron-Core sets it so that two uses' placeholders sum to zero; here only one of the two uses makes a placeholder.
    model.embedding.word_embeddings.weight.zero_out_wgrad = False
    return model
