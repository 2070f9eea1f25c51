"""The fused layer, embedding, loss and optimizer inside Megatron-Core against its own parts, over two gloo ranks."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

TOKENS, SEQUENCE = 96, 12
# fmt: off
SETTINGS: dict[str, Any] = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=40, normalization="RMSNorm",
    gated_linear_unit=True, add_bias_linear=False, add_qkv_bias=True, activation_func=F.silu, hidden_dropout=0.0,
    attention_dropout=0.0, layernorm_epsilon=1e-6, use_cpu_initialization=True, calculate_per_token_loss=True,
    bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False,
)
# fmt: on


def _model(fused: bool, tp: int, sequence_parallel: bool, qk_norm: bool) -> Any:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megaswift.megatron import layer_specs as backend
    from megaswift.megatron.kernels.megatron_layer import fuse_embedding
    from megaswift.megatron.model import EngineConfig
    from megaswift.models.kinds import Kind

    config = EngineConfig(**SETTINGS, tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel, qk_layernorm=qk_norm)
    spec = backend.block_spec([Kind(qk_norm=qk_norm)] * 2)
    if not fused:
        _plain(spec)
    torch.manual_seed(1)
    model = GPTModel(
        config,
        spec,
        vocab_size=TOKENS,
        max_sequence_length=64,
        position_embedding_type="none",
        share_embeddings_and_output_weights=True,
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return fuse_embedding(model) if fused else model


class _Norm(torch.nn.Module):
    """A norm by PyTorch, with Megatron-Core's mark for sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def _plain(block: Any) -> None:
    """Megatron-Core's own modules in place of ours, all but the core attention, of which it has none for packed rows."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megaswift.megatron.compat import mlp_spec

    for layer in block.layer_specs:
        layer.module, parts = TransformerLayer, layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = _Norm
        parts.mlp = mlp_spec(MLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
        attention = parts.self_attention
        attention.module = SelfAttention
        attention.submodules.linear_qkv, attention.submodules.linear_proj = ColumnParallelLinear, RowParallelLinear
        for name in ("q_layernorm", "k_layernorm"):
            if getattr(attention.submodules, name) is not IdentityOp:
                setattr(attention.submodules, name, _Norm)
    block.layer_norm = _Norm


def _loss(model: Any, fused: bool, ids: torch.Tensor, labels: torch.Tensor, layout: Any, tp: int) -> torch.Tensor:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    from megaswift.megatron.kernels.linear_cross_entropy import linear_cross_entropy

    hidden = model.decoder(
        hidden_states=model.embedding(input_ids=ids, position_ids=None), attention_mask=None, packed_seq_params=layout
    )
    weight = model.shared_embedding_or_output_weight()
    if not fused:
        logits, _ = model.output_layer(hidden, weight=weight)
        wanted = labels.t().contiguous()
        return (vocab_parallel_cross_entropy(logits.float(), wanted.clamp_min(0)) * (wanted >= 0)).sum()
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)
    return linear_cross_entropy(
        hidden.reshape(-1, 32),
        weight,
        labels.t(),
        vocab_start=parallel_state.get_tensor_model_parallel_rank() * weight.shape[0],
        vocab_size=TOKENS,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        grad_scale=1.0,
        shared_with_embedding=True,
        reduce_hidden_grad=not model.config.sequence_parallel,
    )[0]


def _train(
    fused: bool, tp: int, sequence_parallel: bool, packed: bool, qk_norm: bool
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final parameters of three steps."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from tests.kernels.test_rope import tables

    from megaswift.megatron import compat
    from megaswift.megatron import layer_specs as backend
    from megaswift.megatron.kernels.main_grad import settle_main_grads, zero_main_grads
    from megaswift.megatron.kernels.megatron_optimizer import FusedOptimizer, fuse_optimizer

    model = _model(fused, tp, sequence_parallel, qk_norm)
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), model
    )
    compat.use_our_adamw()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True, clip_grad=1.0), [ddp]
    )
    if fused:
        optimizer = fuse_optimizer(optimizer)
        assert type(optimizer) is FusedOptimizer
    lengths = [5, 7] if packed else None
    batch = 1 if packed else 2
    positions = torch.cat([torch.arange(n) for n in lengths]) if packed else torch.arange(SEQUENCE)
    cos, sin = tables(positions.unsqueeze(1).expand(-1, batch), 8, "cpu")
    edges = torch.tensor([0, 5, 12], dtype=torch.int32) if packed else None
    layout = backend.SequenceLayout(
        tables={"main": (cos.unsqueeze(2), sin.unsqueeze(2))},
        seq_lens=lengths,
        cu_seqlens_q=edges,
        max_seqlen_q=7 if packed else None,
    )
    torch.manual_seed(10 + dist.get_rank() // tp)
    losses, norms = [], []
    for _ in range(3):
        zero_main_grads(ddp) if fused else ddp.zero_grad_buffer()
        optimizer.zero_grad()
        supervised = torch.zeros((), dtype=torch.int)
        for _ in range(2):  # micro batches
            ids, labels = torch.randint(0, TOKENS, (batch, SEQUENCE)), torch.randint(0, TOKENS, (batch, SEQUENCE))
            labels[:, :4] = -100
            loss = _loss(model, fused, ids, labels, layout, tp)
            loss.backward()
            supervised += (labels >= 0).sum()
        losses.append(float(loss))
        if fused:
            settle_main_grads(ddp)
            finalize_model_grads([ddp], None)
            dist.all_reduce(supervised, group=ddp.dp_cp_group)
            optimizer.divisor = supervised
            optimizer.prepare_grads()
            norm = optimizer.get_grad_norm()
            _skip_once(optimizer, norm, model)
            optimizer.divisor = supervised
            optimizer.update(norm)
        else:
            finalize_model_grads([ddp], supervised)
            _, norm, _ = optimizer.step()
        norms.append(float(norm))
    return losses, norms, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _skip_once(optimizer: Any, norm: torch.Tensor, model: Any) -> None:
    """An update beyond the limit changes nothing, and its count can be taken back."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.update(norm, limit=float(norm) / 2)
    optimizer.forget_step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def _rank(rank: int, folder: str, tp: int, sequence_parallel: bool, packed: bool, qk_norm: bool) -> None:
    torch.set_num_threads(1)
    import warnings

    warnings.filterwarnings("ignore")
    from megatron.core import parallel_state

    from megaswift.megatron.compat import cpu_engine

    dist.init_process_group("gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=rank, world_size=2)
    with cpu_engine():
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel(tp, 1)
        model_parallel_cuda_manual_seed(1)
        torch.save([_train(fused, tp, sequence_parallel, packed, qk_norm) for fused in (False, True)], f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "packed", "qk_norm"),
    [(1, False, False, False), (2, False, True, True), (2, True, False, False)],
)
def test_three_steps_like_megatron_core(tp, sequence_parallel, packed, qk_norm):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, tp, sequence_parallel, packed, qk_norm), nprocs=2)
        results = [torch.load(f"{folder}/{rank}") for rank in range(2)]
    for (plain_losses, plain_norms, plain), (losses, norms, parameters) in results:
        torch.testing.assert_close(losses, plain_losses, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(norms, plain_norms, rtol=2e-4, atol=1e-6)
        for name, value in plain.items():
            torch.testing.assert_close(
                parameters[name], value, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
