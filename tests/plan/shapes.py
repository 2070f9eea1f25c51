"""Runs of real shapes without any file behind them, as the benchmarks measured them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from megaswift.config.options import RlhfArguments, SftArguments
from megaswift.models import parameters_of
from megaswift.models.adapters import Lora, target_modules
from megaswift.run.resolve import World, resolve
from megaswift.run.source import TrainingSource
from megaswift.run.spec import DataRef, Run

VOCAB = 151936
DENSE = {
    "0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864),
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960),
    "3b": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008),
    "7b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944),
}
VOCABULARIES = {"7b": 152064}
EXPERTS = dict(
    hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128,
    num_experts_per_tok=8, intermediate_size=6144, vocab_size=VOCAB,
)  # fmt: skip


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": dict(num_attention_heads=6, head_dim=256, query_pre_attn_scalar=256, sliding_window=512),
    "olmo3": dict(sliding_window=4096, num_key_value_heads=12),
    "glm4": dict(partial_rotary_factor=0.5, attention_bias=True),
}


@cache
def config_of(shape: str) -> Any:
    """Of a dense Qwen2.5 shape by its name, of "moe-N": N layers of Qwen3-30B-A3B, or of another family at the size of 1.5B."""
    from transformers import AutoConfig, Qwen2Config, Qwen3MoeConfig

    common: dict[str, Any] = {"max_position_embeddings": 32768}
    if shape.startswith("moe-"):
        routed = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False}
        return Qwen3MoeConfig(num_hidden_layers=int(shape.removeprefix("moe-")), **routed, **common, **EXPERTS)
    if shape in FAMILIES:
        values = {**DENSE["1.5b"], "head_dim": 128, "pad_token_id": None, "vocab_size": VOCAB, **FAMILIES[shape]}
        return AutoConfig.for_model(shape, tie_word_embeddings=True, **common, **values)
    vocab, tied = VOCABULARIES.get(shape, VOCAB), shape != "7b"
    return Qwen2Config(tie_word_embeddings=tied, vocab_size=vocab, **common, **DENSE[shape])


@cache
def targets(shape: str, words: tuple[str, ...]) -> tuple[str, ...]:
    return target_modules(parameters_of(config_of(shape)), words)


def run_of(
    shape: str, lora: tuple[str, ...] = (), bits: int | None = None, gpus: int = 1, rank: int = 8, **options: Any
) -> tuple[Run, Any]:
    """A run in bf16 on so many GPUs, with one micro batch a step unless said otherwise; its config.

    Args:
        lora: words for --target_modules; (): all weights are trained.
    """
    config = config_of(shape)
    values = {"model_type": "bench", "batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 4096, "max_steps": 100}
    kind = RlhfArguments if "rlhf_type" in options else SftArguments
    args = kind(**(values | options), sft_type="lora" if lora else "full")
    source = TrainingSource(args, Path("none"), Path("none"), config, "bf16", manifest={}, run_dir=None, first_step=0)
    if lora:
        source = replace(source, adapter=Lora(rank=rank, alpha=32, dropout=0.0, targets=targets(shape, lora), bits=bits))
    return resolve(args, source, World(gpus, on_gpu=True), DataRef(train="rows", train_rows=10**6), run_dir="none"), config
