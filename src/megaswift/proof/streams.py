"""Two models whose weights come and go with each module's call: transformers' own, and Megatron-Core's GPTModel.

Both are built without memory (on torch's meta device) and run as a whole, by their own forward code; before a module
is called its weights are read in fp32, afterwards they are dropped. So the largest tensor bounds the memory, whatever
the model's size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from megaswift.data.tokens import pooled_place
from megaswift.errors import DataError
from megaswift.megatron import compat, process_groups
from megaswift.megatron.layer_specs import block_spec, local_name
from megaswift.megatron.lora_layers import attach, take_out_whole
from megaswift.megatron.model import ChatModel, rotary_tables, transformer_config
from megaswift.models import family_of, parameters_of
from megaswift.models.family import is_tied
from megaswift.models.head import auto_class, auto_config, labels_of
from megaswift.models.parameters import HFTensor, Parameter
from megaswift.models.whole import decoder_of
from megaswift.run.spec import Parallel, Precision
from megaswift.weights.convert.model import MegatronReader
from megaswift.weights.convert.precision import Precisions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.models.adapters import Lora
    from megaswift.weights.hf.read import HFCheckpoint

_META = torch.device("meta")


class Streamed:
    """A model with its forward call and its modules by name.

    Args:
        module: the torch module.
        run: packed tokens [1, s], positions [1, s] and lengths of the samples -> logits [s, vocab].
        layers: the decoder layers.
        embedding: the module that looks tokens up.
        hold: lets the weights of a module, which is named, be there as long as another one runs that is around it.
        embedding_factor: what that module multiplies the rows that it finds by; the other model does so later.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        run: Callable[[Tensor, Tensor, list[int]], Tensor],
        layers: Any,
        embedding: Any,
        hold: Callable[[str, torch.nn.Module, torch.nn.Module], None] | None = None,
        embedding_factor: float = 1.0,
    ) -> None:
        self.module, self.run, self.layers, self.embedding, self.hold = module, run, layers, embedding, hold
        self.embedding_factor = embedding_factor


def hf_stream(config: PreTrainedConfig, source: HFCheckpoint, precisions: Precisions) -> Streamed:
    """The transformers model of a folder.

    Args:
        precisions: values are rounded to them first, as the conversion did; the computation is fp32.
    """
    with _META:
        model = auto_class(config).from_config(auto_config(config), attn_implementation="eager", dtype=torch.float32)
    decoder = decoder_of(model)
    _real_buffers(decoder, config)
    stored = {one.loaded: one.hf[0].name for one in parameters_of(config) if not one.trained and one.loaded is not None}
    stored |= {part.held: part.name for one in parameters_of(config) for part in one.hf if part.held is not None}
    for name, buffer in model.named_buffers():
        if stored.get(name, name) in source.table and buffer.device != _META:
            buffer.copy_(source.tensor(stored.get(name, name)))
    model.eval()
    tied, labels, table = is_tied(config), labels_of(config), parameters_of(config)[0].hf[0].name
    loaded: dict[str, list[Parameter]] = {}
    for parameter in parameters_of(config):
        if parameter.loaded is not None:
            loaded.setdefault(parameter.loaded, []).append(parameter)

    def load(name: str) -> Tensor:
        if name in loaded:
            made = [one.arrangement.pack([_rounded(part) for part in one.hf]) for one in loaded[name]]
            several = name.endswith("_proj") or loaded[name][0].hf[0].index is not None
            return torch.stack(made) if several else made[0]
        own = table if tied and name == "lm_head.weight" else stored.get(name, name)  # a copy may have another precision
        return source.tensor(own).to(precisions.of(own))

    def _rounded(part: HFTensor) -> Tensor:
        return source.part(part).to(precisions.of(part.name))

    def release(name: str) -> None:
        for one in (
            [part.name for parameter in loaded[name] for part in parameter.hf] if name in loaded else [stored.get(name, name)]
        ):
            if one in source.table:
                source.release(one)

    def hold(name: str, module: torch.nn.Module, around: torch.nn.Module) -> None:
        own = {part: f"{name}.{part}" for part, _ in module.named_parameters(recurse=False)}
        if own:
            _stream(module, own, load, release, around)

    for name, module in model.named_modules():
        # The weights of this convolution are read by the module around it, which does not call it.
        read_only = name.endswith("linear_attn.conv1d")
        hold(name, module, model.get_submodule(name.rpartition(".")[0]) if read_only else module)

    def run(tokens: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
        masks = _block_masks(config, model, lengths)
        _by_samples(model, lengths)
        options = dict(input_ids=tokens, position_ids=positions, attention_mask=masks, use_cache=False)
        return model(**options).logits[0] if labels is None else _every_score(model, model, config, options)

    embedding = model.get_input_embeddings()
    return Streamed(model, run, decoder.layers, embedding, hold, float(getattr(embedding, "scalar_embed_scale", 1.0)))


def _every_score(call: Any, model: Any, config: PreTrainedConfig, options: dict[str, Tensor | None]) -> Tensor:
    """[s, labels]: what transformers' head says of every token of a row, before one of them is chosen for the whole.

    Raises DataError unless it chooses the one whose state is scored in training.
    """
    kept: list[Tensor] = []
    handle = model.score.register_forward_hook(lambda _module, _inputs, out: kept.append(out[0]))
    try:
        chosen = call(**options).logits[0]
    finally:
        handle.remove()
    ids = options["input_ids"]
    assert ids is not None
    place = pooled_place(ids[0].numpy(), int(config.pad_token_id))
    if not torch.equal(chosen, kept[0][place]):
        raise DataError(
            f"transformers does not score the last token that is not the pad token ({config.pad_token_id}).",
            where="config.json: pad_token_id",
            fix="nothing was made; report it with this config.json",
        )
    return kept[0]


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter of a run: what it is, and the values of its parameters by name.

    Args:
        start: the values that it began from, where it began as a part of the base; those are taken out of the weights.
    """

    lora: Lora
    values: Mapping[str, Tensor]
    start: Mapping[str, Tensor] | None = None


def peft_stream(config: PreTrainedConfig, source: HFCheckpoint, precisions: Precisions, adapter: Path) -> Streamed:
    """The transformers model of a folder, with an adapter as PEFT itself loads it from a directory."""
    from peft import PeftModel

    plain = hf_stream(config, source, precisions)
    names = {module: name for name, module in plain.module.named_modules()}
    for module in plain.module.modules():  # PEFT puts an adapter where its layer's weight is: on the CPU, without its size
        for part, parameter in module.named_parameters(recurse=False):
            module._parameters[part] = torch.nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False)
    wrapped = PeftModel.from_pretrained(plain.module, str(adapter), torch_device="cpu", autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            parameter.data = parameter.data.float()
    assert plain.hold is not None
    held: set[torch.nn.Module] = set()
    for (
        module
    ) in wrapped.modules():  # outer ones first; DoRA reads a layer's weight after it was called, and experts are adapted before
        base: Any = module
        while hasattr(base, "base_layer"):
            base = base.base_layer
        if base is not module and base in names and base not in held:
            held.add(base)
            compat.without_hooks(base)
            plain.hold(names[base], base, module)
    wrapped.eval()
    model: Any = wrapped.get_base_model()
    labels = labels_of(config)
    if labels is not None:  # the adapter brings its own, which the base's folder need not have
        compat.without_hooks(model.score.modules_to_save["default"])

    def run(tokens: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
        masks = _block_masks(config, model, lengths)
        _by_samples(model, lengths)
        options = dict(input_ids=tokens, position_ids=positions, attention_mask=masks, use_cache=False)
        return wrapped(**options).logits[0] if labels is None else _every_score(wrapped, model, config, options)

    embedding, factor = model.get_input_embeddings(), plain.embedding_factor
    return Streamed(plain.module, run, decoder_of(model).layers, embedding, embedding_factor=factor)


def megatron_stream(config: PreTrainedConfig, reader: MegatronReader, adapter: TrainedAdapter | None = None) -> Streamed:
    """The GPTModel of a Megatron checkpoint, with an adapter where one is given; needs the process groups of `one_process`."""
    rows = reader.shape("embedding.word_embeddings.weight")[0]
    settings = transformer_config(config, Parallel(), Precision(), plain_layers=True)
    kinds = family_of(config.model_type).layers(config)
    ropes = rotary_tables(config, kinds, torch.device("cpu"))
    with _META:
        model = ChatModel(
            config=settings,
            transformer_layer_spec=block_spec(kinds),
            vocab_size=rows,
            max_sequence_length=config.max_position_embeddings,
            share_embeddings_and_output_weights=is_tied(config),
            ropes=ropes,
            true_vocab=config.vocab_size,
            factors=family_of(config.model_type).factors(config),
            labels=labels_of(config),
        )
    model.eval()
    parameters: dict[str, list[Parameter]] = {}  # all experts of a layer are one parameter of the model
    base = parameters_of(config)
    for parameter in base:
        parameters.setdefault(local_name(parameter.name), []).append(parameter)

    whole = {} if adapter is None else {local_name(p.name): p.name for p in adapter.lora.whole(base)}

    begun = {} if adapter is None else {local_name(site.base.name): site for site in adapter.lora.sites(base)}

    def load(name: str) -> Tensor:
        if adapter is not None and name in whole:
            return adapter.values[whole[name]]
        made = [reader.read(parameter.key, parameter.place) for parameter in parameters[name]]
        if name in begun and adapter is not None and adapter.start is not None:
            made[0] = made[0].float().clone()
            take_out_whole(made[0], begun[name], adapter.lora, adapter.start)
        return torch.stack(made) if ".local_experts." in parameters[name][0].name else made[0]

    def release(name: str) -> None:
        for parameter in () if name in whole else parameters[name]:
            reader.release(parameter.key, parameter.place)

    for name, module in model.named_modules():
        own = {part: f"{name}.{part}" for part, _ in module.named_parameters(recurse=False)}
        if own:
            _stream(module, own, load, release)
        for part in [part for part in dict(module.named_buffers(recurse=False)) if f"{name}.{part}" in parameters]:
            setattr(module, part, load(f"{name}.{part}").float())
    if is_tied(config):
        _lend_embedding(model.output_layer, load)
    if adapter is not None:
        lora = adapter.lora
        listed = lora.parameters(family_of(config.model_type), config)
        model.adapter = attach(model, lora, base, listed, 0, 0, lambda parameter: adapter.values[parameter.name].float())

    def run(tokens: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
        return model(tokens, positions, lengths)[0, :, : config.vocab_size]

    return Streamed(model, run, model.decoder.layers, model.embedding.word_embeddings)


def _stream(
    module: torch.nn.Module,
    own: dict[str, str],
    load: Callable[[str], Tensor],
    release: Callable[[str], None],
    around: torch.nn.Module | None = None,
) -> None:
    """Let a module have its weights only while it runs, or one `around` it."""
    empty = dict(module.named_parameters(recurse=False))
    factor = float(getattr(module, "scalar_embed_scale", 1.0))
    lookup = "Embedding" in type(module).__name__  # touches few rows: it works on the stored values, and its result is cast

    def before(*_: Any) -> None:
        for part, name in own.items():
            value = load(name)
            module._parameters[part] = torch.nn.Parameter(value if lookup else value.float(), requires_grad=False)

    def after(_module: Any, _inputs: Any, result: Any) -> Any:
        for part, name in own.items():
            module._parameters[part] = empty[part]
            release(name)
        return result.float() * factor if lookup else None

    (around or module).register_forward_pre_hook(before)
    (around or module).register_forward_hook(after)


def _lend_embedding(output_layer: torch.nn.Module, load: Callable[[str], Tensor]) -> None:
    """A tied output layer is handed the embedding's weight by its caller, who at that time holds none."""

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "weight": load("embedding.word_embeddings.weight").float()}

    output_layer.register_forward_pre_hook(before, with_kwargs=True)


def _real_buffers(model: torch.nn.Module, config: PreTrainedConfig) -> None:
    """Build the modules that hold computed tables (RoPE) again, with memory.

    An embedding that multiplies does so in fp32, after the lookup in the stored values (`_stream`), and not itself.
    """
    for name, module in list(model.named_modules()):
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.ones(())
        elif any(buffer.device.type == "meta" for buffer in module.buffers(recurse=False)):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], type(module)(config=config))


def windows_of(config: PreTrainedConfig, model: Any) -> list[int | None]:
    """The window of each layer of a transformers model, as its attention modules have it, or all of them from the config."""
    found: list[int | None] = []
    for layer in decoder_of(model).layers:
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            found.append(None)
            continue
        has_one = getattr(attention, "is_sliding", True)
        # Models without one in their modules, Mistral and Phi-3 among them, give it to one mask for all layers.
        every = getattr(config, "sliding_window", None) if config.model_type in ONE_WINDOW else None
        found.append(getattr(attention, "sliding_window", every) if has_one else None)
    return found


ONE_WINDOW = ("ministral3", "mistral", "mistral3", "mixtral", "phi3", "starcoder2")


def _block_masks(config: PreTrainedConfig, model: Any, lengths: list[int]) -> Any:
    """The mask of `_block_mask` for all layers, or by the types of layers where their windows differ."""
    windows = windows_of(config, model)
    if len(set(windows)) == 1:
        return _block_mask(lengths, windows[0])
    return {kind: _block_mask(lengths, window) for kind, window in zip(config.layer_types, windows)}


def _by_samples(model: Any, lengths: list[int]) -> None:
    """Let linear attention of transformers, to which no mask says where samples begin, take them one by one."""
    for layer in decoder_of(model).layers:
        module = getattr(layer, "linear_attn", None)
        if module is not None:
            module.forward = partial(_each_sample, type(module).forward, module, lengths)


def _each_sample(
    forward: Callable[..., Tensor], module: Any, lengths: list[int], hidden_states: Tensor, **options: Any
) -> Tensor:
    return torch.cat([forward(module, part, **options) for part in hidden_states.split(lengths, dim=1)], dim=1)


def _block_mask(lengths: list[int], window: int | None) -> Tensor:
    """Additive causal mask [1, 1, s, s] in which samples of one row do not see each other, nor tokens beyond a window."""
    total = sum(lengths)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (sample[:, None] == sample[None, :]).tril()
    if window is not None:
        allowed = allowed.triu(1 - window)
    return torch.zeros(total, total).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Megatron-Core's process groups for this process alone, on the CPU, whatever the machine has and torchrun said."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with mock.patch.dict(os.environ, clean, clear=True), mock.patch.object(torch.cuda, "is_available", lambda: False):
        try:
            with process_groups.joined(Parallel(), seed=0), torch.no_grad():
                yield
        finally:
            torch.set_rng_state(state)
            torch.set_num_threads(threads)


__all__ = [
    "Streamed", "TrainedAdapter", "hf_stream", "local_name", "megatron_stream", "one_process", "peft_stream", "windows_of",
]  # fmt: skip
