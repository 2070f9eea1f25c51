"""The one estimate of memory and disk: bytes of the fullest rank by cause, and of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megaswift.models import family_of, parameters_of
from megaswift.models.adapters import Lora, is_expert, packable
from megaswift.models.family import sizes_of
from megaswift.models.stages import by_rank, passes_in_flight, stage_layers, stage_weights
from megaswift.run.experts import experts_of, mlp_parts, mlp_widths
from megaswift.run.spec import Parallel, Run
from megaswift.weights.dtypes import BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.parameters import Parameter

# Bytes of a parameter's two moments.
STATE_BYTES = {"fp32": 8, "bf16": 4, "8bit": 2}
GRADIENT_BYTES = MASTER_BYTES = 4
# Of a value and its part of a scale: (bits, whether scales are held in 8 bits themselves). A row in 8 bits has one scale.
PACKED_BYTES = {(4, False): 0.5 + 4 / 64, (4, True): 0.5 + 1 / 64, (8, False): 1.0}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by cause."""

    device: dict[str, int]  # of the fullest rank: weights, gradients, optimizer
    host: dict[str, int] = field(default_factory=dict)  # page-locked, of the fullest rank: optimizer, activations at most


def estimate(run: Run, config: PreTrainedConfig) -> MemoryEstimate:
    """What the fullest rank holds, activations on the device left out: its layers, and embedding and output layer."""
    dtype, method, parallel = run.precision.dtype, run.method, run.parallel
    weights = trained = rank_weights(config, parallel)
    held = weights * BYTES[dtype]
    if method.adapter is not None or method.frozen:
        trained = trainable_of_rank(trained_parameters(method.adapter, method.frozen, config), config, parallel)
    if method.adapter is not None:
        lora = method.adapter
        share = packed_share(lora, config)
        each = BYTES[dtype] if lora.bits is None else PACKED_BYTES[lora.bits, lora.double]
        held = int(weights * ((1 - share) * BYTES[dtype] + share * each)) + trained * BYTES[dtype]
    each = STATE_BYTES[run.optimizer.state_dtype] + (0 if dtype == "fp32" else MASTER_BYTES)
    state = trained * each // (parallel.dp * parallel.cp)  # shared out over the ranks that have the same weights
    if trained == weights:  # those of experts are other ranks than those of the rest
        _, state = max(
            (dense + experts, dense * each // (parallel.dp * parallel.cp) + experts * each // parallel.expert_dp)
            for dense, experts in stage_parts(config, parallel)
        )
    device = {"weights": held, "gradients": trained * GRADIENT_BYTES, "optimizer": state}
    host = {}
    if run.memory.optimizer_on_host:
        device["optimizer"], host["optimizer"] = 0, state
    if run.memory.offloaded_layers:
        host["activations"] = run.memory.offloaded_layers * layer_activations(run, config) * BYTES[dtype]
    return MemoryEstimate(device, host)


def rank_weights(config: PreTrainedConfig, parallel: Parallel) -> int:
    """Parameters of the fullest rank."""
    return max(dense + experts for dense, experts in stage_parts(config, parallel))


def stage_parts(config: PreTrainedConfig, parallel: Parallel) -> list[tuple[int, int]]:
    """Parameters of a rank of each stage: without the experts among which tokens are routed, and of these."""
    whole, experts = (
        by_rank(stage_weights(config, parallel.pp, parallel.vpp, experts_only=only), parallel.pp) for only in (False, True)
    )
    return [((w - e) // parallel.tp, e // (parallel.ep * parallel.etp)) for w, e in zip(whole, experts)]


def layer_activations(run: Run, config: PreTrainedConfig) -> int:
    """The most values that a layer keeps for the backward passes of all micro batches in flight, with rows of max_length.

    Without recomputation: the layer's input, what follows its two norms, attention's result and the sum after it (5 x
    hidden), queries, keys and values, both halves of the first MLP product and their SwiGLU, as far as they are kept. Of experts, each token's row and
    the first product for every expert that it goes to, evenly spread.
    """
    sizes, parallel = sizes_of(config), run.parallel
    passes = passes_in_flight(parallel.pp, parallel.vpp, run.batch.micro_batches)
    row = run.batch.max_length * run.objective.answers
    tokens = run.batch.micro_batch_size * row // parallel.cp * passes
    if run.memory.recompute == "layers":
        return tokens * sizes.hidden // (parallel.tp if parallel.sequence_parallel else 1)
    qkv = _query_key_value(config)
    wide = {"swiglu": mlp_parts(config), "mlp": 0}.get(run.memory.recompute, 1 + mlp_parts(config))
    delta = next((kind.delta for kind in family_of(config.model_type).layers(config) if kind.delta is not None), None)
    if delta is not None:  # what its products give, what its convolution does, and heads in fp32
        qkv = max(qkv, 4 * delta.channels + 2 * delta.heads * delta.value_dim)
    kept, experts = (qkv + wide * sizes.ffn) // parallel.tp, experts_of(config)
    if experts is not None:
        routed = experts.chosen * (sizes.hidden + 2 * experts.ffn)
        kept = max(
            kept if mlp_widths(config) else 0,
            qkv // parallel.tp + routed // parallel.tp + 3 * experts.shared_ffn // parallel.tp,
        )
    return tokens * (5 * sizes.hidden + kept)


def _query_key_value(config: PreTrainedConfig) -> int:
    """Values of a token's query, key and value in all heads; of latent attention with the padding that kernels ask for, and its states."""
    sizes = sizes_of(config)
    latent = next((kind.latent for kind in family_of(config.model_type).layers(config) if kind.latent is not None), None)
    if latent is None:
        return (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    return 3 * sizes.heads * (latent.still + latent.turning) + (latent.query or 0) + latent.key_value


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the whole model, tied weights counted once."""
    return sum(parameter.size for parameter in parameters_of(config))


def checkpoint_bytes(
    config: PreTrainedConfig, dtype: str, only_model: bool, adapter: Lora | None = None, frozen: Sequence[str] = ()
) -> int:
    """Bytes of one checkpoint: the weights, or an adapter, and unless `only_model` fp32 masters and moments of what is trained."""
    trained = sum(parameter.size for parameter in trained_parameters(adapter, frozen, config))
    saved = parameter_count(config) if adapter is None else trained
    return saved * BYTES[dtype] + (0 if only_model else trained * 12)


def trained_parameters(adapter: Lora | None, frozen: Sequence[str], config: PreTrainedConfig) -> list[Parameter]:
    """What is trained: of an adapter, or of the model what is not frozen."""
    if adapter is not None:
        return adapter.parameters(family_of(config.model_type), config)
    kept = set(frozen)
    return [parameter for parameter in parameters_of(config) if parameter.name not in kept]


def packed_share(adapter: Lora, config: PreTrainedConfig) -> float:
    """Share of a model's weights that are held in few bits."""
    if adapter.bits is None:
        return 0.0
    base = parameters_of(config)
    return sum(parameter.size for parameter in packable(base)) / sum(parameter.size for parameter in base)


def trainable_of_rank(trained: list[Parameter], config: PreTrainedConfig, parallel: Parallel) -> int:
    """How many values the fullest rank trains."""
    counts = stage_layers(config, parallel.pp, parallel.vpp)
    stage_of = [stage for stage, count in enumerate(counts) for _ in range(count)]
    sizes = [0] * len(counts)
    for parameter in trained:
        parts = parallel.etp if is_expert(parameter) else parallel.tp
        own = parameter.size // (1 if parameter.arrangement.split is None else parts)
        own //= parallel.ep if is_expert(parameter) else 1
        layered = parameter.name.startswith("decoder.layers.")
        stage = stage_of[int(parameter.name.split(".")[2])] if layered else 0 if parameter.name.startswith("embedding.") else -1
        sizes[stage] += own
    return max(by_rank(sizes, parallel.pp))
