"""How many values a layer keeps of a token for the backward pass, and what a backward pass needs beside: by how it is recomputed.

Counted from the operations of `megatron/kernels`: what each saves. docs/plan.md has the counts beside measured memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaswift.models import family_of
from megaswift.models.family import sizes_of
from megaswift.models.kinds import GATED_DELTA, Kind
from megaswift.models.rules import Sizes
from megaswift.models.stages import passes_in_flight, stage_layers
from megaswift.run.spec import Parallel, Run
from megaswift.weights.dtypes import BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Largest piece of logits in bytes: on a GPU, of a frozen output layer there, on a CPU (`kernels/linear_cross_entropy.py`).
HEAD_BYTES = {("cuda", False): 5 << 29, ("cuda", True): 5 << 27, ("cpu", False): 1 << 27, ("cpu", True): 1 << 27}


def layer_activations(run: Run, config: PreTrainedConfig) -> int:
    """The most values that a layer keeps for the backward passes of all micro batches in flight, with rows of max_length."""
    parallel = run.parallel
    passes = passes_in_flight(parallel.pp, parallel.vpp, run.batch.micro_batches)
    return passes * tokens_of(run) * max(kept_by_layers(run, config))


def tokens_of(run: Run) -> int:
    """Tokens of a micro batch on a rank, with rows of max_length."""
    return run.batch.micro_batch_size * run.batch.max_length * run.objective.answers // run.parallel.cp


def kept_by_layers(run: Run, config: PreTrainedConfig, recompute: str | None = None) -> list[int]:
    """Values that each layer of the whole model keeps of a token, on a rank that has it.

    Args:
        recompute: as `Memory.recompute` has it; None: the run's own.
    """
    kind_of, sizes = family_of(config.model_type).layers(config), sizes_of(config)
    how = run.memory.recompute if recompute is None else recompute
    adapter = run.method.adapter
    found = {kind: _kept(kind, sizes, run.parallel, how, adapter is not None and adapter.dora) for kind in set(kind_of)}
    return [found[kind] for kind in kind_of]


def _kept(kind: Kind, sizes: Sizes, parallel: Parallel, recompute: str, dora: bool) -> int:
    """Of one layer.

    Its input, what follows its two norms and the sum after attention; queries, keys and values; attention's result; both halves of
    the first MLP product and their SwiGLU, as far as they are kept. Of experts, a token's row and the first product for every
    expert that it goes to, evenly spread.
    """
    tp = parallel.tp
    along = tp if parallel.sequence_parallel else 1  # what stands between the products is split along the sequence
    if recompute == "layers":
        return sizes.hidden // along
    norms = {"before": 3 if kind.beside else 4, "behind": 4, "around": 6}[kind.norms] * sizes.hidden // along
    result = sizes.heads * sizes.head_dim
    return (
        norms
        + (_attention(kind, sizes) + (0 if kind.delta is not None else result)) // tp
        + _mlp(kind, sizes, parallel, recompute, dora)
    )


def _attention(kind: Kind, sizes: Sizes) -> int:
    """Queries, keys and values in all heads, with the copies that norms of heads and gates need."""
    if kind.attention == GATED_DELTA and kind.delta is not None:
        # What its products give, what its convolution does, and heads in fp32.
        return 4 * kind.delta.channels + 2 * kind.delta.heads * kind.delta.value_dim
    if kind.latent is not None:  # with the padding that kernels ask for, and its states
        latent = kind.latent
        return 3 * sizes.heads * (latent.still + latent.turning) + (latent.query or 0) + latent.key_value
    query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    normed = kind.qk_norm or kind.qk_norm_rotated
    gates = 2 * query if kind.output_gate else 0
    return query + 2 * key + (2 * (query + key) if normed else 0) + gates


def _mlp(kind: Kind, sizes: Sizes, parallel: Parallel, recompute: str, dora: bool) -> int:
    experts = kind.experts
    if experts is None:
        return _dense_mlp(kind, recompute, dora) * sizes.ffn // parallel.tp
    rows = experts.chosen * (sizes.hidden + 2 * experts.ffn // parallel.etp) * parallel.etp
    return rows // parallel.tp + _dense_mlp(kind, recompute, dora) * experts.shared_ffn // parallel.tp


def _dense_mlp(kind: Kind, recompute: str, dora: bool) -> int:
    """In parts of the MLP's width.

    Args:
        dora: an adapter with lengths of rows, beside which nothing of the MLP is computed again.
    """
    if kind.mlp == "plain":
        return 2
    return {"swiglu": 3 if dora else 2, "mlp": 0}.get(recompute, 3)


def beside_layers(run: Run, config: PreTrainedConfig) -> int:
    """Bytes that the backward pass of one layer needs at its height beside what layers keep.

    The gradients of the layer's input and of its MLP's inner values; of a recomputed layer all that it would keep; a matrix held in
    few bits as it is multiplied; of experts the gradient of all matrices of a product before it goes into fp32.
    """
    sizes, parallel, element = sizes_of(config), run.parallel, BYTES[run.precision.dtype]
    kinds, tokens = family_of(config.model_type).layers(config), tokens_of(run)
    again = max(kept_by_layers(run, config, "swiglu")) if run.memory.recompute == "layers" else 0
    widths, matrices = [], [0]
    for kind in set(kinds):
        experts = kind.experts
        if experts is None:
            widths.append(sizes.ffn // parallel.tp + 2 * sizes.hidden)
            matrices.append(2 * sizes.ffn * sizes.hidden // parallel.tp)
        else:
            rows = experts.chosen * (experts.ffn + 2 * sizes.hidden) // parallel.tp
            widths.append(rows + 2 * sizes.hidden)
            matrices.append(2 * experts.count * experts.ffn * sizes.hidden // (parallel.ep * parallel.etp))
    adapter = run.method.adapter
    bits = adapter is not None and adapter.bits is not None
    routed = adapter is None and any(kind.experts is not None for kind in kinds)
    return tokens * (again + max(widths)) * element + (max(matrices) * element if bits or routed else 0)


def head_bytes(run: Run, config: PreTrainedConfig) -> int:
    """Bytes of the output layer's height: the largest piece of logits, and the gradient of its inputs."""
    sizes, parallel, element, tokens = sizes_of(config), run.parallel, BYTES[run.precision.dtype], tokens_of(run)
    vocab = -(-sizes.vocab // parallel.tp)
    frozen = run.method.adapter is not None or any(name.startswith("output_layer.") for name in run.method.frozen)
    budget = HEAD_BYTES[parallel.device, frozen]
    pieces = max(1, -(-tokens * vocab * element // budget))
    rows = min(tokens, (-(-tokens // pieces) + 127) // 128 * 128)
    return rows * vocab * element + 2 * tokens * sizes.hidden * element


def kept_in_flight(run: Run, config: PreTrainedConfig) -> list[int]:
    """Values that each pipeline rank keeps at once, for the micro batches whose backward pass is still to come; what is offloaded left out."""
    parallel, layers, tokens = run.parallel, kept_by_layers(run, config), tokens_of(run)
    counts = stage_layers(config, parallel.pp, parallel.vpp)
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    found = []
    for rank in range(parallel.pp):
        own = [
            n for stage in range(rank, len(counts), parallel.pp) for n in range(starts[stage], starts[stage] + counts[stage])
        ]
        on_device = sum(layers[n] for n in own[run.memory.offloaded_layers :])
        passes = _passes(rank, parallel, run.batch.micro_batches)
        returning = 2 * max(layers) if run.memory.offloaded_layers else 0  # layers whose copies are on the way
        found.append(int(tokens * (on_device * passes + returning)))
    return found


def _passes(rank: int, parallel: Parallel, micro_batches: int) -> float:
    """Passes through all layers of a pipeline rank that are kept at once, at most: `passes_in_flight` of the first rank, fewer behind it."""
    if parallel.vpp == 1:
        return min(parallel.pp - rank, max(micro_batches, 1))
    ahead = passes_in_flight(parallel.pp, parallel.vpp, micro_batches)
    return max(1.0, ahead - rank)
