"""The layers of a model as CUDA graphs: a small model spends most of a step on launching its kernels one by one.

A graph holds the kernels of one shape. Shorter rows go through the next larger graph, filled up with tokens behind their
last one, in packed rows as a sample of their own: nothing attends to them and their gradient is zero, so results do not
change. The first micro batch of a shape runs as it is, which compiles its kernels; the second is captured. What depends on
the labels, the loss for example, stays outside.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaswift.megatron.gated_delta_net import GatedDeltaNet
from megaswift.megatron.kernels.activation_offload import OffloadingBlock
from megaswift.megatron.kernels.linear_ops import PLAIN, linear_ops_of
from megaswift.megatron.kernels.megatron_layer import FusedMLP, FusedTransformerLayer
from megaswift.megatron.latent_attention import LatentAttention
from megaswift.megatron.norms import RMSNorm
from megaswift.megatron.router import Counted

_LIMIT = 64  # graphs; a run with more shapes than that runs the others as they are
_MEASURED = range(2, 5)  # the steps, from 1, that `auto` judges by; the first compiles kernels
_MUCH = 0.8  # of a step's time until its kernels are launched: the GPU waits for the processor
_MESSAGES = "messages between ranks are not captured"
_REDUCED = "gradients are reduced while the backward pass goes on"


def bucket(number: int) -> int:
    """The next number of the form k * 2^n with k from 8 to 16, so that at most an eighth is added."""
    unit = 1 << max(number.bit_length() - 4, 0)
    return -(-number // unit) * unit


class Shape:
    """What a graph is made for, and how a micro batch is filled up to it.

    Args:
        tokens, rows: of the graph's hidden states [tokens, rows, h].
        samples, longest: for packed rows, how many samples there are and the longest of them, both rounded up; else None.
    """

    def __init__(self, hidden: Tensor, seq_lens: list[int] | None) -> None:
        self.tokens, self.rows = bucket(max(hidden.shape[0], 128)), hidden.shape[1]
        self.samples: int | None = None
        self.longest: int | None = None
        if seq_lens is not None:
            self.samples = 1 << len(seq_lens).bit_length()  # one more than there are: the filling is a sample too
            longest = max(*seq_lens, self.tokens - hidden.shape[0])
            self.longest = min(1 << (longest - 1).bit_length(), self.tokens)

    @property
    def key(self) -> tuple[int | None, ...]:
        return (self.tokens, self.rows, self.samples, self.longest)

    def borders(self, seq_lens: list[int]) -> Tensor:
        """int32 [samples + 1] on the CPU: where samples begin; the filling is one, those behind it are empty."""
        assert self.samples is not None
        lengths = torch.zeros(self.samples + 1, dtype=torch.int32)
        lengths[1 : len(seq_lens) + 1] = torch.tensor(seq_lens, dtype=torch.int32)
        lengths[len(seq_lens) + 1] = self.tokens - sum(seq_lens)
        return lengths.cumsum(0, dtype=torch.int32)


class Static:
    """The layers over tensors that stay in place: filled before each run, in the shape of a graph."""

    def __init__(self, decoder: Any, shape: Shape, hidden: Tensor, layout: Any) -> None:
        self.decoder = decoder
        wide = (shape.tokens, *hidden.shape[1:])
        self.shape = shape
        self.hidden = torch.zeros(wide, dtype=hidden.dtype, device=hidden.device, requires_grad=True)
        self.grad_output = torch.zeros(wide, dtype=hidden.dtype, device=hidden.device)
        tables = {
            name: tuple(table.new_zeros((shape.tokens, *table.shape[1:])) for table in pair)
            for name, pair in layout.tables.items()
        }
        packed: dict[str, Any] = {}
        if shape.samples is not None:
            cu = torch.zeros(shape.samples + 1, dtype=torch.int32, device=hidden.device)
            packed = dict(cu_seqlens_q=cu, max_seqlen_q=shape.longest)
        if layout.counted is not None:  # routers leave out what only fills up
            padding = torch.zeros((shape.rows, shape.tokens), dtype=torch.bool, device=hidden.device)
            packed["counted"] = Counted(padding, torch.zeros((), device=hidden.device))
        if layout.token_keys is not None:
            packed["token_keys"] = layout.token_keys.new_zeros(shape.tokens * shape.rows)
        self.layout = replace(layout, seq_lens=None, tables=tables, **packed)
        self.output = self.hidden

    def fill(self, hidden: Tensor, layout: Any) -> None:
        """The micro batch's values into the tensors; zeros behind them."""
        _fill(self.hidden.detach(), hidden)
        for name, pair in layout.tables.items():
            for target, source in zip(self.layout.tables[name], pair):
                _fill(target, source)
        if layout.seq_lens is not None:
            borders = self.shape.borders(layout.seq_lens)
            if self.hidden.is_cuda:
                borders = borders.pin_memory()
            self.layout.cu_seqlens_q.copy_(borders, non_blocking=True)
        if layout.counted is not None:
            padding = self.layout.counted.padding
            padding[:, : hidden.shape[0]] = False if layout.counted.padding is None else layout.counted.padding
            padding[:, hidden.shape[0] :] = True
            self.layout.counted.weight.copy_(layout.counted.weight)
        if layout.token_keys is not None:
            rows = hidden.shape[1]
            _fill(self.layout.token_keys.view(-1, rows), layout.token_keys.view(-1, rows))

    def forward(self) -> None:
        """hidden to output."""
        self.hidden.grad = None
        self.output = self.decoder(hidden_states=self.hidden, attention_mask=None, packed_seq_params=self.layout)

    def backward(self) -> None:
        """grad_output to the gradients of the weights and of hidden."""
        torch.autograd.backward(self.output, self.grad_output)


def _fill(target: Tensor, source: Tensor) -> None:
    target[: source.shape[0]].copy_(source)
    if source.shape[0] < target.shape[0]:
        target[source.shape[0] :].zero_()


class Captured(Static):
    """Both passes as graphs. Capturing runs nothing, so it does not disturb the step that it happens in."""

    def __init__(self, decoder: Any, shape: Shape, hidden: Tensor, layout: Any, pool: Any, parameters: list[Tensor]) -> None:
        super().__init__(decoder, shape, hidden, layout)
        stale = [p for p in parameters if getattr(p, "main_grad_stale", False)]
        self.graphs = (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph())
        stream = torch.cuda.current_stream()  # the one that the weights' gradient hooks belong to
        for graph, run in zip(self.graphs, (super().forward, super().backward)):
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                run()
        self.output = self.output.detach()
        # What the operations noted about their buffers happens in each replay, not now.
        self.overwritten = [p for p in stale if not p.main_grad_stale]  # type: ignore[attr-defined]
        for parameter in self.overwritten:
            parameter.main_grad_stale = True  # type: ignore[attr-defined]

    def forward(self) -> None:
        self.graphs[0].replay()

    def backward(self) -> None:
        self.graphs[1].replay()
        for parameter in self.overwritten:
            parameter.main_grad_stale = False  # type: ignore[attr-defined]


class _Run(torch.autograd.Function):
    """A micro batch through a Static, as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, static: Static, layout: Any) -> Tensor:
        ctx.static, ctx.tokens = static, hidden.shape[0]
        static.fill(hidden, layout)
        with torch.enable_grad():
            static.forward()
        return static.output.detach()[: hidden.shape[0]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        static = ctx.static
        _fill(static.grad_output, grads[0])
        with torch.enable_grad():
            static.backward()
        assert static.hidden.grad is not None
        return static.hidden.grad.detach()[: ctx.tokens], None, None


def run_static(hidden: Tensor, static: Static, layout: Any) -> Tensor:
    """The layers over hidden [s, b, h] by way of `static`; a micro batch's backward pass must come before the next forward."""
    # Behind a frozen embedding nothing asks for a gradient; inside the layers adapters do.
    return _Run.apply(hidden if hidden.requires_grad else hidden.detach().requires_grad_(), static, layout)


def obstacle(decoder: Any, overlap_grad_reduce: bool = False) -> str | None:
    """Why a TransformerBlock cannot run as graphs, or None."""
    config: TransformerConfig = decoder.config
    if not torch.cuda.is_available():
        return "there is no GPU"
    if config.expert_model_parallel_size > 1:
        return "how many rows go to each rank's experts the host must know in each step"
    if config.pipeline_model_parallel_size > 1:
        return "a pipeline has several micro batches under way at once"
    if config.tensor_model_parallel_size > 1 or config.context_parallel_size > 1:
        return _MESSAGES
    if linear_ops_of(config) is not PLAIN:
        return "weights in FP8 are kept over micro batches"
    if isinstance(decoder, OffloadingBlock):
        return "activations go to the host and come back"
    if overlap_grad_reduce:
        return _REDUCED
    if any(type(layer.self_attention) is GatedDeltaNet for layer in decoder.layers):
        return "where samples begin in a gated delta net the host must know in each step"
    if config.deterministic_mode or config.attention != "fastest":
        return "the attention kernel that was asked for takes sample by sample"
    return None


def _is_plain(layer: Any) -> bool:
    """Whether a layer is of Llama's kind, all of it."""
    exact = type(layer) is FusedTransformerLayer and type(layer.mlp) is FusedMLP and type(layer.input_layernorm) is RMSNorm
    core: Any = getattr(layer.self_attention, "core_attention", None)
    exact = exact and core is not None and not isinstance(layer.self_attention, LatentAttention)
    exact = exact and not layer.config.attention_output_gate
    return (
        exact
        and layer.mlp.activation_func is F.silu
        and (core.window, core.score_cap, core.softmax_offset) == (None, None, None)
    )


class Graphs:
    """Decides whether a model's layers run as graphs, keeps these, and says so.

    Where graphs cannot be and launching takes the time, it says that larger micro batches would help.

    Args:
        decoder: the TransformerBlock.
        mode: "always", "never", or "if launching is slow": where launching kernels is what the first steps spent their time on.
        has_adapter: whether the layers have one. With adapters, recomputed layers, and layers other than Llama's kind (experts,
            windows, other norms), graphs are advised, and used only if asked for: what was compared on a GPU, gradient by gradient, are the others.
    """

    def __init__(self, decoder: Any, mode: str, overlap_grad_reduce: bool = False, has_adapter: bool = False) -> None:
        self.decoder = decoder
        recomputes = decoder.config.recompute_granularity is not None
        self.advised_only = has_adapter or recomputes or not all(_is_plain(layer) for layer in decoder.layers)
        self.parameters = list(decoder.parameters())
        self.problem = problem = obstacle(decoder, overlap_grad_reduce)
        self.on = mode == "always" and problem is None
        self.measuring = mode == "if launching is slow" and problem in (None, _MESSAGES, _REDUCED)
        told = problem and mode != "never" and torch.cuda.is_available()
        self.note = f"CUDA graphs: off, {problem}" if told else None
        self.steps = 0
        self.times: list[tuple[float, float]] = []  # seconds until all kernels were launched, and until they were done
        self.seen: set[tuple[Any, ...]] = set()
        self.captured: dict[tuple[Any, ...], Captured] = {}
        possible = problem is None and (self.on or self.measuring)
        self.stream = torch.cuda.Stream() if possible else None
        self.pool = torch.cuda.graph_pool_handle() if possible else None

    @contextlib.contextmanager
    def stream_of_step(self) -> Iterator[None]:
        """Forward and backward passes run on one stream of their own, in which graphs can be captured."""
        if self.stream is None:
            yield
            return
        outer = torch.cuda.current_stream()
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            yield
        outer.wait_stream(self.stream)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around the forward and backward passes of a training step."""
        self.steps += 1
        measured = self.measuring and self.steps in _MEASURED
        if measured:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        with self.stream_of_step():
            yield
        if measured:
            launched = time.perf_counter() - begun
            torch.cuda.synchronize()
            self.times.append((launched, time.perf_counter() - begun))
            if self.steps == _MEASURED[-1]:
                self._decide()

    def _decide(self) -> None:
        launched, done = min(self.times, key=lambda pair: pair[1])
        self.measuring, waits = False, launched > _MUCH * done
        what = f"launching kernels took {1e3 * launched:.0f} of {1e3 * done:.0f} ms of a step"
        if self.problem is None and self.advised_only:
            self.note = f"{what}: --cuda_graphs true would launch them at once" if waits else None
        elif self.problem is None:
            self.on = waits
            self.note = f"CUDA graphs: {'on' if waits else 'off'}, {what}"
        elif waits:
            self.note = (
                f"{what}: fewer micro batches with more tokens each (--batch_size, --max_length) would use the GPU better"
            )

    def take_note(self) -> str | None:
        """What the user should read, once."""
        note, self.note = self.note, None
        return note

    def __call__(self, hidden: Tensor, layout: Any) -> Tensor:
        """hidden [s, b, h] through the layers."""
        if not (self.on and torch.is_grad_enabled()):
            return self._as_it_is(hidden, layout)
        shape = Shape(hidden, layout.seq_lens)
        # Whether a buffer is overwritten or added to is part of the kernels, so the first micro batch of a step has its own.
        key = (*shape.key, tuple(getattr(p, "main_grad_stale", False) for p in self.parameters))
        captured = self.captured.get(key)
        if captured is None:
            if key not in self.seen or len(self.captured) >= _LIMIT:
                self.seen.add(key)
                return self._as_it_is(hidden, layout)
            captured = self._capture(shape, hidden, layout)
            if captured is None:
                return self._as_it_is(hidden, layout)
            self.captured[key] = captured
        return run_static(hidden, captured, layout)

    def _as_it_is(self, hidden: Tensor, layout: Any) -> Tensor:
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=layout)

    def _capture(self, shape: Shape, hidden: Tensor, layout: Any) -> Captured | None:
        try:
            return Captured(self.decoder, shape, hidden, layout, self.pool, self.parameters)
        except Exception as error:  # too little memory, or an operation that cannot be captured: train on without
            self.on = False
            self.captured.clear()
            torch.cuda.synchronize()
            self.note = f"CUDA graphs: off, {type(error).__name__}: {str(error).splitlines()[0]}"
            return None
