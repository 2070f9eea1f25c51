"""Experts on one GPU, or ep over several, through the product's own trainer, beside transformers' grouped products in one run.

python benchmarks/moe_speed.py [--peer PATH/peer_moe.py] [--layers 8] [--seq 4096] [--micro 2] [--ways none,layers] [--lora attention|all [--bits 4]] [--profile]
torchrun --nproc-per-node 2 benchmarks/moe_speed.py --one none --ep 2

Random weights in the shape of Qwen3-30B-A3B with so many layers (0: a tiny one), all trained, fp32 master weights and
moments; random tokens, one micro batch a step. `layers`: whole layers are recomputed. `--lora attention` trains adapters of
rank 8 on attention alone, `--lora all` on the experts too, beside a frozen base. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

TINY = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, moe_intermediate_size=32,
    num_experts=8, num_experts_per_tok=2, intermediate_size=64, vocab_size=512,
)  # fmt: skip
REAL = dict(
    hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128,
    num_experts_per_tok=8, intermediate_size=6144, vocab_size=151936,
)  # fmt: skip


def shape_of(layers: int) -> Any:
    """The config of a model with so many layers."""
    from transformers import Qwen3MoeConfig

    sizes: dict[str, Any] = TINY if layers == 0 else REAL | {"num_hidden_layers": layers}
    config = Qwen3MoeConfig(
        max_position_embeddings=32768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    return config


def run_of(config: Any, options: argparse.Namespace, world: int) -> Any:
    """The run's specification, for `world` processes."""
    from megaswift.config.options import SftArguments
    from megaswift.run.resolve import World, resolve
    from megaswift.run.source import TrainingSource
    from megaswift.run.spec import DataRef

    args = SftArguments(
        model_type="bench", dataset=["none"], max_steps=100, batch_size=options.micro, gradient_accumulation_steps=1,
        max_length=options.seq, learning_rate=1e-5, gradient_checkpointing=options.one == "layers", ep=options.ep,
        sft_type="lora" if options.lora else "full", cuda_graphs=options.graphs,
    )  # fmt: skip
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    source = TrainingSource(args, Path("none"), Path("none"), config, dtype, manifest={}, run_dir=None, first_step=0)
    return resolve(args, source, World.of(world), DataRef(train="rows", train_rows=10**6), run_dir="none")


def adapter_of(config: Any, which: str, bits: int | None) -> Any:
    """The adapter that is meant by --lora and --bits."""
    from megaswift.models import parameters_of
    from megaswift.models.adapters import Lora, target_modules

    words = ["all-linear", *(["all-experts"] if which == "all" else [])]
    return Lora(rank=8, alpha=32, dropout=0.0, targets=target_modules(parameters_of(config), words), bits=bits)


def trainer_of(run: Any, config: Any, lora: Any, objective: Any = None) -> Any:
    """A trainer with random weights, of supervised tokens unless another objective is given; process groups must have been joined."""
    from megaswift.megatron.model import build, recompute_parts
    from megaswift.megatron.packed_weights import fill
    from megaswift.models import parameters_of
    from megaswift.train.adapters import LoraAdapter
    from megaswift.train.objectives import SupervisedTokens
    from megaswift.train.trainer import Trainer

    bits = None if lora is None else lora.bits
    model = build(config, run.parallel, run.precision, run.memory, run.routing, packed=bits is not None)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    if bits is not None:
        device, dtype = next(model.parameters()).device, model.config.params_dtype
        fill(
            model,
            parameters_of(config),
            0,
            lambda parameter: torch.randn(parameter.shape, device=device, dtype=dtype) * 0.02,
            bits,
        )
    if lora is not None:
        LoraAdapter(lora, config, 0).attach(model)
    made = Trainer(model, run, objective or SupervisedTokens())
    recompute_parts(model, run.memory.recompute)
    return made


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Median step, tokens/s of each GPU, and peak memory of our trainer."""
    import os

    from profiling import measured

    from megaswift.megatron import process_groups as ranks
    from megaswift.run.spec import Method

    world, config, seq, micro = int(os.environ.get("WORLD_SIZE", 1)), shape_of(options.layers), options.seq, options.micro
    run = run_of(config, options, world)
    lora = adapter_of(config, options.lora, options.bits) if options.lora else None
    if lora is not None:
        run = replace(run, method=Method(sft_type="lora", adapter=lora))
    with ranks.joined(run.parallel, 42) as rank:
        trainer = trainer_of(run, config, lora)
        median, loss, batches = measured(trainer, rank, config.vocab_size, seq, micro, options.steps)
        if options.profile and rank.dp_rank == 0 and world == 1:
            from profiling import profiled

            print(profiled(lambda step: trainer.step([batches[step]])), file=sys.stderr)
        note = trainer.graphs.take_note() or ""
        memory = torch.cuda.max_memory_allocated() / 2**30 if rank.on_gpu else None
        trainer.close()
    return {
        "ours": options.one, "lora": options.lora or "", "bits": options.bits, "layers": options.layers, "seq": seq, "mbs": micro, "processes": world, "ep": options.ep,
        "step_s": round(median, 4), "tok_s_gpu": round(micro * seq / median), "mem_gb": memory and round(memory, 1),
        "loss": round(loss, 6), "graphs": trainer.graphs.on, "note": note, "first": rank.dp_rank == 0,
    }  # fmt: skip


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way and the peer, each in a process of its own."""
    adapters = ["--lora", options.lora] if options.lora else []
    adapters += ["--bits", str(options.bits)] if options.bits else []
    number = {None: "0", "attention": "1", "all": "2"}[options.lora]
    sizes = ["--layers", str(options.layers), "--seq", str(options.seq), "--micro", str(options.micro)]
    commands = [
        [
            __file__,
            *sizes,
            *adapters,
            "--graphs",
            options.graphs,
            "--steps",
            str(options.steps),
            "--one",
            way,
            *(["--profile"] * options.profile),
        ]
        for way in options.ways.split(",")
    ]
    if options.peer is not None:
        tail = [str(options.layers), str(options.seq), str(options.micro), number]
        commands += [[str(options.peer), *tail, "1" if way == "layers" else "0", "12"] for way in options.ways.split(",")]
    results = []
    for command in commands:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=280, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        results.append(json.loads(lines[-1]) if lines else {"command": command, "failed": done.stderr[-1500:]})
        print(json.dumps(results[-1]), flush=True)
        if options.profile and lines:
            print(done.stderr[-9000:], flush=True)
    return results


def main() -> int:
    """Run what is asked for; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--ways", default="none,layers")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--lora", choices=("attention", "all"))
    parser.add_argument("--bits", type=int, choices=(4, 8), help="in which the frozen weights are held")
    parser.add_argument("--graphs", choices=("auto", "true", "false"), default="auto")
    parser.add_argument("--one")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        result = ours(options)
        if result.pop("first"):
            print(json.dumps(result))
        return 0
    results = run_all(options)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
