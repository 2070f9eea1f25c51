"""DPO on one GPU through the product's own trainer, beside TRL's trainer and Liger's fused DPO loss, in one run.

python benchmarks/preference_speed.py [--shape 1.5b] [--pairs 8] [--tokens 1024] [--ways full,lora]

Random weights in a Qwen2.5 shape; pairs of twice so many random tokens, of which a quarter is the question, one micro batch a
step. What the reference says is known ahead in all of them: in ours and TRL's as figures, in Liger's loss by leaving it out.
Ours lays the answers end to end; theirs, all of one length, need no padding. `reference`: our forward passes ahead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch

SHAPES = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=512),
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960, vocab_size=151936),
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config_of(shape: str) -> Any:
    """A Qwen2.5 model of a size."""
    from transformers import Qwen2Config

    config = Qwen2Config(max_position_embeddings=32768, tie_word_embeddings=True, **SHAPES[shape])
    config.architectures = ["Qwen2ForCausalLM"]
    return config


def answers(options: argparse.Namespace, vocab: int, number: int) -> torch.Tensor:
    """int64 [pairs, 2, tokens]: chosen and rejected, which begin with the same question."""
    rows = torch.randint(0, vocab, (options.pairs, 2, options.tokens), generator=torch.Generator().manual_seed(number))
    rows[:, 1, : options.tokens // 4] = rows[:, 0, : options.tokens // 4]
    return rows


def micro_batch(options: argparse.Namespace, vocab: int, number: int, device: Any) -> Any:
    """The answers of pairs end to end."""
    from megaswift.data.batches import MicroBatch

    rows = answers(options, vocab, number).flatten(0, 1)
    labels = torch.full_like(rows, -100)
    labels[:, options.tokens // 4 - 1 : -1] = rows[:, options.tokens // 4 :]
    count = len(rows)
    return MicroBatch(
        rows.reshape(1, -1).to(device), labels.reshape(1, -1), torch.arange(options.tokens).repeat(count)[None].to(device),
        torch.arange(0, count * options.tokens + 1, options.tokens, dtype=torch.int32), tuple(range(options.pairs)),
        desirable=torch.tensor([True, False] * options.pairs), reference=torch.full((count,), -9000.0),
    )  # fmt: skip


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Median step of our trainer, and of a forward pass of the reference."""
    from moe_speed import adapter_of, run_of, trainer_of
    from profiling import profiled

    from megaswift.megatron import process_groups as ranks
    from megaswift.run.spec import Method, ObjectiveSpec
    from megaswift.train.objectives import Loss, SequenceObjective
    from megaswift.train.preference import objective_of
    from megaswift.train.trainer import forward_backward

    config, spec, way = config_of(options.shape), ObjectiveSpec(kind="dpo", form="sigmoid", beta=0.1), options.one
    options.ep, options.lora, options.graphs, options.micro, options.one = 1, None, "auto", 1, "none"
    options.seq = 2 * options.pairs * options.tokens
    run = replace(run_of(config, options, 1), objective=spec)
    lora = adapter_of(config, "attention", None) if way == "lora" else None  # of a dense model these are all linear layers
    if lora is not None:
        run = replace(run, method=Method(sft_type="lora", adapter=lora))
    with ranks.joined(run.parallel, 42) as rank:
        trainer = trainer_of(run, config, lora, objective_of(spec))
        batches = [micro_batch(options, config.vocab_size, number, rank.device) for number in range(4)]
        times, loss = [time.perf_counter()], 0.0
        for step in range(options.steps):
            loss = trainer.step([batches[step % 4]]).loss
            times.append(time.perf_counter())
        each = sorted(b - a for a, b in zip(times[4:], times[5:]))
        if options.profile:
            print(profiled(lambda step: trainer.step([batches[step]])), file=sys.stderr)
        memory = torch.cuda.max_memory_allocated() / 2**30 if rank.on_gpu else None

        def noted(values: torch.Tensor, tokens: torch.Tensor, batch: Any) -> Loss:
            return Loss(values.sum(), tokens.sum(), {})

        chunks = trainer.chunks
        ahead = []
        for number in range(6):
            begin = time.perf_counter()
            with torch.no_grad():
                forward_backward(
                    list(chunks), chunks[0].config, SequenceObjective(noted), [batches[number % 4]], forward_only=True
                )
            if rank.on_gpu:
                torch.cuda.synchronize()
            ahead.append(time.perf_counter() - begin)
        trainer.close()
    return (
        {"ours": way} | told(options, sorted(each)[len(each) // 2], memory, loss) | {"reference_s": round(sorted(ahead)[3], 4)}
    )


def told(options: argparse.Namespace, median: float, memory: float | None, loss: float) -> dict[str, Any]:
    """The figures of a measurement."""
    tokens = 2 * options.pairs * options.tokens
    return {
        "step_s": round(median, 4),
        "tok_s": round(tokens / median),
        "mem_gb": memory and round(memory, 1),
        "loss": round(loss, 4),
    }


def peer_model(options: argparse.Namespace, lora: bool) -> Any:
    """transformers' model with Liger's norms, rotation and MLP; bf16."""
    from transformers import Qwen2ForCausalLM

    cuda = torch.cuda.is_available()
    if cuda:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2(fused_linear_cross_entropy=False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    with torch.device("cuda" if cuda else "cpu"):
        model = Qwen2ForCausalLM._from_config(config_of(options.shape), attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM"))
    return model.train()


def liger(options: argparse.Namespace) -> dict[str, Any]:
    """A plain loop around Liger's fused linear DPO loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    from profiling import plain_steps

    lora, cuda = options.one == "lora", torch.cuda.is_available()
    model = peer_model(options, lora)
    base = model.get_base_model() if lora else model
    device, vocab = next(model.parameters()).device, base.config.vocab_size
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = LigerFusedLinearDPOLoss(use_ref_model=False, beta=0.1)
    batches = []
    for number in range(4):
        rows = answers(options, vocab, number).transpose(0, 1).flatten(0, 1).to(device)  # all chosen, then all rejected
        labels = rows.clone()
        labels[:, : options.tokens // 4] = -100
        batches.append((rows, labels[:, 1:].contiguous()))

    def loss_of(step: int) -> Any:
        rows, labels = batches[step % 4]
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda and lora):
            hidden = base.model(input_ids=rows).last_hidden_state[:, :-1]
            return fused(base.lm_head.weight, hidden, labels)[0]

    median, loss = plain_steps(parameters, loss_of, options.steps)
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"liger": options.one} | told(options, median, memory, loss)


def trl(options: argparse.Namespace) -> dict[str, Any]:
    """TRL's own trainer, what the reference says computed ahead, Liger's parts in the model."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    cuda, lora, quarter = torch.cuda.is_available(), options.one == "lora", options.tokens // 4

    class Tokenized(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    vocab = config_of(options.shape).vocab_size
    rows = []
    for number in range(options.steps):
        for chosen, rejected in answers(options, vocab, number).tolist():
            rows.append({"prompt_ids": chosen[:quarter], "chosen_ids": chosen[quarter:], "rejected_ids": rejected[quarter:]})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, "a")), pad_token="b", eos_token="b"
    )
    config = DPOConfig(
        output_dir="/tmp/trl", per_device_train_batch_size=options.pairs, max_steps=options.steps, beta=0.1, learning_rate=1e-5,
        precompute_ref_log_probs=True, precompute_ref_batch_size=options.pairs, report_to=[], save_strategy="no", bf16=cuda,
        use_cpu=not cuda, optim="adamw_torch_fused" if cuda else "adamw_torch", gradient_checkpointing=False, max_length=None,
        disable_tqdm=True, logging_steps=1000, train_sampling_strategy="sequential",
    )  # fmt: skip
    begin = time.perf_counter()
    trainer = Tokenized(
        model=peer_model(options, lora), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    begin = times[0] - begin
    each = sorted(b - a for a, b in zip(times[4:], times[5:]))
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    loss = float(trainer.state.log_history[-1].get("train_loss", float("nan")))
    return (
        {"trl": options.one} | told(options, each[len(each) // 2], memory, loss) | {"until_the_first_step_s": round(begin, 1)}
    )


def main() -> int:
    """Run what is asked for; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1.5b", choices=SHAPES)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--ways", default="full,lora")
    parser.add_argument("--who", default="ours,liger,trl")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        print(json.dumps({"ours": ours, "liger": liger, "trl": trl}[options.who](options)))
        return 0
    failed = False
    for way in options.ways.split(","):
        for who in options.who.split(","):
            words = [
                sys.executable,
                __file__,
                "--shape",
                options.shape,
                "--pairs",
                str(options.pairs),
                "--tokens",
                str(options.tokens),
            ]
            words += ["--steps", str(options.steps), "--who", who, "--one", way, *(["--profile"] if options.profile else [])]
            done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            failed |= not lines
            print(lines[-1] if lines else json.dumps({"failed": who, "way": way, "why": done.stderr[-900:]}), flush=True)
            if options.profile and who == "ours":
                print(done.stderr[-7000:], flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
