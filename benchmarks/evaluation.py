"""Questions per second of `swift eval` beside plain lm-eval, on the same questions, model and machine, one after the other.

python benchmarks/evaluation.py --data DIR [--model NAME_OR_DIR] [--questions 100] [--few 32]

lm-eval is looked for in .venv-eval (make test-eval), vLLM in .venv-vllm (make test-vllm); what is not there is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLAIN = """
import json, sys, time
import lm_eval, yaml, lm_eval.tasks
from pathlib import Path
model, rows, batch, place = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
task = {"include": str(Path(lm_eval.tasks.__file__).parent / "arc/arc_challenge.yaml"), "task": "plain_arc", "dataset_path": "json",
        "dataset_name": None, "dataset_kwargs": {"data_files": {"test": rows}}, "training_split": None, "validation_split": None}
(place / "plain.yaml").write_text(yaml.safe_dump(task))
from lm_eval.models.huggingface import HFLM
import torch
class Timed(HFLM):
    def loglikelihood(self, *words, **more):
        global seconds
        began = time.perf_counter()
        answers = super().loglikelihood(*words, **more)
        seconds = time.perf_counter() - began  # without reading tasks and rows, which the other figures leave out too
        return answers
gpu = torch.cuda.is_available()
lm = Timed(pretrained=model, batch_size=batch, dtype="bfloat16" if gpu else "float32", device="cuda" if gpu else "cpu")
found = lm_eval.simple_evaluate(model=lm, tasks=[str(place / "plain.yaml")], bootstrap_iters=0)
print(json.dumps({"seconds": seconds, "acc": found["results"]["plain_arc"]["acc,none"]}))
"""


def main() -> None:
    """Run what is installed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory with arc_challenge.jsonl")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--questions", type=int, default=100, help="questions of the log-likelihood rows")
    parser.add_argument("--few", type=int, default=32, help="questions of the generation rows")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--gpu_memory_utilization", default="0.9", help="share of the GPU's memory for vLLM")
    parser.add_argument("--eval_python", default=str(ROOT / ".venv-eval/bin/python"))
    parser.add_argument("--vllm_python", default=str(ROOT / ".venv-vllm/bin/python"))
    args = parser.parse_args()
    for title, python, words, count in (
        ("swift eval, log-likelihood, pt", sys.executable, ["--eval_method", "loglikelihood", "--infer_backend", "pt"], args.questions),
        ("swift eval, lm-eval in process", args.eval_python, ["--eval_backend", "lm-eval"], args.questions),
        ("lm-eval, model hf (plain)", args.eval_python, None, args.questions),
        ("swift eval, 16 tokens, pt", sys.executable, ["--max_new_tokens", "16", "--infer_backend", "pt"], args.few),
        ("swift eval, 16 tokens, vLLM", args.vllm_python, ["--max_new_tokens", "16", "--infer_backend", "vllm", "--max_model_len", "1024", "--gpu_memory_utilization", args.gpu_memory_utilization], args.few),
    ):  # fmt: skip
        if not Path(python).exists():
            print(f"{title:34} not installed")
            continue
        try:
            found = plain(python, args, count) if words is None else ours(python, args, words, count)
        except subprocess.CalledProcessError as error:
            print(f"{title:34} failed: {(error.stderr or b'')[-1500:]!r}", flush=True)
            continue
        print(
            f"{title:34} {count / found['seconds']:8.2f} questions/s   accuracy {found['acc']:.3f}   {found['seconds']:.1f} s",
            flush=True,
        )


def ours(python: str, args: Any, words: list[str], count: int) -> dict[str, Any]:
    """One evaluation of ARC by `swift eval`; seconds of asking, without loading the model."""
    with tempfile.TemporaryDirectory() as place:
        model = ["--ckpt_dir", args.model] if Path(args.model).is_dir() else ["--model_type", args.model]
        command = [python, "-m", "megaswift", "eval", *model, "--eval_dataset", "arc", "--eval_data_dir", args.data, "--eval_limit", str(count),
                   "--eval_batch_size", str(args.batch), "--eval_output_dir", place, *words]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        [file] = Path(place).glob("*/*/eval_result.jsonl")
        details = json.loads(file.read_text(encoding="utf-8"))["details"]["arc"]
        return {"seconds": details["seconds"], "acc": details["accuracy"]}


def plain(python: str, args: Any, count: int) -> dict[str, Any]:
    """The same questions by the harness's own script and model class."""
    from megaswift.evaluation.items import limited
    from megaswift.evaluation.lm_eval_backend import record
    from megaswift.evaluation.readers import read_bench
    from megaswift.hub.locate import locate

    bench = limited(read_bench("arc", args.data), count)
    model = args.model if Path(args.model).is_dir() else str(locate(args.model).path)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.jsonl"
        file.write_text("".join(json.dumps(record("arc", item)) + "\n" for item in bench.items), encoding="utf-8")
        done = subprocess.run(
            [python, "-c", PLAIN, model, str(file), str(args.batch), place],
            check=True,
            capture_output=True,
            text=True,
            cwd=place,
        )
        return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
