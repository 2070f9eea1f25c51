"""Families of one size on one GPU through the product's own trainer, beside transformers with Liger kernels, in one run.

python benchmarks/family_speed.py [--families llama,gemma3_text,olmo3,glm4,qwen3_5_text] [--size 1.5b] [--seq 4096] [--micro 4] [--peers true]

Random weights, random tokens, everything trained, one micro batch a step. Ours keeps fp32 master weights, moments and
gradients; the peer keeps bf16 only. TFLOP/s count 6 times the weights of matrix products (a tied head once) and the scores
that a layer's window leaves; states of linear attention are not counted. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "tiny": dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128, vocab_size=512),
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, head_dim=128, intermediate_size=8960, vocab_size=151936),
}  # fmt: skip
# What a family's published models have otherwise, for sizes that are not tiny.
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": dict(num_attention_heads=6, head_dim=256, query_pre_attn_scalar=256, sliding_window=512),
    "gemma3_text, heads of 128": dict(query_pre_attn_scalar=128, sliding_window=512),
    "olmo3": dict(sliding_window=4096, num_key_value_heads=12),
    "olmo3, windows of 1024": dict(sliding_window=1024, num_key_value_heads=12),
    "glm4": dict(partial_rotary_factor=0.5, attention_bias=True),
    "qwen3_5_text": dict(
        num_attention_heads=6, head_dim=256, num_key_value_heads=2, linear_num_key_heads=16, linear_num_value_heads=16,
        linear_key_head_dim=128, linear_value_head_dim=128, intermediate_size=6144, num_hidden_layers=24,
    ),
}  # fmt: skip


def config_of(name: str, size: str) -> Any:
    """The config of a family's model of a size."""
    from transformers import AutoConfig

    family = name.split(",", maxsplit=1)[0]
    own = OWN[name] if size != "tiny" else {"sliding_window": 8} if "sliding_window" in OWN[name] else {}
    tiny = {
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    values = SIZES[size] | (tiny if size == "tiny" else {"pad_token_id": None}) | own
    values = {k: v for k, v in values.items() if not k.startswith("linear_") or family == "qwen3_5_text"}
    config = AutoConfig.for_model(family, tie_word_embeddings=True, max_position_embeddings=32768, **values)
    config.architectures = ["any"]
    return config


def flops_a_token(config: Any, seq: int, products: int) -> float:
    """Forward and backward; see the file's docstring.

    Args:
        products: weights of matrix products, a tied head once.
    """
    from megaswift.models import family_of

    scores = 0.0
    for kind in family_of(config.model_type).layers(config):
        if kind.delta is None:
            keys = min(seq, kind.window or seq)
            scores += config.num_attention_heads * config.head_dim * (keys - keys * keys / (2 * seq))
    return 6 * products + 12 * scores


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Median step, tokens/s and peak memory of our trainer."""
    from moe_speed import run_of, trainer_of
    from profiling import measured, profiled

    from megaswift.megatron import process_groups as ranks

    config = config_of(options.one, options.size)
    options.ep, options.lora, options.graphs, name, options.one = 1, None, "auto", options.one, "none"
    run = run_of(config, options, 1)
    with ranks.joined(run.parallel, 42) as rank:
        trainer = trainer_of(run, config, None)
        median, loss, batches = measured(trainer, rank, config.vocab_size, options.seq, options.micro, options.steps)
        if options.profile:
            print(profiled(lambda step: trainer.step([batches[step]])), file=sys.stderr)
        found = told(config, options, median, loss)
        trainer.close()
    return {"ours": name} | found


def told(config: Any, options: argparse.Namespace, median: float, loss: float) -> dict[str, Any]:
    """The figures of a measurement."""
    from megaswift.models import parameters_of

    products = sum(math.prod(parameter.shape) for parameter in parameters_of(config) if len(parameter.shape) > 1)
    rate = options.micro * options.seq / median
    return {
        "products_m": round(products / 1e6), "step_s": round(median, 4), "tok_s": round(rate),
        "tflops": round(rate * flops_a_token(config, options.seq, products) / 1e12, 1),
        "mem_gb": round(torch.cuda.max_memory_allocated() / 2**30, 1) if torch.cuda.is_available() else None, "loss": round(loss, 4),
    }  # fmt: skip


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """The same of transformers' model, Liger's parts in it where it has any."""
    from profiling import plain_steps
    from transformers import AutoModelForCausalLM

    family, cuda = options.peer_one.split(",", maxsplit=1)[0], torch.cuda.is_available()
    config = config_of(options.peer_one, options.size)
    device, parts = ("cuda" if cuda else "cpu"), "none"
    if cuda:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as PARTS

        if family in PARTS:
            PARTS[family]()
            parts = "liger"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    model.train()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, config.vocab_size, (options.micro, options.seq), generator=generator).to(device) for _ in range(4)]
    median, loss = plain_steps(
        list(model.parameters()), lambda step: model(input_ids=rows[step % 4], labels=rows[step % 4]).loss, options.steps
    )
    return {"peer": options.peer_one, "parts": parts} | told(config, options, median, loss)


def main() -> int:
    """Run what is asked for; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="llama;gemma3_text;olmo3;glm4;qwen3_5_text", help="separated by semicolons")
    parser.add_argument("--size", default="1.5b", choices=SIZES)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one")
    parser.add_argument("--peer-one")
    options = parser.parse_args()
    if options.one or options.peer_one:
        print(json.dumps(ours(options) if options.one else peer(options)))
        return 0
    words = [sys.executable, __file__, "--size", options.size, "--seq", str(options.seq), "--micro", str(options.micro)]
    words += ["--steps", str(options.steps), *(["--profile"] if options.profile else [])]
    results = []
    for family in options.families.split(";"):
        for which in ["--one", *([] if options.without_peers else ["--peer-one"])]:
            done = subprocess.run([*words, which, family], capture_output=True, text=True, timeout=200, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            results.append(json.loads(lines[-1]) if lines else {which: family, "failed": done.stderr[-700:]})
            print(json.dumps(results[-1]), flush=True)
            if options.profile and which == "--one":
                print(done.stderr[-7000:], flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
