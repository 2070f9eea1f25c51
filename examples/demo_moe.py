"""Experts on a laptop: a tiny random model of Qwen3's kind with experts, spread over two processes. `make demo-moe` runs it.

Nothing is fetched. The model is made here, trained with its experts on two processes, converted back and proven against
transformers; its size is that of a toy, its code path that of 30B-A3B on eight GPUs. The files stay in demo-moe/.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo-moe"
SWIFT = [sys.executable, "-m", "megaswift"]
WORDS = "the sea is deep and the sky is wide so we sail on and sing of a day that is yet to come".split()


def run(*words: str, **environment: str) -> None:
    """Print a command and run it in demo-moe/; a failure ends the demo with its exit code."""
    shown = [f"{name}={value}" for name, value in environment.items()]
    print(f"\n$ {' '.join([*shown, 'swift', *words])}", flush=True)
    code = subprocess.call([*SWIFT, *words], cwd=DEMO, env={**os.environ, **environment})
    if code:
        sys.exit(code)


def make_model(folder: Path) -> None:
    """A random model with 16 experts in each of 4 layers, of which each token goes to 4, and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    fast.save_pretrained(folder)
    config = Qwen3MoeConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=16, intermediate_size=256,
        moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, vocab_size=len(fast),
        max_position_embeddings=512, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def write_rows(path: Path) -> None:
    """A counting game, with a rule that can be learnt."""
    rows = []
    for k in range(160):
        first, count = k % len(WORDS), 2 + k % 5
        said = [WORDS[(first + j) % len(WORDS)] for j in range(count + 3)]
        rows.append({"query": " ".join(said[:3]), "response": " ".join(said[3:])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Make a model, train its experts on two processes, convert back and prove it."""
    started = time.perf_counter()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    make_model(DEMO / "model")
    write_rows(DEMO / "rows.jsonl")
    run(
        *("sft", "--model_id_or_path", "model", "--model_type", "tiny-qwen3-moe", "--ep", "2", "--dataset", "rows.jsonl"),
        *("--dataset_test_ratio", "0.1", "--learning_rate", "3e-3", "--num_train_epochs", "4", "--batch_size", "4"),
        *("--gradient_accumulation_steps", "1", "--moe_aux_loss_coeff", "0.01", "--output_dir", "output"),
        NPROC_PER_NODE="2",
    )
    run_dir = max((DEMO / "output").glob("*/*")).relative_to(DEMO)
    run("export", "--ckpt_dir", str(run_dir), "--to_hf", "true")
    rows = [json.loads(line) for line in (DEMO / run_dir / "logging.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    experts = [row for row in rows if "expert_busiest" in row]
    print(
        f"\nvalidation loss {losses[-1]:.3f} at the end; busiest expert {experts[0]['expert_busiest']:.1f} x the mean at first, "
    )
    print(f"{experts[-1]['expert_busiest']:.1f} x at last. Load of every expert: {DEMO / run_dir / 'experts.html'}")
    print(
        f"The model, proven against transformers: {DEMO / run_dir}/tiny-qwen3-moe-hf. Made in {time.perf_counter() - started:.0f} s."
    )


if __name__ == "__main__":
    main()
