"""How often a layer that predicts further ahead guesses the token that the model itself takes: fp32, on any machine, in bounded memory.

The guess for a token is made from the state of the model two tokens before it, behind the last norm, and from the token between
(multi-token prediction: https://arxiv.org/abs/2412.19437, section 2.2; Qwen3-Next's is the same with other names):

    x = W [norm(embedding of the token between); norm(state)],   guess = argmax head(norm(layer(x)))

The layer attends to what came before it in its own states. It counts where it is what the model finds likeliest after the token
between, which is when speculative decoding takes it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.errors import UserError
from megaswift.models import family_of, parameters_of
from megaswift.models.lengths import trained_length
from megaswift.models.prediction import layers_ahead
from megaswift.models.whole import decoder_of, text_of, whole_of
from megaswift.proof.prompts import token_rows
from megaswift.proof.streams import hf_stream, one_process
from megaswift.weights.convert.precision import precisions_of_folder
from megaswift.weights.hf.config import check_source, load_config
from megaswift.weights.hf.read import HFCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.proof.streams import Streamed


@dataclass(frozen=True)
class _Names:
    """What the tensors of such a layer are called; {n} is the number of the model's own layers.

    Args:
        layer: what the names of the layer's own tensors begin with.
        joint: W.
        token, state: of the norms of what W takes.
        last: of the norm behind the layer.
        table, head: an embedding and an output layer of its own, where the folder has them; else the model's are used.
    """

    layer: str
    joint: str
    token: str
    state: str
    last: str
    table: str = ""
    head: str = ""


_FORMS = (
    _Names(
        "model.layers.{n}.", "model.layers.{n}.eh_proj.weight", "model.layers.{n}.enorm.weight", "model.layers.{n}.hnorm.weight",
        "model.layers.{n}.shared_head.norm.weight", "model.layers.{n}.embed_tokens.weight", "model.layers.{n}.shared_head.head.weight",
    ),
    _Names("mtp.layers.0.", "mtp.fc.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.norm.weight"),
)  # fmt: skip


@dataclass(frozen=True)
class Guesses:
    """How many tokens were guessed, and how many of the guesses are the model's own."""

    tokens: int
    right: int

    @property
    def share(self) -> float:
        return self.right / max(self.tokens, 1)


def measure(folder: Path, texts: Mapping[str, str] | None = None) -> Guesses:
    """How many guesses of a folder's first layer that predicts ahead are the model's own, over texts, each by itself.

    Args:
        texts: name -> text; default: the prompts of the logit comparison.

    Raises UserError for a folder without such a layer, or with one of a form that is not known.
    """
    guessed, own, lengths = guesses_of(folder, texts)
    # Position i guesses what the model finds likeliest at i + 1; at the last of a text there is nothing to compare.
    inside = torch.cat([torch.arange(length) < length - 1 for length in lengths])
    right = (guessed[:-1] == own[1:])[inside[:-1]]
    return Guesses(int(right.numel()), int(right.sum()))


def guesses_of(folder: Path, texts: Mapping[str, str] | None = None) -> tuple[Tensor, Tensor, list[int]]:
    """The guess at each position of all texts [s], what the model finds likeliest there [s], and the lengths of the texts."""
    config, source = load_config(folder), HFCheckpoint.open(folder)
    check_source(source, config)
    names = _names_in(source, config)
    rows = token_rows(folder, config.vocab_size, trained_length(config)[0], texts)
    lengths = [len(row) for row in rows.values()]
    tokens = torch.tensor([[token for row in rows.values() for token in row]])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with one_process():
        main = hf_stream(config, source, precisions_of_folder(source, config))
        own, states = _with_states(main, tokens, positions, lengths)
        guessed = _guess(config, source, names, states, tokens, positions, lengths)
    return guessed, own, lengths


def _names_in(source: HFCheckpoint, config: PreTrainedConfig) -> _Names:
    """The form that a folder's tensors have. Raises UserError where there are none, or others."""
    for form in _FORMS:
        names = _Names(*(getattr(form, field).format(n=config.num_hidden_layers) for field in form.__dataclass_fields__))
        if names.joint in source.table:
            return names
    patterns = layers_ahead(config)
    if not patterns:
        raise UserError(f"models of type {config.model_type} have no layers that predict ahead.", where=f"--mtp, {source.path}")
    raise UserError(
        f"no layer that predicts ahead, in a form that is known, is there ({', '.join(patterns)}).",
        where=f"--mtp, {source.path}",
        fix="name a folder of a DeepSeek V3, GLM 4.5, Qwen3-Next or Qwen3.5 model that has its own",
    )


def _with_states(model: Streamed, tokens: Tensor, positions: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The likeliest token after each, and the states behind the last norm [1, s, hidden]."""
    kept: list[Tensor] = []
    handle = decoder_of(model.module).norm.register_forward_hook(lambda _m, _i, out: kept.append(out.clone()))
    try:
        likeliest = model.run(tokens, positions, lengths).argmax(-1)
    finally:
        handle.remove()
    return likeliest, kept[0]


def _guess(
    config: PreTrainedConfig,
    source: HFCheckpoint,
    names: _Names,
    states: Tensor,
    tokens: Tensor,
    positions: Tensor,
    lengths: list[int],
) -> Tensor:
    """The guess at each position [s]: a model of one layer, which is the one that predicts ahead, on states and tokens joined."""
    single = _of_one_layer(config)
    seen = _as_its_layer(config, single, source, names)
    model = hf_stream(single, seen, precisions_of_folder(seen, single))
    norm = decoder_of(model.module).norm
    joint = source.tensor(names.joint).float()

    def normed(name: str, value: Tensor) -> Tensor:
        made = type(norm)(value.shape[-1], eps=_epsilon(norm))
        made.weight = torch.nn.Parameter(source.tensor(name).float(), requires_grad=False)
        return made(value)

    def joined(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.cat([normed(names.token, embedded), normed(names.state, states)], -1), joint)

    handle = model.embedding.register_forward_hook(joined)
    try:
        between = torch.roll(tokens, -1, dims=1)  # what comes after the last token of a text is not looked at
        return model.run(between, positions, lengths).argmax(-1)
    finally:
        handle.remove()


def _epsilon(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", 0.0) or norm.eps)


def _of_one_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with one layer of the kind that predicts ahead: full attention, and experts where the model has any."""
    made: Any = copy.deepcopy(whole_of(config) or config)
    text: Any = made.get_text_config()
    text.num_hidden_layers = 1
    for field, value in (
        ("layer_types", ["full_attention"]),
        ("first_k_dense_replace", 0),
        ("mlp_only_layers", []),
        ("decoder_sparse_step", 1),
    ):
        if getattr(text, field, None) is not None:
            setattr(text, field, value)
    return text_of(made)


def _as_its_layer(config: PreTrainedConfig, single: PreTrainedConfig, source: HFCheckpoint, names: _Names) -> HFCheckpoint:
    """The folder seen as one of a model with that layer alone.

    Raises UserError where one of the layer's tensors is not there.
    """
    whole = family_of(config.model_type).whole
    first = f"{whole.layers if whole is not None else 'model.'}layers.0."
    own: dict[str, str] = {}
    for parameter in parameters_of(single):
        for part in parameter.hf:
            own[part.name] = names.layer + part.name.removeprefix(first) if part.name.startswith(first) else part.name
            if parameter.name == "decoder.final_layernorm.weight":
                own[part.name] = names.last
            special = {"embedding.word_embeddings.weight": names.table, "output_layer.weight": names.head}.get(parameter.name)
            if special and special in source.table:
                own[part.name] = special
    absent = [name for name in own.values() if name not in source.table]
    if absent:
        raise UserError(
            f"of the layer that predicts ahead {len(absent)} tensors are not there, {absent[0]} among them.",
            where=f"--mtp, {source.path}",
            fix="fetch the model again",
        )
    table = {name: replace(source.entry(stored), name=name) for name, stored in own.items()}
    return HFCheckpoint(source.path, source.config, table)


__all__ = ["Guesses", "guesses_of", "measure"]
