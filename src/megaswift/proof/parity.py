"""Logits of a Megatron checkpoint against transformers: every position of varied prompts, in fp32, in bounded memory.

All prompts run as one packed row in which each attends only to itself. The output of every layer is compared as well;
where something differs, a second pass names the first layer and module.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.models import parameters_of
from megaswift.models.head import labels_of
from megaswift.models.lengths import trained_length
from megaswift.models.parameters import Parameter
from megaswift.proof.audit import Finding, audit
from megaswift.proof.prompts import token_rows
from megaswift.proof.streams import (
    Streamed,
    TrainedAdapter,
    hf_stream,
    local_name,
    megatron_stream,
    one_process,
    peft_stream,
)
from megaswift.weights.convert.model import MegatronReader
from megaswift.weights.convert.precision import Precisions
from megaswift.weights.hf.folder_reader import FolderReader

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.weights.hf.read import HFCheckpoint

# Two correct fp32 implementations differ by rounding: some 1e-6 of a token's state a layer. What is wrong shows far above.
MAX_LOGIT = 1e-4  # largest difference of a logit, as a share of the largest logit
LEAST_SCORE = 1e-2  # the scores of a head that has just begun are small
MAX_KL = 1e-8  # mean Kullback-Leibler divergence of the next-token distributions, in nats
MIN_TOP1 = 1.0  # positions with the same likeliest token; logits closer to each other than the limit count as one
MAX_STATE = 5e-5  # largest difference of a token's state after a layer, as a share of the state's length


@dataclass
class PromptResult:
    """One prompt: tokens, largest logit difference, mean KL (nats), share of positions with the same likeliest token."""

    name: str
    tokens: int
    max_abs: float
    mean_kl: float
    top1: float


@dataclass
class Parity:
    """The comparison: numbers for each prompt and over all, differences after each layer, the config audit, what failed."""

    prompts: list[PromptResult] = field(default_factory=list)
    max_abs: float = 0.0
    largest_logit: float = 0.0
    mean_kl: float = 0.0
    top1: float = 1.0
    layers: list[float] = field(default_factory=list)  # relative difference after the embedding and after each layer
    config: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    failed: str = ""  # what is beyond its limit; empty: passed
    where: str = ""  # first diverging layer and module

    @property
    def positions(self) -> int:
        return sum(prompt.tokens for prompt in self.prompts)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values.pop("config")
        limits = {"max_logit_share": MAX_LOGIT, "mean_kl": MAX_KL, "top1": MIN_TOP1, "state": MAX_STATE}
        return values | {"positions": self.positions, "limits": limits}


def compare(
    config: PreTrainedConfig, source: HFCheckpoint, reader: MegatronReader, precisions: Precisions, model_dir: Path
) -> Parity:
    """Run both models.

    Args:
        config: the model's config; the folder's own.
        source, reader: the Hugging Face folder and the Megatron checkpoint.
        precisions: of the stored Megatron weights; the folder's values are rounded to them.
        model_dir: where the tokenizer is.
    """
    return _compared(config, model_dir, lambda: (hf_stream(config, source, precisions), megatron_stream(config, reader)))


def compare_adapter(
    config: PreTrainedConfig,
    source: HFCheckpoint,
    precisions: Precisions,
    directory: Path,
    adapter: TrainedAdapter,
    model_dir: Path,
) -> Parity:
    """The engine's model with an adapter of a run against transformers and PEFT with the adapter's directory, on one base.

    Args:
        config, source, precisions: of the base, whose values both sides read.
        directory: the adapter as PEFT loads it.
        adapter: the same as the engine trained it.
        model_dir: where the tokenizer is.
    """
    reader = FolderReader(config, source)

    def models() -> tuple[Streamed, Streamed]:
        return peft_stream(config, source, precisions, directory), megatron_stream(config, reader, adapter)

    return _compared(config, model_dir, models)


def compare_merged(
    config: PreTrainedConfig,
    base: HFCheckpoint,
    merged: HFCheckpoint,
    precisions: Precisions,
    adapter: TrainedAdapter,
    model_dir: Path,
) -> Parity:
    """The engine's model with an adapter against transformers with base and adapter merged: what the rounding of the merge does."""
    reader = FolderReader(config, base)

    def models() -> tuple[Streamed, Streamed]:
        return hf_stream(config, merged, precisions), megatron_stream(config, reader, adapter)

    return _compared(config, model_dir, models)


def _compared(config: PreTrainedConfig, model_dir: Path, models: Callable[[], tuple[Streamed, Streamed]]) -> Parity:
    begin = time.perf_counter()
    rows = token_rows(model_dir, config.vocab_size, trained_length(config)[0])
    result = Parity()
    with one_process():
        reference, measured = models()
        result.config = audit(config, reference, measured)
        batch = _Batch(rows)
        states, wanted = _states(reference, batch)
        _compare_states(measured, batch, states, wanted, rows, result, 1.0 if labels_of(config) is None else LEAST_SCORE)
        if result.failed:
            layer = next((number for number, value in enumerate(result.layers) if not value <= MAX_STATE), len(result.layers))
            result.where = _first_difference(config, reference, measured, batch, layer - 1)
    result.seconds = time.perf_counter() - begin
    return result


class _Batch:
    """All prompts in one row."""

    def __init__(self, rows: dict[str, list[int]]) -> None:
        self.lengths = [len(row) for row in rows.values()]
        self.tokens = torch.tensor([[token for row in rows.values() for token in row]])
        self.positions = torch.cat([torch.arange(length) for length in self.lengths])[None]

    def run(self, model: Streamed) -> Tensor:
        return model.run(self.tokens, self.positions, self.lengths)


def _flat(value: Any) -> Tensor:
    """A module's result as [s, ...]; transformers has [1, s, ...], Megatron-Core [s, 1, ...]."""
    value = value[0] if isinstance(value, tuple) else value
    return value.squeeze(0) if value.shape[0] == 1 else value.squeeze(1)


def _states(model: Streamed, batch: _Batch) -> tuple[list[Tensor], Tensor]:
    """Results of the embedding and of every layer, and the logits."""
    kept: list[Tensor] = []
    first = lambda _m, _i, out: kept.append(_flat(out) / model.embedding_factor)  # noqa: E731
    handles = [model.embedding.register_forward_hook(first)]
    handles += [module.register_forward_hook(lambda _m, _i, out: kept.append(_flat(out).clone())) for module in model.layers]
    try:
        logits = batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return kept, logits


def _compare_states(
    model: Streamed,
    batch: _Batch,
    states: list[Tensor],
    wanted: Tensor,
    rows: dict[str, list[int]],
    result: Parity,
    least: float,
) -> None:
    """Run the second model; each of its states is compared as it comes, and the reference's is dropped.

    `least`: a largest logit, or score, that is below it counts as this.
    """
    states.reverse()
    keep = lambda _m, _i, out: result.layers.append(relative(states.pop(), _flat(out)))  # noqa: E731
    handles = [module.register_forward_hook(keep) for module in (model.embedding, *model.layers)]
    try:
        logits = batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    start = 0
    result.largest_logit = float(wanted.abs().max())
    bound = MAX_LOGIT * max(result.largest_logit, least)
    for name, row in rows.items():
        piece = slice(start, start + len(row))
        result.prompts.append(_prompt(name, wanted[piece], logits[piece], bound))
        start += len(row)
    result.max_abs = max(prompt.max_abs for prompt in result.prompts)
    result.mean_kl = sum(prompt.mean_kl * prompt.tokens for prompt in result.prompts) / result.positions
    result.top1 = sum(prompt.top1 * prompt.tokens for prompt in result.prompts) / result.positions
    result.failed = _verdict(result, bound)


def _prompt(name: str, wanted: Tensor, found: Tensor, bound: float) -> PromptResult:
    worst, divergence, same = 0.0, 0.0, 0
    for reference, measured in zip(wanted.split(64), found.split(64)):  # a vocabulary of 150,000 makes rows of 1.2 MB
        gap = (measured - reference).abs().max()
        worst = max(worst, float(gap) if torch.isfinite(gap) else math.inf)
        p, q = reference.double().log_softmax(-1), measured.double().log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        likeliest = measured.argmax(-1, keepdim=True)
        short = reference.max(-1).values - reference.gather(-1, likeliest)[:, 0]
        same += int((short <= bound).sum())
    return PromptResult(
        name,
        len(wanted),
        worst,
        max(divergence / len(wanted), 0.0) if math.isfinite(divergence) else math.inf,
        same / len(wanted),
    )


def _verdict(result: Parity, bound: float) -> str:
    """What is beyond its limit, in words."""
    wrong = []
    if not result.max_abs <= bound:
        wrong.append(f"logits differ by up to {result.max_abs:.3g} (limit {bound:.3g})")
    if not result.mean_kl <= MAX_KL:
        wrong.append(f"mean KL is {result.mean_kl:.3g} nats (limit {MAX_KL:g})")
    if not result.top1 >= MIN_TOP1:
        wrong.append(f"{result.top1:.2%} of positions have the same likeliest token")
    worst = max(result.layers)
    if not worst <= MAX_STATE:
        wrong.append(f"states differ by up to {worst:.3g} of their length (limit {MAX_STATE:g})")
    return "; ".join(wrong)


def relative(reference: Tensor, measured: Tensor) -> float:
    """Largest difference of a token's state, as a share of the state's length; infinity where shapes or values do not fit."""
    if reference.shape != measured.shape:
        return math.inf
    reference, measured = reference.flatten(1).float(), measured.flatten(1).float()
    share = (measured - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-30)
    worst = float(share.max())
    return worst if math.isfinite(worst) else math.inf


class _Enough(Exception):
    """The layer in question has run."""


def _first_difference(config: PreTrainedConfig, reference: Streamed, measured: Streamed, batch: _Batch, layer: int) -> str:
    """Name the first module whose result differs: in the embedding (layer -1), in a layer, or after the last one."""
    if layer < 0:
        return "embedding.word_embeddings (model.embed_tokens): the rows of the tokens differ"
    inside = layer < config.num_hidden_layers
    prefix = f"decoder.layers.{layer}." if inside else ""
    chosen = [
        parameter
        for parameter in parameters_of(config)
        if parameter.name.endswith("weight") and parameter.name.startswith(prefix) and (inside or _outside(parameter.name))
    ]
    found = _captured(measured, [local_name(parameter.name) for parameter in chosen], batch, layer)
    wanted = _captured(reference, [part.in_model for parameter in chosen for part in parameter.hf], batch, layer)
    order = {name: place for place, name in enumerate(found)}
    for parameter in sorted(chosen, key=lambda parameter: order.get(_module(local_name(parameter.name)), 0)):
        ours, theirs = _module(local_name(parameter.name)), [_module(part.in_model) for part in parameter.hf]
        if ours not in found or any(name not in wanted for name in theirs):
            continue
        if relative(wanted[theirs[0]][0], found[ours][0]) > MAX_STATE:
            return f"{ours}: what comes into it differs ({_before(ours)}); every module before it agrees"
        for name, part in zip(theirs, _parts(parameter, found[ours][1])):
            difference = relative(wanted[name][1], part)
            if difference > MAX_STATE:
                return f"{ours} ({name}): its input agrees, its output differs by {difference:.2g} of its length"
    return f"decoder.layers.{layer}" if inside else "output_layer (lm_head)"


def _outside(name: str) -> bool:
    """Whether a parameter comes after the last layer."""
    return not name.startswith(("decoder.layers.", "embedding."))


def _before(module: str) -> str:
    """What lies between a module and the one before it."""
    if module.endswith("linear_proj"):
        return "attention: RoPE, mask or scale"
    return "the activation between linear_fc1 and linear_fc2" if module.endswith("linear_fc2") else "a residual sum"


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _captured(model: Streamed, parameters: list[str], batch: _Batch, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the modules that own some parameters, in the order in which they ran."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_m: Any, inputs: Any, out: Any) -> None:
            kept[name] = (_flat(inputs).clone(), _flat(out).clone())

        return keep

    def stop(*_: Any) -> None:
        raise _Enough

    names = dict(model.module.named_modules())
    wanted = {_module(name) for name in parameters} & set(names)
    handles = [names[name].register_forward_hook(hook(name)) for name in wanted]
    if layer < len(model.layers):
        handles.append(model.layers[layer].register_forward_hook(stop))
    try:
        batch.run(model)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _parts(parameter: Parameter, out: Tensor) -> list[Tensor]:
    """A fused module's output [s, rows] as the outputs of the Hugging Face modules, arranged as the rows of its weight are."""
    if len(parameter.hf) == 1:
        return [out]
    return [part.t() for part in parameter.arrangement.unpack(out.t().contiguous())]
