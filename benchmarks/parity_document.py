"""docs/parity.md, made from measurements: layouts, transformers, planted faults, bf16 noise, whole runs.

    make parity DATA=alpaca.json#400
    python benchmarks/parity_document.py [--data alpaca.json#400] [--parts matrix faults ...] [--results DIR] [--quick]

Every part leaves its result as a JSON file in --results, and the document is written from those files, so that a part can
be repeated alone; a gpu_truth.json of benchmarks/gpu_truth.py that is put there makes a section too. `learning` and
`cognition` train the packaged SmolLM2-135M-Instruct (about 20 minutes on 2 cores); the other parts use tiny random models.
`--quick` runs everything on tiny models with few steps: what the test suite does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from parity_text import write_document  # noqa: E402

# mbsN lays N rows end to end in one micro batch, with attention within each row; "padded" pads them to the longest instead.
# The global batch is 4 rows, and 8 in MORE, so that mbs4 and mbs8 are one big batch where tp1 accumulates micro batches.
LAYOUTS = "tp1 tp2,sp pp2 pp2,vpp2 dp2 mbs4 mbs4,padded recompute resume"
PACKED = "tp1 tp2,sp pp2 mbs4"
MORE = "tp1 tp2 tp4,sp pp4 tp2,pp2 tp2,pp2,sp tp2,pp2,vpp2,sp tp2,pp2,dp2,sp mbs8 mbs8,padded math pp2,mbs2,padded,recompute tp2,sp,resume"
QUICK_LAYOUTS = "tp1 tp2,sp pp2 mbs4,padded resume"
NOISE_LAYOUTS = "tp1 tp2 tp2,sp pp2 dp2 mbs4 mbs4,padded tp2,pp2,sp recompute"
TRANSFORMERS: dict[str, tuple[int, list[str]]] = {
    "tp1": (1, ["--gradient_accumulation_steps", "8"]),
    "tp2,pp2,sp": (4, ["--tp", "2", "--pp", "2", "--sequence_parallel", "true", "--gradient_accumulation_steps", "2"]),
    "pp2, packed": (2, ["--pp", "2", "--packing", "true", "--max_length", "48", "--gradient_accumulation_steps", "4"]),
    "dp2,mbs2,padded": (2, ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--padding_free", "false"]),
}

MODEL = "smollm2-135m-instruct"
QUESTIONS = ("Who are you?", "What is your name?", "Who developed you?", "What is the capital of France?")
NAMES = ("--model_name", "小黄", "Xiao Huang", "--model_author", "魔搭", "ModelScope")


@contextlib.contextmanager
def on_pool(pool: Any, processes: int, fault: str = "") -> Iterator[None]:
    """Commands inside run their ranks on pooled processes, which have imported everything; with a fault planted if named."""
    from tests.parity.planted import run_rank, run_sft_rank

    def start_ranks(place: Any, job: Path, *_: Any, module: str = "") -> None:
        pool.run(place.world_size, run_rank if module else run_sft_rank, str(job), fault)

    with (
        mock.patch("megaswift.launch.agent.start_ranks", start_ranks),
        mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(processes)}),
    ):
        yield


def parity(pool: Any, work: Path, processes: int, words: list[str], fault: str = "") -> dict[str, Any]:
    """`swift parity` on pooled ranks: what parity.json says, and with it the error if parity does not hold."""
    from megaswift.commands.parity import parity_main
    from megaswift.errors import DataError

    shutil.rmtree(work / "tiny-out", ignore_errors=True)
    error = None
    with on_pool(pool, processes, fault), contextlib.redirect_stdout(io.StringIO()):
        try:
            parity_main([*words, "--output_dir", str(work / "tiny-out")])
        except DataError as caught:
            error = caught.what
    content: dict[str, Any] = json.loads(next((work / "tiny-out").rglob("parity.json")).read_text(encoding="utf-8"))
    return content | {"error": error, "options": words[2:]}


def tiny_words(work: Path, family: str, **config: Any) -> list[str]:
    """The words that name a tiny model of a family, as Megatron weights, and rows for it."""
    from tests.training import tiny_start, write_rows

    root = work / f"tiny-{family}-{len(config)}"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        start = tiny_start(root, family, **config)
    return [
        "--resume_from_checkpoint",
        str(start),
        "--dataset",
        str(write_rows(root / "rows.jsonl")),
        "--learning_rate",
        "1e-3",
    ]


def families(quick: bool) -> list[str]:
    from tests import tiny

    return ["llama"] if quick else list(tiny.FAMILIES)


def part_matrix(work: Path, options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """Every layout against the first in fp32: for each family, for each with packed rows, and more layouts for one."""
    steps, rows = ("3", QUICK_LAYOUTS) if options.quick else ("20", LAYOUTS)
    found: dict[str, Any] = {"plain": {}, "packed": {}, "more": {}}
    for family in families(options.quick):
        words = [*tiny_words(work, family), "--steps", steps, "--gradient_accumulation_steps", "4", "--layouts"]
        found["plain"][family] = parity(pool, work, 1, [*words, rows])
        found["packed"][family] = parity(pool, work, 1, [*words, PACKED, "--packing", "true", "--max_length", "48"])
        save(work, "matrix", found)
    if not options.quick:
        words = [*tiny_words(work, "llama"), "--steps", steps, "--gradient_accumulation_steps", "8", "--layouts", MORE]
        found["more"]["llama"] = parity(pool, work, 1, words)
    return found


def save(work: Path, part: str, result: dict[str, Any]) -> None:
    """Leave a part's result in its file."""
    (work / f"{part}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def part_transformers(work: Path, options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """The engine against transformers, step by step, for each family at several layouts, packed rows among them."""
    found: dict[str, Any] = {}
    for family in families(options.quick):
        words = [*tiny_words(work, family), "--steps", "2" if options.quick else "5"]
        for name, (processes, more) in TRANSFORMERS.items():
            found.setdefault(family, {})[name] = parity(pool, work, processes, [*words, *more])
    return found


def part_faults(work: Path, options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """Each planted fault, and the same command without it."""
    from tests.parity.planted import CASES

    words = tiny_words(work, "qwen2", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    found = {}
    for fault, (processes, more, _) in CASES.items():
        flags = [word for name, value in more.items() for word in (f"--{name}", str(value).lower())]
        command = [*words, "--steps", "3", "--gradient_accumulation_steps", str(8 // processes), *flags]
        found[fault] = {
            "with": parity(pool, work, processes, command, fault)["error"],
            "without": parity(pool, work, processes, command)["error"],
            "options": flags,
        }
    return found


def part_noise(work: Path, options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """Layouts in bf16 against the band that two seeds of rounding noise span."""
    words = [*tiny_words(work, "qwen2"), "--gradient_accumulation_steps", "8", "--dtype", "bf16"]
    words += ["--steps", "3" if options.quick else "20", "--layouts", "tp1 tp2" if options.quick else NOISE_LAYOUTS]
    return parity(pool, work, 1, words)


def base_of(work: Path, quick: bool) -> list[str]:
    """The words that name the model that learns: the packaged one, or a tiny random one."""
    if not quick:
        return ["--model_type", MODEL]
    from tests import tiny

    if not (work / "tiny-hf").exists():
        tiny.save_tiny(work / "tiny-hf", "llama", vocab_size=300, eos_token_id=1, pad_token_id=2)
        tiny.write_tokenizer(work / "tiny-hf")
    return ["--model_type", "tiny-chat", "--model_id_or_path", str(work / "tiny-hf")]


def whole_run(work: Path, name: str, words: list[str], pool: Any) -> tuple[dict[str, Any], Path]:
    """`swift parity --learning true` at tp 1, pp 2, on two processes: its result and its directory."""
    from megaswift.commands.parity import parity_main

    shutil.rmtree(work / name, ignore_errors=True)
    common = ["--pp", "2", "--learning", "true", "--keep_dumps", "true", "--output_dir", str(work / name)]
    began = time.perf_counter()
    with on_pool(pool, 2) if pool else mock.patch.dict(os.environ, {"NPROC_PER_NODE": "2"}):
        directory = parity_main([*words, *common])
    content = json.loads((directory / "parity.json").read_text(encoding="utf-8"))
    return content | {"options": words, "seconds": time.perf_counter() - began}, directory


def part_learning(work: Path, options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """One epoch on instruction rows, both ways."""
    if not options.quick and not options.data:
        sys.exit("`learning` needs instruction rows: give --data FILE#N, or leave it out of --parts.")
    data = str(rows_of(work)) if options.quick else options.data
    sizes = [
        "--packing",
        "true",
        "--max_length",
        "96",
        "--truncation_strategy",
        "truncation_left",
        "--dataset_test_ratio",
        "0.1",
    ]
    rate = ["--learning_rate", "1e-3" if options.quick else "1e-4", "--eval_steps", "2" if options.quick else "6"]
    words = [*base_of(work, options.quick), "--dataset", data, *sizes, *rate]
    result, _ = whole_run(work, "learning", words, pool if options.quick else None)
    shutil.rmtree(work / "learning")
    name, mark, count = data.partition("#")
    return result | {"options": [*sizes, *rate], "data": Path(name).name + mark + count}


def part_cognition(work: Path, options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """Self-cognition, both ways, and what the model answers before and after."""
    base, data = base_of(work, options.quick), f"self-cognition#{24 if options.quick else 160}"
    words = ["--dataset", data, *NAMES, "--learning_rate", "2e-4", "--dataset_test_ratio", "0.05"]
    result, directory = whole_run(work, "cognition", [*base, *words], pool if options.quick else None)
    after = ["--model_type", base[1], "--model_id_or_path", str(directory / "reference")]
    answers = {
        "before": ask(work, base),
        "engine": ask(work, ["--ckpt_dir", str(directory / "engine")]),
        "transformers": ask(work, after),
    }
    shutil.rmtree(work / "cognition")
    return result | {"options": words, "data": data, "questions": QUESTIONS, "answers": answers}


def ask(work: Path, model: list[str]) -> list[str]:
    """Greedy answers to the questions."""
    from megaswift.commands.infer import infer_main

    questions = work / "questions.jsonl"
    questions.write_text("".join(json.dumps({"query": text}) + "\n" for text in QUESTIONS), encoding="utf-8")
    words = ["--val_dataset", str(questions), "--temperature", "0", "--max_new_tokens", "32", "--infer_backend", "pt"]
    return [str(row["response"]) for row in infer_main([*model, *words, "--save_result", "false"])]


def rows_of(work: Path) -> Path:
    """Rows for tiny models."""
    from tests.training import write_rows

    return write_rows(work / "rows.jsonl")


PARTS = {
    "matrix": part_matrix, "transformers": part_transformers, "faults": part_faults, "noise": part_noise,
    "learning": part_learning, "cognition": part_cognition,
}  # fmt: skip


def main() -> None:
    """Measure the parts that are asked for, and write the document from all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="instruction rows of `learning`, as --dataset takes them, for example alpaca.json#400")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=list(PARTS), help="what to measure now; nothing: only write"
    )
    parser.add_argument("--results", type=Path, default=Path("parity-document"), help="directory of results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "parity.md", help="the document")
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps everywhere; give another --out")
    options = parser.parse_args()
    work = options.results.absolute()
    work.mkdir(parents=True, exist_ok=True)
    measure(work, options)
    names = [*PARTS, "gpu_truth"]  # the last is what gpu_truth.py wrote, if it was put there
    results = {
        part: json.loads((work / f"{part}.json").read_text(encoding="utf-8"))
        for part in names
        if (work / f"{part}.json").exists()
    }
    write_document(options.out, results)
    print(f"{options.out} is written from {', '.join(results)}")


def measure(work: Path, options: argparse.Namespace) -> None:
    """Run the parts; each leaves its result in a file."""
    from tests.ranks import RankPool

    pool = RankPool()
    for part in options.parts:
        print(f"{part} ...", flush=True)
        began = time.perf_counter()
        save(work, part, PARTS[part](work, options, pool))
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
