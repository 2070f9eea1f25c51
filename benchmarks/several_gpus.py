"""The document's example at its own size on one machine with several GPUs, and every layout beside what arithmetic says of it.

python benchmarks/several_gpus.py predict seed layouts losses resume kill scaling [--gpus 4] [--shape 7b] [--out FILE.jsonl]
python benchmarks/several_gpus.py predict layouts --gpus 2 --shape 3b --length 4096 --batch 2 --global-rows 16
python benchmarks/several_gpus.py seed layouts losses resume kill scaling --shape tiny --steps 4     (a dry run on any machine)

Random weights in a real shape, random text, full fine-tuning in bf16 (fp32 without a GPU). Parts; each prints lines of JSON:

predict  memory and tokens/s of each layout from shape, card and links, before anything runs
seed     convert, train at tp2 dp2 with the document's flags, convert back
layouts  tokens/s/GPU, TFLOP/s/GPU and memory of each layout, and of its variants
losses   `swift parity --layouts`: losses of 20 steps, against the limit for this precision
resume   steps at tp2 dp2 in one go, and the second half of them at pp4 from the checkpoint in the middle
kill     SIGKILL one rank in the middle of a run: exit code, and seconds until all others are gone
scaling  a third of the size, data-parallel on 1, 2, ... GPUs: tokens/s/GPU against one GPU
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from sft_gpu import SHAPES, make_model, make_rows

SHAPES["7b"] = dict(
    hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944
)
SHAPES["tiny"] = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, intermediate_size=128)
SMALLER = {"7b": "1.5b", "3b": "1.5b", "1.5b": "0.5b", "0.5b": "tiny", "tiny": "tiny"}

# What the arithmetic takes as given for one H200.
PEAK = 989.4e12  # bf16 products, dense, FLOP/s
REACHED = 0.60  # of PEAK, by forward and backward of a 7B shape at tp 1; 1.5B and 3B reach 0.51 to 0.53 with the optimizer in
LINK = 300e9  # bytes/s that an all-reduce or a point-to-point transfer moves over NVLink in each direction
MEMORY = 4.3e12  # bytes/s of the card: nine tenths of 4.8e12, as a device copy reaches on one H100
LATENCY = 25e-6  # s for one collective, launch included


@dataclass(frozen=True)
class Layout:
    """A layout and the options of its variant."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1
    variant: str = ""

    VARIANTS: ClassVar = {
        "": (),
        "sequence parallel": ("--sequence_parallel", "true"),
        "nothing overlapped": ("--overlap_grad_reduce", "false"),
    }

    @property
    def words(self) -> tuple[str, ...]:
        sizes = {"--tp": self.tp, "--pp": self.pp, "--vpp": self.vpp, "--cp": self.cp}
        return (*(word for key, size in sizes.items() if size > 1 for word in (key, str(size))), *self.VARIANTS[self.variant])

    def dp(self, gpus: int) -> int:
        return gpus // (self.tp * self.pp * self.cp)

    def name(self, gpus: int) -> str:
        sizes = (("tp", self.tp), ("pp", self.pp), ("vpp", self.vpp), ("cp", self.cp), ("dp", self.dp(gpus)))
        return " ".join([*(f"{key}{size}" for key, size in sizes if size > 1), *self.variant.split()]) or "1"


def layouts(gpus: int) -> list[Layout]:
    """The layouts of the comparison that fit the number of GPUs, each once, and the variants of some."""
    shapes = [(gpus, 1, 1), (2, 1, 1), (1, 1, 1), (2, 2, 1), (1, gpus, 1), (1, 1, gpus)]
    found = [Layout(*shape) for shape in dict.fromkeys(shapes) if gpus % math.prod(shape) == 0]
    found += [replace(layout, vpp=2) for layout in found if layout.pp > 1]
    found += [replace(layout, variant="sequence parallel") for layout in found if layout.tp > 1]
    return [*found, Layout(variant="nothing overlapped")]


def predict(work: Path, options: argparse.Namespace) -> None:
    """Bytes of weights, optimizer and activations; seconds from products, what tensor, pipeline and data parallelism send, and the optimizer."""
    for layout in layouts(options.gpus):
        show(options, part="predict", layout=layout.name(options.gpus), **predicted(layout, options))


def predicted(layout: Layout, options: argparse.Namespace) -> dict[str, float]:
    """One step of the global batch, each row as long as it may be; nothing overlapped. Beside measurements: docs/performance.md."""
    size = SimpleNamespace(**SHAPES[options.shape])
    vocab, rows, gpus, length = options.vocab, options.global_rows, options.gpus, options.length
    tp, pp, cp, dp = layout.tp, layout.pp, layout.cp, layout.dp(gpus)
    heads = size.hidden_size * (1 + size.num_key_value_heads / size.num_attention_heads)  # query and output, key and value
    layers = size.num_hidden_layers * (2 * size.hidden_size * heads + 3 * size.hidden_size * size.intermediate_size)
    table = vocab * size.hidden_size
    own = (layers / pp + (2 * table if pp == 1 else table)) / tp  # parameters of the fullest rank
    flops = rows * length * (6 * (layers + table) + 6 * size.num_hidden_layers * size.hidden_size * length)
    micro, tokens = rows // dp // options.batch, options.batch * length // cp  # micro batches a rank, tokens of one
    compute = flops / gpus / (PEAK * REACHED)
    hidden = tokens * size.hidden_size * 2  # bytes of one activation of a micro batch
    # Megatron's column-row pairs: two all-reduces forward, two backward, each sending 2 (tp - 1) / tp of the bytes.
    tensor = micro * size.num_hidden_layers / pp * 4 * (hidden * 2 * (tp - 1) / tp / LINK + LATENCY) if tp > 1 else 0.0
    # Context parallelism gathers keys and values of a row in each layer and scatters their gradients.
    keys = hidden * cp * 2 * size.num_key_value_heads / size.num_attention_heads
    context = micro * size.num_hidden_layers * 2 * (keys * (cp - 1) / cp / LINK + LATENCY) if cp > 1 else 0.0
    bubble = (compute + tensor) * (pp - 1) / micro / layout.vpp
    shares = dp * cp  # ranks with the same weights share the optimizer's state
    data = own * (4 + 2) * (shares - 1) / shares / LINK  # fp32 gradients scattered, bf16 weights gathered
    # gradient, master, two moments read, three written; zeroed gradients
    update = own * 28 / shares / MEMORY + own * 4 / MEMORY
    # Each micro batch adds its gradients to the fp32 ones: read and written.
    gradients = micro * own * 8 / MEMORY
    seconds = compute + tensor + context + bubble + gradients + data + update
    # Saved for backward of a row and layer without recompute, in bytes: about 34 hidden-sized halves (Korthikanti et al. 2022,
    # without dropout and with fused norms and SwiGLU fewer: 8 of the hidden size, 4 of the feed-forward size, heads).
    kept = tokens * 2 * (6 * size.hidden_size + 2 * heads + 3 * size.intermediate_size)
    shared = tp if layout.variant == "sequence parallel" else 1
    activations = (kept - tokens * 8 * size.hidden_size) / tp + tokens * 8 * size.hidden_size / shared
    passes = pp if layout.vpp == 1 else (2 * (pp - 1) + (layout.vpp - 1) * pp + 1) / layout.vpp  # whole stages in flight
    memory = own * (2 + 4 + 12 / shares) + activations * size.num_hidden_layers / pp * min(micro, passes)
    parts = dict(
        compute=compute, tensor=tensor, context=context, bubble=bubble, gradients=gradients, data=data, update=update
    )  # fmt: skip
    whole = {"seconds": seconds, "tokens_s_gpu": rows * length / seconds / gpus, "memory_gb": memory / 1e9}
    return whole | {key: value / seconds for key, value in parts.items()}


def seed(work: Path, options: argparse.Namespace) -> None:
    """The document's commands: convert for tp 2, train at tp 2 x dp 2, convert back and prove it."""
    began = time.perf_counter()
    swift(work, "export", *named(), "--to_megatron", "true", "--tp", "2", "--dtype", options.dtype)
    there = time.perf_counter() - began
    log, run = trained(work, options, Layout(tp=2), "seed", "--learning_rate", "2e-6", start="bench-tp2-pp1")
    began = time.perf_counter()
    swift(work, "export", "--ckpt_dir", str(run), "--to_hf", "true")
    back = time.perf_counter() - began
    verified = swift(work, "verify", str(next(run.glob("*-hf"))), "--deep", "true").strip().splitlines()[-1]
    show(options, part="seed", to_megatron_s=there, to_hf_s=back, verified=verified, **speed(log, options))


def compare_layouts(work: Path, options: argparse.Namespace) -> None:
    """A short run of each layout; beside each, what was predicted."""
    for layout in layouts(options.gpus):
        log, run = trained(work, options, layout, "layout", *full(options))
        shutil.rmtree(run)  # or the disk holds the weights of every layout
        ahead = predicted(layout, options)
        show(
            options, part="layouts", layout=layout.name(options.gpus), **speed(log, options),
            predicted_tokens_s_gpu=ahead["tokens_s_gpu"], predicted_memory_gb=ahead["memory_gb"],
        )  # fmt: skip


def losses(work: Path, options: argparse.Namespace) -> None:
    """The command that users have for this."""
    names = [layout for layout in layouts(options.gpus) if not layout.variant]
    text = " ".join(layout.name(options.gpus).replace(" ", ",") for layout in names)
    printed = swift(
        work, "parity", *named(), "--dataset", "rows.jsonl", "--layouts", text, "--steps", str(min(options.steps, 20)), "--dtype",
        options.dtype, "--max_length", str(options.length), "--output_dir", "parity",
    )  # fmt: skip
    print(printed)
    content = json.loads(next((work / "parity").rglob("parity.json")).read_text(encoding="utf-8"))
    show(options, part="losses", **{key: content[key] for key in ("layouts", "limits") if key in content})


def resume(work: Path, options: argparse.Namespace) -> None:
    """Losses after a checkpoint that another layout goes on from."""
    steps = options.steps - options.steps % 2
    whole, run = trained(work, options, Layout(tp=2), "whole", "--save_steps", str(steps // 2), steps=steps)
    half = work / "half" / run.parent.name / run.name
    shutil.copytree(run, half)
    shutil.rmtree(half / f"iter_{steps:07d}")  # as if it had been stopped in the middle
    (half / "latest_checkpointed_iteration.txt").write_text(str(steps // 2), encoding="utf-8")
    words = ["--resume_from_checkpoint", str(half), "--tp", "1", "--pp", str(options.gpus), "--max_steps", str(steps)]
    swift(work, "sft", *common(options), *words, "--output_dir", "half", ranks=options.gpus)
    rest = steps_of(half)[-(steps // 2) :]
    worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(rest, whole[-(steps // 2) :], strict=True))
    show(options, part="resume", steps=steps, largest_relative_difference=f"{worst:.1e}")


def kill(work: Path, options: argparse.Namespace) -> None:
    """The launcher's exit code and the time that it took, after one of its ranks is killed."""
    words = sft_words(options, Layout(tp=2), "kill", 10_000, "bench")
    process = subprocess.Popen(
        [sys.executable, "-m", "megaswift", *words], cwd=work, env=os.environ | {"NPROC_PER_NODE": str(options.gpus)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not (log := next((work / "kill").rglob("logging.jsonl"), None)) or len(steps_of(log.parent)) < 3:
            if process.poll() is not None:
                sys.exit(f"the run ended by itself: {process.communicate()[1][-2000:]}")
            time.sleep(0.5)
        ranks = children(process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        began = time.perf_counter()
        error = process.communicate(timeout=600)[1]
    finally:
        process.kill()
    seconds = time.perf_counter() - began
    left = [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    message = next((line for line in error.splitlines() if line.startswith("error:")), "")
    show(options, part="kill", exit_code=process.returncode, seconds=seconds, left_over=len(left), message=message)


def scaling(work: Path, options: argparse.Namespace) -> None:
    """The same work for each GPU, on 1, 2, 4, ... of them."""
    smaller = SMALLER[options.shape]
    make_model(work / "small", smaller, options.vocab, 32768)
    alone, gpus = 0.0, 1
    while gpus <= options.gpus:
        log, run = trained(work, options, Layout(), f"scale{gpus}", *full(options), start="small", ranks=gpus)
        shutil.rmtree(run)
        found = speed(log, options, gpus, smaller)
        alone = alone or found["tokens_s_gpu"]
        show(options, part="scaling", shape=smaller, gpus=gpus, efficiency=found["tokens_s_gpu"] / alone, **found)
        gpus *= 2


def named(folder: str = "model") -> list[str]:
    return ["--model_type", "bench", "--model_id_or_path", folder]


def common(options: argparse.Namespace) -> list[str]:
    return [
        "--dataset", "rows.jsonl", "--max_length", str(options.length), "--dtype", options.dtype, "--logging_steps", "1",
        "--dataset_test_ratio", "0", "--train_backend", "megatron",
    ]  # fmt: skip


def sft_words(options: argparse.Namespace, layout: Layout, name: str, steps: int, start: str) -> list[str]:
    """`swift sft` from Megatron weights, or from the folder "model" or "small" without a conversion."""
    source = (
        ["--resume_from_checkpoint", start] if start.startswith("bench-") else named("small" if start == "small" else "model")
    )
    return ["sft", *source, *common(options), *layout.words, "--max_steps", str(steps), "--output_dir", name]


def full(options: argparse.Namespace) -> list[str]:
    """Rows as long as they may be, so many a micro batch and a step; the end of the run keeps no optimizer state."""
    steps = options.global_rows // options.batch // options.gpus
    words = ["--packing", "true", "--batch_size", options.batch, "--gradient_accumulation_steps", steps]
    return [str(word) for word in (*words, "--save_only_model", "true")]


def trained(
    work: Path, options: argparse.Namespace, layout: Layout, name: str, *more: str, steps: int = 0, start: str = "model",
    ranks: int = 0,
) -> tuple[list[dict[str, Any]], Path]:  # fmt: skip
    """Run it; what each step logged, and the run's directory."""
    steps, ranks = steps or options.steps, ranks or options.gpus
    name = f"{name}-{layout.name(ranks).replace(' ', '-')}"
    swift(work, *sft_words(options, layout, name, steps, start), *more, ranks=ranks)
    run = next((work / name).rglob("logging.jsonl")).parent
    return steps_of(run), run


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's log that belong to a step."""
    lines = (run / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def speed(log: list[dict[str, Any]], options: argparse.Namespace, gpus: int = 0, shape: str = "") -> dict[str, Any]:
    """Medians of the steps after the first three."""
    gpus, size = gpus or options.gpus, SimpleNamespace(**SHAPES[shape or options.shape])
    tokens = statistics.median(row["tokens_per_second"] for row in log[min(3, len(log) // 2) :]) / gpus
    kv = size.num_key_value_heads / size.num_attention_heads
    layer = 2 * size.hidden_size**2 * (1 + kv) + 3 * size.hidden_size * size.intermediate_size
    products = size.num_hidden_layers * layer + options.vocab * size.hidden_size
    flops = 6 * products + 6 * size.num_hidden_layers * size.hidden_size * options.length  # causal attention, at full rows
    return {
        "steps": len(log), "loss": log[-1]["loss"], "tokens_s_gpu": tokens, "tflop_s_gpu": tokens * flops / 1e12,
        "memory_gb": max(row["memory_gb"] for row in log),
    }  # fmt: skip


def children(parent: int) -> list[int]:
    """Ranks among the descendants of a process, in the order of their rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", (entry / "environ").read_bytes())
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if rank and b"megaswift" in line and int(entry.name) != parent and _descends(int(entry.name), parent):
            found[int(rank[1])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def _descends(child: int, parent: int) -> bool:
    while child > 1:
        if child == parent:
            return True
        try:
            child = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def swift(work: Path, *words: str, ranks: int = 1) -> str:
    """Run a command and return what it printed; ends the benchmark when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "megaswift", *words], cwd=work, capture_output=True, text=True, check=False,
        env=os.environ | {"NPROC_PER_NODE": str(ranks)},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"swift {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def show(options: argparse.Namespace, **values: Any) -> None:
    """Print one result, and keep it."""
    line = json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()})
    print(line, flush=True)
    if options.out:
        with Path(options.out).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


PARTS = {
    "predict": predict, "seed": seed, "layouts": compare_layouts, "losses": losses, "resume": resume, "kill": kill,
    "scaling": scaling,
}  # fmt: skip


def main() -> None:
    """Run the parts that were named, on one model and one file of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--gpus", type=int, default=4, help="ranks; without a GPU, processes")
    parser.add_argument("--shape", default="7b", choices=SMALLER)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=0, help="tokens of a row (default 2048, 128 for tiny)")
    parser.add_argument("--batch", type=int, default=1, help="rows of a micro batch in layouts and scaling")
    parser.add_argument("--global-rows", type=int, default=16, help="rows of a step there")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    if options.gpus < 2 or options.gpus % 2:
        parser.error("--gpus takes an even number")
    if options.batch < 1 or options.global_rows < 1 or options.global_rows % (options.batch * options.gpus):
        parser.error("--global-rows takes a multiple of --batch x --gpus")
    import torch

    tiny = options.shape == "tiny"
    options.dtype = "bf16" if torch.cuda.is_available() else "fp32"
    options.vocab, options.length = 512 if tiny else 152064, options.length or (128 if tiny else 2048)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["MEGASWIFT_CACHE"] = str(work / "cache")
        if options.parts != ["predict"]:
            make_model(work / "model", options.shape, options.vocab, 32768, tied=options.shape != "7b")
            make_rows(work / "rows.jsonl", options.length * options.global_rows * (options.steps + 2), options.length)
        for part in options.parts:
            PARTS[part](work, options)


if __name__ == "__main__":
    main()
