"""Layers of different kinds, and parts with another formula: no fused path takes a subclass for its parent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from megaswift.megatron import layer_specs as backend
from megaswift.megatron.kernels.activation_offload import offload_activations
from megaswift.megatron.kernels.megatron_layer import (
    CoreAttention,
    FusedMLP,
    FusedSelfAttention,
    FusedTransformerLayer,
)
from megaswift.megatron.kernels.parallel_linear import ColumnParallel, RowParallel
from megaswift.megatron.model import RotaryTable, build
from megaswift.megatron.norms import RMSNorm
from megaswift.models.kinds import Kind
from megaswift.proof.streams import one_process
from megaswift.run.spec import Parallel, Precision
from megaswift.weights.hf.config import load_config
from megaswift.weights.load_hf import load_hf_weights
from tests import tiny


class OneMore(RMSNorm):
    """Its weight is stored minus one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.weight * (1 + self.weight)


class TwiceColumn(ColumnParallel):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(*args, **kwargs)
        return 2 * output, bias


class TwiceRow(RowParallel):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(x)
        return 2 * output, bias


class TwiceMLP(FusedMLP):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(*args, **kwargs)
        return 2 * output, bias


class TwiceQuery(FusedSelfAttention):
    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        query, *others = super().get_query_key_value_tensors(*args, **kwargs)
        return 2 * query, *others


class TwiceCore(CoreAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


class TwiceAttention(FusedTransformerLayer):
    def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        after, context = super()._forward_attention(hidden_states, *args, **kwargs)
        return hidden_states + 2 * (after - hidden_states), context


def twice_added(*_: Any) -> Callable[..., Tensor]:
    return lambda delta, residual, _: residual + 2 * delta[0]


QKV = ("q_proj", "k_proj", "v_proj")
# What is put where, and the weights of the transformers model that then mean the same: names, and what happens to them.
SUBCLASSES: dict[str, tuple[Any, tuple[str, ...], Callable[[Tensor], Tensor]]] = {
    "norm": (mock.patch.dict(backend.NORMS, rms=OneMore), ("norm.weight",), lambda weight: 1 + weight),
    "column": (mock.patch.object(backend, "ColumnParallel", TwiceColumn), (*QKV, "gate_proj", "up_proj"), lambda weight: 2 * weight),
    "row": (mock.patch.object(backend, "RowParallel", TwiceRow), ("o_proj", "down_proj"), lambda weight: 2 * weight),
    "mlp": (mock.patch.dict(backend.MLPS, gated=TwiceMLP), ("down_proj",), lambda weight: 2 * weight),
    "attention": (mock.patch.dict(backend.ATTENTIONS, grouped_query=TwiceQuery), ("q_proj",), lambda weight: 2 * weight),
    "core attention": (mock.patch.object(backend, "CoreAttention", TwiceCore), ("o_proj",), lambda weight: 2 * weight),
    "layer": (mock.patch.object(backend, "FusedTransformerLayer", TwiceAttention), ("o_proj",), lambda weight: 2 * weight),
    "addition": (mock.patch.object(backend, "get_bias_dropout_add", twice_added), ("o_proj", "down_proj"), lambda weight: 2 * weight),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Qwen2, whose queries, keys and values have biases, in this process alone."""
    path = tmp_path_factory.mktemp("qwen2")
    tiny.save_tiny(path, "qwen2", num_hidden_layers=2)
    with one_process():
        yield path


@pytest.mark.parametrize("part", SUBCLASSES)
def test_a_subclass_computes_by_its_own_formula(part: str, folder: Path) -> None:
    patch, names, change = SUBCLASSES[part]
    tokens = torch.arange(24)[None] * 5 % 130
    reference = tiny.tiny_model("qwen2", num_hidden_layers=2)
    for name, parameter in reference.named_parameters():
        if any(one in name for one in names) and (part != "norm" or "norm" in name):
            parameter.copy_(change(parameter))
    with patch:
        model = build(load_config(folder), Parallel(), Precision())
    load_hf_weights(model, folder)
    found = model(tokens, torch.arange(24)[None])
    wanted = reference(tokens).logits
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_the_first_product_is_not_made_again_by_another_formula(folder: Path) -> None:
    with SUBCLASSES["column"][0]:
        model = build(load_config(folder), Parallel(), Precision())
    load_hf_weights(model, folder)
    mlp, found = model.decoder.layers[0].mlp, []
    for mlp.recompute_first in (False, True):
        with torch.enable_grad():
            x = torch.linspace(-1, 1, 256).view(4, 1, 64).requires_grad_()
            found.append(torch.autograd.grad(mlp(x)[0].square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_the_fused_paths_are_those_that_run(folder: Path) -> None:
    """Without a subclass the norms, the second product and core attention are not called as modules."""
    model = build(load_config(folder), Parallel(), Precision())
    layer = model.decoder.layers[0]
    for module in (layer.input_layernorm, layer.mlp.linear_fc2, layer.self_attention.core_attention):
        module.forward = mock.Mock(side_effect=AssertionError(type(module).__name__))
    model(torch.arange(8)[None], torch.arange(8)[None])


def test_the_attention_that_was_asked_for(folder: Path) -> None:
    """A kernel that the user named is the only one that may run, and no fused path goes past it."""
    flash, plain = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
    for asked, kernels in {"flash": [flash], "plain": [plain], "fastest": [flash, plain]}.items():
        model = build(load_config(folder), Parallel(), Precision(attention=asked))  # type: ignore[arg-type]
        attention = model.decoder.layers[0].self_attention
        assert attention.core_attention.kernels == kernels
        layout = backend.SequenceLayout(tables={"main": None})
        assert attention._takes(layout, {}) is (asked == "fastest")


def test_offloading_refuses_a_block_of_its_own(folder: Path) -> None:
    model = build(load_config(folder), Parallel(), Precision())
    model.decoder.__class__ = type("OtherBlock", (type(model.decoder),), {})
    with pytest.raises(TypeError, match="OtherBlock"):
        offload_activations(model.decoder, 1)


@pytest.mark.parametrize(("name", "precision"), [("ernie4_5", torch.float32), ("smollm3", torch.bfloat16)])
def test_tables_have_the_precision_that_the_family_rotates_in(name: str, precision: torch.dtype, folder: Path) -> None:
    model = build(tiny.tiny_config(name), Parallel(), Precision(dtype="bf16"))
    cos, sin = model.ropes["main"](torch.arange(8)[None], model.config.params_dtype)
    assert cos.dtype == sin.dtype == precision
    core = model.decoder.layers[0].self_attention.core_attention
    query = torch.randn(8, 1, 8, cos.shape[-1], dtype=torch.bfloat16)
    assert (
        core(query, query, query, packed_seq_params=backend.SequenceLayout(tables={"main": (cos, sin)})).dtype == torch.bfloat16
    )


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "granite"])
def test_the_factor_of_embeddings_has_the_precision_that_transformers_multiplies_in(name: str, folder: Path) -> None:
    """Gemma's is rounded first: the root of 48 is 6.9375 in bf16. Granite's is not."""
    config = tiny.tiny_config(name, hidden_size=48, **({"embedding_multiplier": 6.93} if name == "granite" else {}))
    for dtype, wanted in (("bf16", 6.9375), ("fp32", float(torch.tensor(48.0).sqrt()))):
        model = build(config, Parallel(), Precision(dtype=dtype))  # type: ignore[arg-type]
        assert model.embedding_factor == (6.93 if name == "granite" else wanted)


def test_layers_that_must_be_alike(folder: Path) -> None:
    with pytest.raises(ValueError, match="stand 'above' its parts"):
        backend.block_spec([Kind(norms="above")])


@pytest.mark.parametrize("part", ["attention", "mlp", "norm"])
def test_a_name_without_a_module_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match=f"{part} is 'other'"):
        backend.block_spec([Kind(), Kind(**{part: "other"})])


@pytest.mark.parametrize("name", ["sliding_attention", "full_attention"])
def test_rotations_by_layer_type_are_those_of_transformers(name: str) -> None:
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    entries = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    config = Gemma3TextConfig(head_dim=16, rope_parameters=entries)
    positions = torch.arange(40)[None]
    wanted = Gemma3RotaryEmbedding(config)(torch.zeros(1), positions, name)
    found = RotaryTable(config, torch.device("cpu"), name)(positions, torch.float32)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours[:, 0, 0], theirs[0], rtol=0, atol=1e-6)
