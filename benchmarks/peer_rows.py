"""transformers with Liger kernels on real rows in padded batches: the peer of `sft_gpu.py --rows`.

python benchmarks/peer_rows.py --rows FILE ... --tokenizer DIR [--shape 0.5b] [--batch 64] [--steps 30] [--grouped]

The same shape with random weights, the same rows, the same tokens with loss. A batch is as long as its longest row; with --grouped the rows
of a batch have similar lengths, as transformers' sampler by length makes them. Weights and moments are bf16. A plain loop, without
Trainer's own work between steps. Prints tokens and tokens with loss per second (of all steps after the first five) and peak memory.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

from sft_gpu import SHAPES

Row = tuple[list[int], list[int]]  # token ids; labels, NO_LOSS where there is none
NO_LOSS = -100


def main() -> None:
    """Train for some steps and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--shape", default="0.5b", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--grouped", action="store_true")
    options = parser.parse_args()
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if device == "cuda":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
    rows = [row for row in read_rows(options.rows, options.tokenizer) if len(row[0]) <= options.length]
    config = Qwen2Config(
        vocab_size=options.vocab,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **SHAPES[options.shape],
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    began, real, supervised, whole = 0.0, 0, 0, 0
    for step, batch in enumerate(batches(rows, options.batch, options.grouped, options.steps)):
        if step == 5:
            _wait(device)
            began, real, supervised, whole = time.perf_counter(), 0, 0, 0
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [NO_LOSS] * (longest - len(labels)) for _, labels in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        real, supervised, whole = real + int(mask.sum()), supervised + int((labels != NO_LOSS).sum()), whole + ids.numel()
        model(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device), use_cache=False
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _wait(device)
    seconds = time.perf_counter() - began
    found = dict(
        peer="transformers" + (" + liger" if device == "cuda" else ""),
        grouped=options.grouped,
        batch=options.batch,
        tok_s=round(real / seconds),
        supervised_tok_s=round(supervised / seconds),
        filled=round(real / whole, 3),
        mem_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1) if device == "cuda" else None,
    )
    print(json.dumps(found), flush=True)


def read_rows(files: list[str], tokenizer_folder: str) -> list[Row]:
    """Rows of Alpaca (instruction, input, output) and GSM8K (question, answer), with loss on the answer and its end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = []
    for name in files:
        text = Path(name).read_text(encoding="utf-8")
        for row in json.loads(text) if name.endswith(".json") else map(json.loads, text.splitlines()):
            query = "\n".join(filter(None, (row.get("instruction") or row.get("question"), row.get("input"))))
            turns = [{"role": "user", "content": query}]
            head = tokenizer(
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), add_special_tokens=False
            )
            tail = tokenizer((row.get("output") or row.get("answer")) + "<|im_end|>", add_special_tokens=False)
            rows.append((head["input_ids"] + tail["input_ids"], [NO_LOSS] * len(head["input_ids"]) + tail["input_ids"]))
    return rows


def batches(rows: list[Row], size: int, grouped: bool, steps: int) -> Iterator[list[Row]]:
    """Shuffled batches; grouped ones are cut from 50 batches' rows sorted by length, as transformers does it."""
    draw = random.Random(0)
    rows = rows[:]
    draw.shuffle(rows)
    pool = size * 50 if grouped else size
    made = []
    for first in range(0, len(rows) - pool + 1, pool):
        part = sorted(rows[first : first + pool], key=lambda row: len(row[0])) if grouped else rows[first : first + pool]
        made += [part[place : place + size] for place in range(0, pool, size)]
    draw.shuffle(made)
    if len(made) < steps:
        raise SystemExit(f"{len(rows)} rows make {len(made)} batches of {size}, fewer than --steps {steps}")
    return iter(made[:steps])


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
