"""Where two forward passes part: the hidden states after every layer, as one number a layer that no layout changes.

The number is the sum of squares over all real tokens of a global batch. Padding takes no part; parts that several ranks
hold are counted once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaswift.megatron.kernels.context_parallel import shard_batch
from megaswift.models.whole import decoder_of

if TYPE_CHECKING:
    from megaswift.data.batches import MicroBatch
    from megaswift.data.store import TokenRows

EMBEDDING = "model.embed_tokens"


def names(layers: int) -> list[str]:
    """What the numbers belong to, by Hugging Face name and in the order of the computation."""
    return [EMBEDDING, *(f"model.layers.{number}" for number in range(layers))]


def of_engine(trainer: Any, batches: list[MicroBatch], rows: TokenRows) -> list[float]:
    """The numbers of a global batch, from this rank's micro batches; called by all ranks, equal on all.

    It runs the forward pass once more, as an evaluation does, before the first step.
    """
    from megatron.core import parallel_state

    config = trainer.bare_model.config
    tp = parallel_state.get_tensor_model_parallel_rank()
    split = config.sequence_parallel
    sums = torch.zeros(1 + config.num_layers, dtype=torch.float64, device=batches[0].tokens.device)
    calls = [0] * (1 + config.num_layers)
    masks = [_own_tokens(batch, rows).t().to(sums.device) for batch in batches]

    def add(place: int, hidden: Tensor) -> None:
        mask = masks[calls[place]]
        calls[place] += 1
        if split:
            mask = mask.chunk(parallel_state.get_tensor_model_parallel_world_size(), dim=0)[tp]
        elif tp:
            return
        sums[place] += hidden.double().square().sum(-1)[mask].sum()

    with contextlib.ExitStack() as stack:
        for layer in (layer for chunk in trainer.chunks for layer in chunk.decoder.layers):
            if layer.layer_number == 1:
                entry = layer.register_forward_pre_hook(
                    lambda _, args, kwargs: add(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
                )
                stack.callback(entry.remove)
            hook = layer.register_forward_hook(lambda _, __, output, place=layer.layer_number: add(place, _tensor(output)))
            stack.callback(hook.remove)
        trainer.evaluate(iter([batches]))
    dist.all_reduce(sums)
    return list(sums.tolist())


@contextlib.contextmanager
def of_transformers(model: Any) -> Iterator[list[float]]:
    """Adds up the numbers of every sample that runs, alone and without padding, inside this context."""
    layers = decoder_of(model).layers
    sums = [0.0] * (1 + len(layers))

    def add(place: int, hidden: Tensor) -> None:
        sums[place] += float(hidden.detach().double().square().sum())

    with contextlib.ExitStack() as stack:
        entry = layers[0].register_forward_pre_hook(  # embeddings with the factor that some families have
            lambda _, args, kwargs: add(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        stack.callback(entry.remove)
        for number, layer in enumerate(layers, start=1):
            stack.callback(layer.register_forward_hook(lambda _, __, output, place=number: add(place, _tensor(output))).remove)
        yield sums


def _own_tokens(batch: MicroBatch, rows: TokenRows) -> Tensor:
    """The real tokens among those that this rank works on: under context parallelism these are slices of the rows."""
    from megatron.core import parallel_state

    real = _real_tokens(batch, rows)
    if parallel_state.get_context_parallel_world_size() == 1:
        return real
    return shard_batch(batch, parallel_state.get_context_parallel_group()).share.take(real)


def _real_tokens(batch: MicroBatch, rows: TokenRows) -> Tensor:
    """bool [b, s]: which places hold a token of a sample."""
    count, length = batch.tokens.shape
    sizes = [sum(len(sample.ids) for sample in rows.samples(row)) for row in batch.sample_ids]
    if count == 1:
        sizes = [sum(sizes)]
    return torch.arange(length)[None] < torch.tensor(sizes)[:, None]


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
