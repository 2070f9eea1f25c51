"""Weights of a built model that stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from megaswift.megatron.layer_specs import local_name
from megaswift.models.adapters import local_module

if TYPE_CHECKING:
    from megaswift.megatron.model import ChatModel


def freeze(model: ChatModel, names: Iterable[str]) -> None:
    """Let some parameters of a stage, by their names in the whole model, need no gradient; before it is wrapped."""
    frozen, first, count = set(names), model.first_layer, len(model.decoder.layers)
    own = dict(model.named_parameters())
    for name in frozen:
        local = local_module(name, first, count) if name.startswith("decoder.layers.") else name
        if local is not None and local_name(local) in own:
            own[local_name(local)].requires_grad_(False)
    embedding = "embedding.word_embeddings.weight" in frozen
    if embedding and model.share_embeddings_and_output_weights and model.post_process and "output_layer.weight" in own:
        own["output_layer.weight"].requires_grad_(False)  # the last stage's copy of a tied embedding
    if embedding:
        need_gradients_of_inputs(model)


def need_gradients_of_inputs(model: Any) -> None:
    """Let what goes into the first layer need a gradient where layers are recomputed, though no weight before it does.

    A recomputed layer whose input needs no gradient gives none to its weights, and says nothing.
    """
    if model.pre_process and model.config.recompute_granularity is not None:
        model.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(torch.is_grad_enabled()))
