"""Data and training on the CPU: what packing saves, a peer on the same rows, tokenizing, memory of a million rows.

python benchmarks/data_speed.py packing peer tokens tokenizing memory --rows FILE#200 [--peer PATH] [--long-rows FILE] [--keep DIR]

Parts, each printed as one line of JSON for each variant and one for their ratio:

packing     `swift sft` of SmolLM2 on the rows, one epoch: padded micro batches, rows laid end to end, packed rows
peer        a script PATH that is called as MODEL_DIR ROWS.jsonl STEPS BATCH LR and draws random.sample(rows, BATCH) in each
            step after random.seed(0), on {"query", "response"} rows; `swift sft` is given the rows that it drew, as many a step
tokens      one step on a dense row of 512 tokens, all of them supervised, beside transformers with torch's fused AdamW
tokenizing  rows a second from file to cache, beside datasets.map with the same tokenizer
memory      largest memory of `swift data`, and of a rank that reads micro batches, on a million short rows
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
BATCH, LENGTH = 8, 2048
PEER = "transformers"
HELD = contextlib.ExitStack()  # a worker's process groups, for as long as it lives


def show(**values: Any) -> dict[str, Any]:
    """Print one result."""
    print(
        json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}), flush=True
    )
    return values


def run(words: list[str], work: Path) -> str:
    """A command's output; ends the benchmark when it fails."""
    done = subprocess.run([sys.executable, *words], cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def model_dir() -> str:
    """The packaged model as a Hugging Face folder."""
    from megaswift.hub.locate import locate

    return str(locate(MODEL, None, None).path)


def sft(work: Path, name: str, dataset: str, rows: int, *words: str) -> dict[str, Any]:
    """One epoch of `swift sft`; steps are timed from the first to the last, saving left out."""
    from megaswift.data.store import TokenRows

    options = ["--dataset_test_ratio", "0", "--dtype", "fp32", "--logging_steps", "1", "--save_only_model", "true"]
    command = [
        "-m",
        "megaswift",
        "sft",
        "--model_type",
        MODEL,
        "--model_id_or_path",
        model_dir(),
        "--dataset",
        dataset,
        *options,
    ]
    run([*command, "--learning_rate", "1e-5", "--max_length", str(LENGTH), "--output_dir", name, *words], work)
    log = next((work / name).rglob("logging.jsonl"))
    steps = [row for row in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if "loss" in row]
    data = TokenRows.open(json.loads((log.parent / "job.json").read_text(encoding="utf-8"))["train_data"])
    samples = [sample for row in range(len(data)) for sample in data.samples(row)]
    assert len(samples) == rows, f"{len(samples)} samples, expected {rows}"
    seconds, tokens = steps[-1]["elapsed_s"], sum(len(sample.ids) for sample in samples)
    supervised = sum(int(sample.kept[1:].sum()) for sample in samples)
    shutil.rmtree(work / name)
    return show(
        variant=name, rows=rows, steps=len(steps), seconds=seconds, tokens=tokens, supervised=supervised, loss=steps[-1]["loss"],
        tokens_s=tokens / seconds, supervised_s=supervised / seconds, memory_gb=steps[-1]["memory_gb"],
    )  # fmt: skip


def packing(work: Path, options: argparse.Namespace) -> None:
    """The same rows padded, laid end to end, and packed."""
    count = int(options.rows.rpartition("#")[2])
    found = {}
    for name, words in (
        ("padded", ["--batch_size", str(BATCH), "--padding_free", "false"]),
        ("end to end", ["--batch_size", str(BATCH)]),
        ("packed", ["--batch_size", "1", "--packing", "true", "--max_length", str(options.pack)]),
    ):
        if not options.only or name in options.only:
            found[name] = sft(work, name, options.rows, count, "--gradient_accumulation_steps", "1", *words)
    if "padded" in found and "packed" in found:
        show(ratio="packed / padded", supervised_s=found["packed"]["supervised_s"] / found["padded"]["supervised_s"])


def peer(work: Path, options: argparse.Namespace) -> None:
    """The peer's script and `swift sft` on the rows that the peer draws."""
    if not options.peer:
        sys.exit("--peer PATH is needed")
    path, _, count = options.rows.rpartition("#")
    rows = []
    for row in json.loads(Path(path).read_text(encoding="utf-8"))[: int(count)]:
        question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        rows.append({"query": question, "response": row["output"]})
    steps = int(count) // BATCH
    random.seed(0)
    drawn = [row for _ in range(steps) for row in random.sample(rows, BATCH)]
    for name, part in (("all.jsonl", rows), ("drawn.jsonl", drawn)):
        (work / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
    found = {}
    if not options.only or "ours" in options.only:
        words = ["--batch_size", str(BATCH), "--gradient_accumulation_steps", "1"]
        found["ours"] = sft(work, "ours", "drawn.jsonl", len(drawn), *words)
    if not options.only or "peer" in options.only:
        printed = run([options.peer, model_dir(), "all.jsonl", str(steps), str(BATCH), "1e-5"], work)
        result = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
        found["peer"] = show(
            variant="peer", rows=len(drawn), steps=steps, tokens_s=result["tok_s"], supervised_s=result["supervised_tok_s"]
        )
    if len(found) == 2:
        show(ratio="ours / peer", **{key: found["ours"][key] / found["peer"][key] for key in ("tokens_s", "supervised_s")})


def tokens(work: Path, options: argparse.Namespace) -> None:
    """Dense steps of the engine and of transformers, in turn, each time in a new process; the fastest and the middle step."""
    times: dict[str, list[float]] = {"ours": [], PEER: []}
    for _ in range(options.rounds):
        for name in times:
            times[name] += json.loads(run([str(Path(__file__).resolve()), "--worker", name], work).splitlines()[-1])
    for name, values in times.items():
        values.sort()
        show(
            variant=name,
            steps=len(values),
            fastest_s=values[0],
            middle_s=values[len(values) // 2],
            tokens_s=512 / values[len(values) // 2],
        )
    ours, theirs = times["ours"], times[PEER]
    show(ratio=f"ours / {PEER}", fastest=theirs[0] / ours[0], middle=theirs[len(theirs) // 2] / ours[len(ours) // 2])


def worker(name: str) -> list[float]:
    """Seconds of each of four steps on one row of 512 random tokens, after one that is not counted."""
    import torch

    torch.manual_seed(0)
    ids = torch.randint(0, 49152, (1, 512))
    step = _engine_step(ids) if name == "ours" else _transformers_step(ids)
    result = []
    for _ in range(5):
        began = time.perf_counter()
        step()
        result.append(time.perf_counter() - began)
    return result[1:]


def _transformers_step(ids: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, betas=(0.9, 0.95), fused=True)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _engine_step(ids: Any) -> Any:
    import torch

    from megaswift.config.options import SftArguments
    from megaswift.data.batches import MicroBatch
    from megaswift.megatron import process_groups as ranks
    from megaswift.run.resolve import World, resolve
    from megaswift.run.source import TrainingSource
    from megaswift.run.spec import DataRef
    from megaswift.train.setup import restore_trainer
    from megaswift.weights.hf.config import load_config

    folder = Path(model_dir())
    args = SftArguments(model_type=MODEL, dataset=["none"], max_steps=100, gradient_accumulation_steps=1)
    source = TrainingSource(args, folder, folder, load_config(folder), "fp32", manifest={}, run_dir=None, first_step=0)
    run = resolve(args, source, World(1), DataRef(train_rows=100), run_dir="none")
    HELD.enter_context(ranks.joined(run.parallel, 42))
    trainer, _ = restore_trainer(run)
    labels = torch.cat((ids[:, 1:], torch.full((1, 1), -100)), dim=1)
    batch = MicroBatch(ids, labels, torch.arange(ids.shape[1])[None], None, (0,))
    return lambda: trainer.step([batch])


def tokenizing(work: Path, options: argparse.Namespace) -> None:
    """Rows a second: ours reads, checks, masks, tokenizes and writes; the peer tokenizes, without and with a mask."""
    lines = Path(options.long_rows).read_text(encoding="utf-8").splitlines()
    rows = [{"query": row["question"], "response": row["answer"]} for row in map(json.loads, lines)] * 4
    for number, row in enumerate(rows):
        row["query"] = f"{number}. {row['query']}"
    path = work / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    from megaswift.config.options import SftArguments
    from megaswift.data.chat import ChatTemplate
    from megaswift.data.encode import prepare
    from megaswift.inference.loading import load_tokenizer

    tokenizer = load_tokenizer(Path(model_dir()))
    began = time.perf_counter()
    data = prepare(SftArguments(dataset=[str(path)], dataset_test_ratio=0.0), ChatTemplate(tokenizer), cache_dir=work / "cache")
    ours = len(rows) / (time.perf_counter() - began)
    show(variant="ours", rows=len(data.train), rows_s=ours)
    began = time.perf_counter()
    prepare(SftArguments(dataset=[str(path)], dataset_test_ratio=0.0), ChatTemplate(tokenizer), cache_dir=work / "cache")
    show(variant="ours, again", seconds=time.perf_counter() - began)
    for masked in (False, True):
        theirs = _map_rows(path, tokenizer, masked, work)
        show(variant="datasets.map" + (", with a mask" if masked else ""), rows_s=theirs, ratio=ours / theirs)


def _map_rows(path: Path, tokenizer: Any, masked: bool, work: Path) -> float:
    from datasets import load_dataset

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        prompts = [[{"role": "user", "content": text}] for text in batch["query"]]
        whole = [[*p, {"role": "assistant", "content": text}] for p, text in zip(prompts, batch["response"], strict=True)]
        ids = tokenizer(tokenizer.apply_chat_template(whole, tokenize=False), add_special_tokens=False)["input_ids"]
        if not masked:
            return {"input_ids": ids}
        heads = tokenizer(
            tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True), add_special_tokens=False
        )
        sizes = map(len, heads["input_ids"])
        return {"input_ids": ids, "labels": [[-100] * size + row[size:] for size, row in zip(sizes, ids, strict=True)]}

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core, as it is with ours
    began = time.perf_counter()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(work / f"hf-{masked}"))
    rows.map(encode, batched=True, num_proc=os.cpu_count(), remove_columns=rows.column_names)
    return len(rows) / (time.perf_counter() - began)


def memory(work: Path, options: argparse.Namespace) -> None:
    """Largest memory of any process of `swift data`, and of one that reads micro batches, on a million short rows."""
    path, count = work / "million.jsonl", options.million
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(
                json.dumps({"query": f"What is {number} plus {number % 97}?", "response": f"It is {number + number % 97}."})
                + "\n"
            )
    began = time.perf_counter()
    words = ["--dataset_test_ratio", "0", "--max_length", "512", "--examples", "0"]
    run(["-m", "megaswift", "data", "--model_type", MODEL, "--dataset", str(path), *words], work)
    seconds = time.perf_counter() - began
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    show(part="swift data", rows=count, seconds=seconds, largest_gb=largest)
    began = time.perf_counter()
    run(["-m", "megaswift", "data", "--model_type", MODEL, "--dataset", str(path), *words], work)
    show(part="swift data, again", seconds=time.perf_counter() - began)
    index = next(
        item
        for item in Path(os.environ["MEGASWIFT_CACHE"]).glob("data/*/train/index.json")
        if json.loads(item.read_text())["rows"] == count
    )
    show(
        part="a rank", **json.loads(run([str(Path(__file__).resolve()), "--reader", str(index.parent)], work).splitlines()[-1])
    )


def reader(path: str) -> dict[str, Any]:
    """An epoch of micro batches as a rank reads them: before and after, the memory of this process."""
    import torch  # noqa: F401 (its memory is no part of the data's)

    from megaswift.data.batches import Batches
    from megaswift.data.store import TokenRows

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rows = TokenRows.open(path)
    batches = Batches(rows, micro_batch_size=8, global_batch_size=64, dp_rank=0, dp_size=1, seed=42, pad_id=0)
    seen = sum(batch.tokens.numel() for step in range(len(rows) // 64) for batch in batches.step(step))
    return {"tokens": seen, "before_gb": before, "largest_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


PARTS = {"packing": packing, "peer": peer, "tokens": tokens, "tokenizing": tokenizing, "memory": memory}


def main() -> None:
    """Run the parts that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--rows", default="", help="alpaca rows as one JSON list, FILE#N")
    parser.add_argument("--long-rows", default="", help="question/answer rows, for tokenizing")
    parser.add_argument("--peer", default="", help="the peer's script")
    parser.add_argument("--only", nargs="*", default=[], help="these variants alone")
    parser.add_argument("--pack", type=int, default=LENGTH, help="length of packed rows")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the part tokens")
    parser.add_argument("--million", type=int, default=1_000_000, help="rows of the part memory")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker or options.reader:
        print(json.dumps(worker(options.worker) if options.worker else reader(options.reader)))
        sys.stdout.flush()
        os._exit(0)  # the process groups of a worker are not left one by one
    if "#" in options.rows:
        path, _, count = options.rows.rpartition("#")
        options.rows = f"{Path(path).resolve()}#{count}"
    if options.peer:
        options.peer = str(Path(options.peer).resolve())
    with tempfile.TemporaryDirectory() as name:
        os.environ.setdefault("MEGASWIFT_CACHE", str(Path(name) / "cache"))
        for part in options.parts:
            PARTS[part](Path(name), options)


if __name__ == "__main__":
    main()
