"""The Megatron side is real: a GPTModel built by Megatron-Core alone loads it at another layout and computes the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.ranks import RankPool

TOKENS = torch.arange(3, 43)[None]


def plain_logits(release: str, name: str, values: dict[str, Any], tp: int, pp: int) -> Any:
    """On one rank, with no code of ours but the CPU shim: build, dist_checkpointing.load, forward."""
    import contextlib

    from megaswift.megatron.compat import cpu_engine

    with cpu_engine(), contextlib.ExitStack() as stack:
        torch.distributed.init_process_group("gloo")
        stack.callback(torch.distributed.destroy_process_group)
        from megatron.core import dist_checkpointing, parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.transformer_config import TransformerConfig

        parallel_state.initialize_model_parallel(tp, pp)
        stack.callback(parallel_state.destroy_model_parallel)
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=values["num_hidden_layers"], hidden_size=values["hidden_size"], num_attention_heads=values["num_attention_heads"],
            num_query_groups=values["num_key_value_heads"], ffn_hidden_size=values["intermediate_size"], kv_channels=values["head_dim"],
            layernorm_epsilon=values["rms_norm_eps"], normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
            add_bias_linear=False, add_qkv_bias=name == "qwen2", hidden_dropout=0.0, attention_dropout=0.0, tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32, use_cpu_initialization=True, bias_activation_fusion=False,
            bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False,
            persist_layer_norm=False, batch_p2p_comm=False, qk_layernorm=name == "qwen3",
        )  # fmt: skip
        model = GPTModel(
            config, get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=name == "qwen3"), values["vocab_size"], 256,
            pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=values["tie_word_embeddings"], position_embedding_type="rope", rotary_base=10000,
            parallel_output=False,
        ).eval()  # fmt: skip
        state = model.sharded_state_dict(prefix="")
        model.load_state_dict(dist_checkpointing.load({"model": state}, release)["model"])
        kept: list[torch.Tensor] = []

        def step(_batches: Any, module: Any) -> Any:
            out = module(
                TOKENS, torch.arange(TOKENS.shape[1])[None], torch.ones(1, 1, TOKENS.shape[1], TOKENS.shape[1]).triu(1).bool()
            )
            return out, lambda result: (kept.append(result.detach()), {})[1] or (torch.zeros(()), {})

        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=step, data_iterator=iter([None]), model=[model], num_microbatches=1, seq_length=TOKENS.shape[1],
                micro_batch_size=1, forward_only=True,
            )  # fmt: skip
        return kept[0] if kept else None


@pytest.mark.parametrize(("name", "tied", "tp", "pp"), [("mistral", False, 2, 2), ("qwen2", True, 4, 1), ("qwen3", True, 1, 2)])
def test_plain_megatron_loads_and_agrees(name: str, tied: bool, tp: int, pp: int, pool: RankPool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    changes = {
        "tie_word_embeddings": tied,
        "vocab_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    folder = tmp_path / "hf"
    tiny.save_tiny(folder, name, **changes)
    release = tiny.to_megatron(folder, tmp_path / "megatron")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = model.config
    values = {
        key: getattr(config, key)
        for key in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "rms_norm_eps",
            "vocab_size",
        )
    }
    values |= {
        "tie_word_embeddings": tied,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }
    with torch.no_grad():
        wanted = model(TOKENS).logits
    found = [result for result in pool.run(tp * pp, plain_logits, str(release), name, values, tp, pp) if result is not None]
    assert len(found) == tp
    assert all((logits - wanted).abs().max() < 5e-6 for logits in found)
