"""LoRA on one GPU through the product's own trainer, beside PEFT with Liger kernels and Unsloth, in one run.

python benchmarks/lora_speed.py [--peers DIR] [--ways none,layers,4bit,4bit-layers] [--shape 7b] [--seq 4096] [--micro 2] [--out results.json]
torchrun --nproc-per-node 2 benchmarks/lora_speed.py --one none [--tp 2]

Random weights in a Qwen2.5 shape, random tokens, one micro batch a step, rank 8 on all seven linear layers, no dropout.
`layers`: whole layers are recomputed. DIR holds peer_lora.py and peer_unsloth.py. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=512),
    "7b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, vocab_size=152064),
}  # fmt: skip


def run_of(shape: str, seq: int, micro: int, way: str, tp: int, world: int) -> tuple[Any, Any]:
    """The run's specification for `world` processes, and the model's config."""
    from transformers import Qwen2Config

    from megaswift.config.options import SftArguments
    from megaswift.models import parameters_of
    from megaswift.models.adapters import Lora, linear
    from megaswift.run.resolve import World, resolve
    from megaswift.run.source import TrainingSource
    from megaswift.run.spec import DataRef, Method

    config = Qwen2Config(max_position_embeddings=32768, tie_word_embeddings=False, **SHAPES[shape])
    config.architectures = ["Qwen2ForCausalLM"]
    args = SftArguments(
        model_type="bench", dataset=["none"], max_steps=100, batch_size=micro, gradient_accumulation_steps=1, max_length=seq,
        learning_rate=1e-4, gradient_checkpointing="layers" in way, sft_type="lora", tp=tp,
    )  # fmt: skip
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    source = TrainingSource(args, Path("none"), Path("none"), config, dtype, manifest={}, run_dir=None, first_step=0)
    names = tuple(part.name.removesuffix(".weight") for parameter in linear(parameters_of(config)) for part in parameter.hf)
    lora = Lora(rank=8, alpha=32, dropout=0.0, targets=names, bits=next((bits for bits in (4, 8) if f"{bits}bit" in way), None))
    run = resolve(args, source, World.of(world), DataRef(train="rows", train_rows=10**6), run_dir="none")
    return replace(run, method=Method(sft_type="lora", adapter=lora)), config


def trainer_of(run: Any, config: Any) -> Any:
    """A trainer with random base weights; the process groups must have been joined."""
    from megaswift.megatron.model import build, recompute_parts
    from megaswift.megatron.packed_weights import fill
    from megaswift.models import parameters_of
    from megaswift.train.adapters import LoraAdapter
    from megaswift.train.objectives import SupervisedTokens
    from megaswift.train.trainer import Trainer

    lora = run.method.adapter
    model = build(config, run.parallel, run.precision, run.memory, packed=lora.bits is not None)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    if lora.bits is not None:
        device = next(model.parameters()).device
        drawn = partial(torch.randn, device=device, dtype=torch.bfloat16)
        fill(model, parameters_of(config), 0, lambda parameter: drawn(parameter.shape) * 0.02, lora.bits)
    LoraAdapter(lora, config, 0).attach(model)
    made = Trainer(model, run, SupervisedTokens())
    recompute_parts(model, run.memory.recompute)
    return made


def ours(shape: str, seq: int, micro: int, way: str, steps: int, profiled: bool, tp: int) -> dict[str, Any]:
    """Median step, tokens/s of each GPU, and peak memory of our trainer."""
    from profiling import measured

    from megaswift.megatron import process_groups as ranks

    world = int(os.environ.get("WORLD_SIZE", 1))
    run, config = run_of(shape, seq, micro, way, tp, world)
    with ranks.joined(run.parallel, 42) as rank:
        trainer = trainer_of(run, config)
        median, loss, batches = measured(trainer, rank, config.vocab_size, seq, micro, steps)
        if profiled and world == 1:
            from profiling import profiled as described

            print(described(lambda step: trainer.step([batches[step]])), file=sys.stderr)
        memory = torch.cuda.max_memory_allocated() / 2**30 if rank.on_gpu else None
        trainer.close()
    return {
        "ours": way, "shape": shape, "seq": seq, "mbs": micro, "processes": world, "tp": tp, "step_s": round(median, 4),
        "tok_s": round(micro * seq / median / tp), "mem_gb": memory and round(memory, 1), "loss": round(loss, 4), "first": rank.rank == 0,
    }  # fmt: skip


def peers(folder: Path, shape: str, seq: int, micro: int, steps: int) -> list[list[str]]:
    """Commands of the peers that are there."""
    found = []
    if (folder / "peer_lora.py").exists():
        found += [[str(folder / "peer_lora.py"), shape, str(seq), str(micro), "1", how, str(steps)] for how in ("0", "1")]
    return found


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way and every peer, each in a process of its own."""
    words = [sys.executable, __file__, "--shape", options.shape, "--seq", str(options.seq), "--micro", str(options.micro)]
    commands = [
        [*words, "--steps", str(options.steps), "--one", way, *(["--profile"] * options.profile)]
        for way in options.ways.split(",")
    ]
    if options.peers is not None:
        more = peers(options.peers, options.shape, options.seq, options.micro, options.steps)
        commands += [[sys.executable, *command] for command in more]
    results = []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        results.append(json.loads(lines[-1]) if lines else {"command": command[1:], "failed": done.stderr[-1500:]})
        print(json.dumps(results[-1]), flush=True)
        if options.profile and lines:
            print(done.stderr[-9000:], flush=True)
    return results


def main() -> int:
    """Run what is asked for; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--ways", default="none,layers,4bit,4bit-layers")
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--one")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        result = ours(options.shape, options.seq, options.micro, options.one, options.steps, options.profile, options.tp)
        if result.pop("first"):
            print(json.dumps(result))
        return 0
    results = run_all(options)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
