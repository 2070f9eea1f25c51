"""`swift export`, `swift sft` and `swift parity` as a user runs them, on one GPU, with random weights in a real shape.

python benchmarks/sft_gpu.py [--shape 0.5b] [--micro 8] [--length 4096] [--steps 12] [--rows FILE ... --tokenizer DIR]

Prints the throughput of packed rows, all tokens and supervised ones, and the difference to transformers in bf16. Without --rows the
rows are random text, as long as instruction rows are; with them they are those files, in the tokens of --tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

SHAPES = {
    "tiny": dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128),
    "0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864),
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960),
    "3b": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008),
}


def make_model(folder: Path, shape: str, vocab: int, positions: int, tied: bool = True, tokenizer: str | None = None) -> None:
    """A Qwen2 folder with random bf16 weights and the given tokenizer, or one of bytes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=2,
        **SHAPES[shape],
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # billions of random numbers take a minute on a CPU
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    if tokenizer is None:
        byte_tokenizer(folder)
        return
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (Path(tokenizer) / name).exists():
            shutil.copy(Path(tokenizer) / name, folder)


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes with the marks of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["a"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    fast.save_pretrained(folder)


def make_rows(path: Path, tokens: int, longest: int) -> None:
    """Rows of random text, of lengths as instruction data has them: many short, some long."""
    draw = random.Random(0)
    total = 0
    with path.open("w", encoding="utf-8") as file:
        while total < tokens:
            size = min(int(draw.lognormvariate(5.8, 0.9)), longest - 200)
            text = "".join(draw.choice("abcdefghij klmnop qrstuvw xyz") for _ in range(max(size, 8)))
            file.write(json.dumps({"query": text[: len(text) // 3], "response": text[len(text) // 3 :]}) + "\n")
            total += len(text)


def swift(work: Path, *words: str) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "megaswift", *words], cwd=work, capture_output=True, text=True, check=False, env=os.environ
    )
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
        sys.exit(f"swift {words[0]} ended with exit code {done.returncode}")
    return done.stdout


def main() -> None:
    """Make the model, convert it, train on it, compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5b", choices=SHAPES)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rows", nargs="+", help="files of real rows instead of random text")
    parser.add_argument("--tokenizer", help="folder with the tokenizer for them")
    parser.add_argument("--template_type", default="AUTO")
    parser.add_argument("--no_parity", action="store_true", help="leave the comparison with transformers out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["MEGASWIFT_CACHE"] = str(work / "cache")
        make_model(work / "model", options.shape, options.vocab, 32768, tokenizer=options.tokenizer)
        files = [str(Path(name).resolve()) for name in options.rows or []]
        if not files:
            make_rows(work / "rows.jsonl", options.micro * options.length * (options.steps + 2), options.length)
        print(
            swift(
                work,
                "export",
                "--model_type",
                "bench",
                "--model_id_or_path",
                "model",
                "--to_megatron",
                "true",
                "--verify",
                "false",
            ),
            flush=True,
        )
        common = [
            "--resume_from_checkpoint",
            "bench-tp1-pp1",
            "--dataset",
            *(files or ["rows.jsonl"]),
            "--template_type",
            options.template_type,
            "--packing",
            "true",
            "--learning_rate",
            "1e-4",
        ]
        common += ["--max_length", str(options.length), "--gradient_accumulation_steps", "1", "--dtype", "bf16"]
        swift(
            work, "sft", *common, "--batch_size", str(options.micro), "--max_steps", str(options.steps), "--logging_steps", "1",
            "--save_only_model", "true", "--output_dir", "out",
        )  # fmt: skip
        log = next((work / "out").rglob("logging.jsonl"))
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if "loss" in row]
        for row in rows:
            print(
                row["global_step/max_steps"],
                row["loss"],
                row["grad_norm"],
                row["tokens_per_second"],
                row["supervised_tokens_per_second"],
                row["memory_gb"],
            )
        every, supervised = (
            median(row[name] for row in rows[3:]) for name in ("tokens_per_second", "supervised_tokens_per_second")
        )
        print(
            f"{options.shape} x {options.micro}, packed to {options.length}: {every:,.0f} tokens/s, {supervised:,.0f} supervised",
            flush=True,
        )
        if options.no_parity:
            return
        print(swift(work, "parity", *common, "--batch_size", "1", "--steps", "3", "--output_dir", "parity")[-1500:], flush=True)


if __name__ == "__main__":
    main()
