"""Conversion speed and memory beside `cp` and transformers, on one synthetic Qwen2-shaped checkpoint, in one run.

    python benchmarks/conversion.py [--shape 2b|7b] [--dir DIR] [--rounds 3] [--no-peer] [--verify] [--out results.json]

Every tensor is random bf16. Each measurement is a process of its own, timed until its files are on the disk (cp and
transformers are followed by a sync of their files; ours syncs itself). Peak memory is the process's largest resident
set, mapped file pages included. All files are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "1b": dict(
        hidden_size=1536,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=64000,
    ),
    "2b": dict(
        hidden_size=2048,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=2,
        intermediate_size=11008,
        vocab_size=64000,
    ),
    "7b": dict(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
    ),
}
COPY = "cp (with sync)"
THERE, BACK = "megaswift to Megatron, --verify false", "megaswift to Hugging Face, --verify false"
PAUSE = 10  # s before each measurement: cloud disks lend bursts
PEER = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""


def make(folder: Path, shape: str) -> int:
    """Write the synthetic model; bytes of its weights."""
    import torch
    from transformers import Qwen2Config

    from megaswift.models import parameters_of
    from megaswift.models.parameters import hf_shapes
    from megaswift.weights.hf.write import PlannedTensor, write_checkpoint

    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=32768, tie_word_embeddings=False, rms_norm_eps=1e-6)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], "bfloat16"
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 26, generator=generator).mul_(0.02).bfloat16()  # drawing 7 billion values would take minutes

    def produce(shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return (torch.rand(shape, generator=generator) + 0.5).bfloat16()
        wanted, pieces = shape[0] * shape[1], []
        while wanted > 0:
            start = int(torch.randint(len(pool) // 2, (1,), generator=generator))
            pieces.append(pool[start : start + wanted])
            wanted -= len(pieces[-1])
        return torch.cat(pieces).reshape(shape)

    planned = [
        PlannedTensor(name, torch.bfloat16, shape, lambda shape=shape: produce(shape))
        for name, shape in hf_shapes(parameters_of(config)).items()
    ]
    text = json.dumps(config.to_dict() | {"model_type": "qwen2"}, indent=2).encode()
    return write_checkpoint(folder, planned, extra_files={"config.json": text}, threads=1).bytes


def measure(words: list[str], synced: Path | None = None) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak resident GB of one process; the files of `synced` are brought to the disk within the time.

    This process imports nothing large: a child's peak begins with its parent's size.
    """
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read() if process.stderr is not None else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)[:200]} failed:\n{errors.decode()[-3000:]}")
    if synced is not None:
        for path in [*synced.rglob("*"), synced]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def forget(*folders: Path) -> None:
    """Let the system forget file contents, so that every measurement reads from the disk."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="2b")
    parser.add_argument("--dir", type=Path, default=Path("conversion-benchmark"))
    parser.add_argument("--rounds", type=int, default=3, help="cp and both directions, in turn")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--verify", action="store_true", help="also measure both directions with the proof")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.dir, options.shape)
        return
    place = options.dir.absolute()
    place.mkdir(parents=True, exist_ok=True)
    try:
        results = run(place, options)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def run(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    subprocess.run([sys.executable, __file__, "--shape", options.shape, "--dir", str(place / "hf"), "--make"], check=True)
    size = sum(path.stat().st_size for path in (place / "hf").iterdir()) / 1e9
    largest = SHAPES[options.shape]["vocab_size"] * SHAPES[options.shape]["hidden_size"] * 2 / 1e9
    bound = 3 * largest + 1.5
    print(f"{options.shape}: {size:.2f} GB of bf16, largest tensor {largest:.2f} GB, memory bound {bound:.2f} GB", flush=True)
    swift = [sys.executable, "-m", "megaswift", "export"]
    there = [
        *swift,
        "--to_megatron",
        "true",
        "--model_type",
        "t",
        "--model_id_or_path",
        str(place / "hf"),
        "--megatron_output_dir",
    ]
    back = [*swift, "--to_hf", "true", "--ckpt_dir", str(place / "m"), "--hf_output_dir"]
    rows: dict[str, list[tuple[float, float, float]]] = {}

    def add(name: str, words: list[str], made: Path, *, sync: bool, keep: bool = False) -> None:
        forget(place)
        seconds, cpu, memory = measure(words, made if sync else None)
        rows.setdefault(name, []).append((seconds, cpu, memory))
        print(f"  {name:46}{seconds:8.1f} s {size / seconds:7.3f} GB/s {cpu:7.1f} CPU s {memory:7.2f} GB peak", flush=True)
        if not keep:
            shutil.rmtree(made)

    def turn(name: str) -> None:
        time.sleep(PAUSE)
        if name == COPY:
            add(COPY, ["cp", "-r", str(place / "hf"), str(place / "copy")], place / "copy", sync=True)
        elif name == THERE:
            shutil.rmtree(place / "m", ignore_errors=True)
            add(THERE, [*there, str(place / "m"), "--verify", "false"], place / "m", sync=False, keep=True)
        else:
            add(BACK, [*back, str(place / "h"), "--verify", "false"], place / "h", sync=False)

    order = [COPY, THERE, BACK]
    for number in range(options.rounds):
        for name in order[number % 3 :] + order[: number % 3]:  # what follows cp finds the disk's burst used up
            turn(name)
    shutil.rmtree(place / "m")
    if not options.no_peer:
        add(
            "transformers from_pretrained + save_pretrained",
            [sys.executable, "-c", PEER, str(place / "hf"), str(place / "peer")],
            place / "peer",
            sync=True,
        )
    if options.verify:
        add("megaswift to Megatron, with the proof", [*there, str(place / "m")], place / "m", sync=False, keep=True)
        add("megaswift to Hugging Face, with the proof", [*back, str(place / "h")], place / "h", sync=False)
    middle = {name: statistics.median(seconds for seconds, _, _ in found) for name, found in rows.items()}
    for name in (THERE, BACK):
        peak = max(memory for _, _, memory in rows[name])
        verdict = "within" if peak <= bound else "ABOVE"
        print(
            f"  {name}: {middle[COPY] / middle[name]:.2f} x cp, medians of {options.rounds}; memory {verdict} the bound",
            flush=True,
        )
    return {
        "shape": options.shape,
        "gb": size,
        "bound_gb": bound,
        "rows": {name: [{"seconds": s, "cpu_seconds": c, "peak_gb": m} for s, c, m in found] for name, found in rows.items()},
    }


if __name__ == "__main__":
    main()
