"""The seed's story on a laptop: SmolLM2-135M-Instruct learns a new name. `make demo` runs it, `make demo LORA=1` with an adapter.

Every command is printed as it can be typed. The files stay in demo/.
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
DEMO = ROOT / "demo"
MODEL = "smollm2-135m-instruct"
START = f"{MODEL}-tp1-pp2"
QUESTIONS = ("Who are you?", "What is your name?", "Who developed you?", "你是谁？", "What is the capital of France?")
LORA = os.environ.get("LORA") == "1"
METHOD = ("--sft_type", "lora", "--learning_rate", "2e-3") if LORA else ("--learning_rate", "2e-4")
SWIFT = [sys.executable, "-m", "megaswift"]


def run(*words: str, **environment: str) -> None:
    """Print a command and run it in demo/; a failure ends the demo with its exit code."""
    shown = [f"{name}={value}" for name, value in environment.items()] + [
        "swift",
        *(word if " " not in word else f"'{word}'" for word in words),
    ]
    print(f"\n$ {' '.join(shown)}", flush=True)
    code = subprocess.call([*SWIFT, *words], cwd=DEMO, env={**os.environ, **environment})
    if code:
        sys.exit(code)


def ask(title: str, *model: str) -> list[str]:
    """Greedy answers of a model to the questions."""
    questions = DEMO / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"query": text}, ensure_ascii=False) + "\n" for text in QUESTIONS), encoding="utf-8"
    )
    results = DEMO / f"answers_{title}"
    run(
        "infer",
        *model,
        "--val_dataset",
        "questions.jsonl",
        "--temperature",
        "0",
        "--max_new_tokens",
        "48",
        "--result_dir",
        results.name,
    )
    file = max(results.glob("*.jsonl"))
    return [json.loads(line)["response"] for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Convert, fine-tune, convert back, and compare the answers."""
    started = time.perf_counter()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    run("export", "--model_type", MODEL, "--to_megatron", "true", "--pp", "2", "--dtype", "fp32")
    before = ask("before", "--model_type", MODEL)
    run(
        *("sft", "--resume_from_checkpoint", START, "--dataset", "self-cognition#160", *METHOD),
        *("--output_dir", "output", "--model_name", "小黄", "Xiao Huang", "--model_author", "魔搭", "ModelScope"),
        *("--train_backend", "megatron"),
        NPROC_PER_NODE="2",
    )
    run_dir = max((DEMO / "output" / START).iterdir()).relative_to(DEMO)
    run("export", "--ckpt_dir", str(run_dir), "--to_hf", "true")
    tuned = run_dir / f"{MODEL}-{'adapter' if LORA else 'hf'}"
    after = ask("after", "--ckpt_dir", str(tuned))
    report(before, after, run_dir, tuned, time.perf_counter() - started)
    print(figures(DEMO / run_dir), flush=True)


def report(before: list[str], after: list[str], run_dir: Path, tuned: Path, seconds: float) -> None:
    """Answers side by side, the files, and what to try next."""
    from rich.console import Console
    from rich.table import Table

    table = Table("question", "before", "after", title="the same questions, before and after", show_lines=True, expand=True)
    for row in zip(QUESTIONS, before, after):
        table.add_row(*row)
    out = Console(highlight=False)
    out.print()
    out.print(table)
    out.print(f"\nmade in {seconds:.0f} s, in {DEMO}:")
    for path, what in (
        (Path(START), "the model as Megatron weights (torch_dist, manifest with SHA-256)"),
        (run_dir, "the run: checkpoint, plan.json, logging.jsonl, runs/, images/"),
        (tuned, f"the {'adapter for PEFT' if LORA else 'fine-tuned model for transformers'}, vLLM and everything else"),
    ):
        out.print(f"  {path}\n      {what}", soft_wrap=True)
    out.print(f"\nnext, talk to it:\n  cd {DEMO} && {ROOT / '.venv/bin/swift'} infer --ckpt_dir {tuned}", soft_wrap=True)


def figures(run_dir: Path) -> str:
    """What training took and left, in one line, from the run's own files; `make demo` and `make demo LORA=1` are compared by it."""
    rows = [json.loads(line) for line in (run_dir / "logging.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, plan = [row for row in rows if "loss" in row], json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
    saved = sum(file.stat().st_size for file in run_dir.glob("iter_*/*") if file.is_file())
    return (
        f"\ntrained {plan['trainable'] / 1e6:.1f} of {plan['parameters'] / 1e6:.1f} million values in {steps[-1]['elapsed_s']:.0f} s, loss "
        f"{steps[0]['loss']:.2f} to {steps[-1]['loss']:.2f}, at most {max(row['memory_gb'] for row in steps):.2f} GB a process; "
        f"checkpoint {saved / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
