"""EleutherAI's harness over our questions: its task files, its prompts and its metrics; only where the rows lie is ours."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megaswift.errors import UserError
from megaswift.evaluation.answers import AnswerStore, answer_key
from megaswift.evaluation.items import LETTERS, Bench, Item, by_subset
from megaswift.evaluation.run import BenchResult, Settings

_TASK_FILES = {
    "arc": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "mmlu": "mmlu/default/mmlu_{}.yaml",
    "ceval": "ceval/ceval-valid_{}.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}


def check_lm_eval(benches: list[Bench]) -> None:
    """Raise UserError where the harness is not installed or does not have a benchmark."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "lm-eval is not installed.", where="--eval_backend lm-eval", fix="in the checkout: pip install '.[lm-eval]'"
        )
    for bench in benches:
        if bench.custom:
            raise UserError(
                f"{bench.name} is an own benchmark, which lm-eval does not know.", where="--eval_backend", fix="use Native"
            )


def run_lm_eval(backend: Any, model_key: str, bench: Bench, settings: Settings, store: AnswerStore) -> BenchResult:
    """Let the harness evaluate a loaded model; arguments as in `run.run_bench`. Needs the pt backend.

    The harness gives its verdicts at the end, so an interrupted benchmark is asked again; finished ones are kept.
    """
    if not hasattr(backend, "model"):
        raise UserError("lm-eval needs the pt backend.", where="--infer_backend", fix="use --infer_backend pt")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # everything is local; without it the harness looks for a network
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from importlib.metadata import version

    title = f"lm-eval {version('lm_eval')}"
    result = BenchResult(bench, scored_by=title)
    limit = settings.options.max_new_tokens if settings.own_limit else None
    shots = {subset: _examples(bench, items, settings) for subset, items in by_subset(bench.items).items()}
    keys = [
        answer_key(model_key, bench.name, asdict(item), title, limit, backend.context, *map(asdict, shots[item.subset]))
        for item in bench.items
    ]
    known = [store.known(key) for key in keys]
    if all(known):
        result.rows = [row for row in known if row is not None]
        store.reused += len(result.rows)
    else:
        began = time.perf_counter()
        result.rows = _evaluate(backend, bench, settings, keys)
        result.asked, result.seconds = len(result.rows), time.perf_counter() - began
    result.version = str(result.rows[0].get("version", "")) if result.rows else ""
    for row in result.rows:
        store.write(row)
    if any("correct_norm" in row for row in result.rows):
        result.more["acc_norm"] = sum(bool(row.get("correct_norm")) for row in result.rows) / len(result.rows)
    return result


def _examples(bench: Bench, items: list[Item], settings: Settings) -> tuple[Item, ...]:
    """Solved examples of a subset: the harness shows the same before each of its questions."""
    return bench.common_examples(items, settings.few_shot) if settings.few_shot else ()


def _evaluate(backend: Any, bench: Bench, settings: Settings, keys: list[str]) -> list[dict[str, Any]]:
    import lm_eval
    from datasets import disable_progress_bars
    from lm_eval.models.huggingface import HFLM

    disable_progress_bars()
    model = HFLM(
        pretrained=backend.model,
        tokenizer=backend.tokenizer,
        batch_size=settings.batch_size,
        max_length=backend.context,
    )
    with tempfile.TemporaryDirectory(prefix="megaswift-lm-eval-") as place:
        parts = by_subset(bench.items)
        files = [_write_task(Path(place), bench, subset, items, settings) for subset, items in parts.items()]
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[str(file) for file in files],
            num_fewshot=settings.few_shot,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for file, (subset, items) in zip(files, parts.items()):
        for sample in found["samples"][file.stem]:
            if sample["filter"] in ("none", "flexible-extract"):
                item = items[sample["doc_id"]]
                rows[subset, item.id] = _row(bench, item, sample) | {"version": found["versions"][file.stem]}
    return [rows[item.subset, item.id] | {"key": key} for item, key in zip(bench.items, keys)]


def _write_task(place: Path, bench: Bench, subset: str, items: list[Item], settings: Settings) -> Path:
    """A task file that includes the harness's own and says where our rows are."""
    import lm_eval.tasks
    import yaml

    own = Path(lm_eval.tasks.__file__).parent / _TASK_FILES[bench.name].format(subset)
    if not own.is_file():
        raise UserError(f"lm-eval has no task for {bench.name}, {subset}.", where=str(own), fix="use --eval_backend Native")
    splits = {bench.split: items}
    train = "dev" if bench.kind in ("mmlu", "ceval") else "train"
    if settings.few_shot:
        splits[train] = list(_examples(bench, items, settings))
    files = {}
    for split, group in splits.items():
        files[split] = str(place / f"{bench.name}-{subset}-{split}.jsonl")
        text = "".join(json.dumps(record(bench.kind, item), ensure_ascii=False) + "\n" for item in group)
        Path(files[split]).write_text(text, encoding="utf-8")
    task: dict[str, Any] = {
        "include": str(own),
        "task": f"{bench.name}-{subset}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(place / "cache")},  # not the user's: these rows are gone soon
        "training_split": train if settings.few_shot and train == "train" else None,
        "validation_split": "val" if bench.split == "val" else None,
        "fewshot_split": train if settings.few_shot else None,
    }
    if bench.kind == "gsm8k" and settings.own_limit:
        task["generation_kwargs"] = {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "max_gen_toks": settings.options.max_new_tokens,
        }
    file = place / f"{bench.name}-{subset}.yaml"
    file.write_text(yaml.safe_dump(task), encoding="utf-8")
    return file


def record(kind: str, item: Item) -> dict[str, Any]:
    """A question in the columns of the hub's data set, which the task files read."""
    if kind == "gsm8k":
        return {"question": item.question, "answer": f"{item.explanation}\n#### {item.answer}"}
    if kind == "mmlu":
        return {"question": item.question, "choices": list(item.choices), "answer": item.gold, "subject": item.subset}
    if kind == "ceval":
        return {"id": item.id, "question": item.question, **dict(zip("ABCD", item.choices)), "answer": item.answer}
    labels = list(LETTERS[: len(item.choices)])
    return {
        "id": item.id,
        "question": item.question,
        "choices": {"text": list(item.choices), "label": labels},
        "answerKey": item.answer,
    }


def _row(bench: Bench, item: Item, sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of the harness as a row of answers.jsonl."""
    row = {"benchmark": bench.name, "subset": item.subset, "id": item.id, "gold": item.answer, "finish": "stop", "tokens": 0}
    if item.choices:
        sums = [float(pair[0]) for pair in sample["filtered_resps"]]
        right = bool(sample["acc"])
        row |= {
            "prediction": LETTERS[max(range(len(sums)), key=lambda place: sums[place])],
            "log_likelihoods": [round(x, 4) for x in sums],
        }
        if "acc_norm" in sample:
            row["correct_norm"] = bool(sample["acc_norm"])
    else:
        right = bool(sample["exact_match"])
        row |= {"prediction": str(sample["filtered_resps"][0]), "response": str(sample["resps"][0][0])}
    return row | {"correct": right, "score": float(right)}
