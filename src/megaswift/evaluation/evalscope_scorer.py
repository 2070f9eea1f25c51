"""EvalScope in process: its prompts, its reading of answers, its metrics; the questions and the generation are ours.

EvalScope's own evaluator asks one question a thread. Here all prompts are known first, so that they are answered in
batches of similar length, in an order that does not depend on threads: two equal models then give equal answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

from megaswift.errors import DataError
from megaswift.evaluation.items import Bench, Item, by_subset
from megaswift.evaluation.judge_process import JudgeProcess
from megaswift.evaluation.scoring import Asked, Verdict

_NAMES = {"arc": "arc", "arc_easy": "arc", "mmlu": "mmlu", "ceval": "ceval", "gsm8k": "gsm8k"}


class EvalScopeScorer:
    """A benchmark of EvalScope over our questions.

    Args:
        bench: the questions.
        few_shot: solved examples before each.
        seed: of EvalScope's own choices.
    """

    def __init__(self, bench: Bench, few_shot: int, seed: int) -> None:
        _quiet()
        from evalscope.api.registry import get_benchmark
        from evalscope.config import TaskConfig

        name = _NAMES[bench.name]
        if few_shot:
            for items in by_subset(bench.items).values():
                bench.common_examples(items, few_shot)  # says by name what is missing; EvalScope only asserts
        subsets = list(by_subset(bench.items))
        config = TaskConfig(
            model="megaswift",
            datasets=[name],
            seed=seed,
            dataset_args={name: {"few_shot_num": few_shot, "subset_list": subsets}},
        )
        self._bench, self._few_shot, self._seed = bench, few_shot, seed
        self._adapter = get_benchmark(name, config)
        self._adapter.load = self._load  # its data come from hubs, one subset at a time; ours are read already
        self.title = f"evalscope {version('evalscope')}"
        self.version = str(getattr(self._adapter._benchmark_meta, "evaluation_version", None) or "v1.0")
        self.max_new_tokens = 512 if bench.kind == "gsm8k" else 256

    def asked(self) -> list[Asked]:
        """The questions as EvalScope words them."""
        try:
            loaded = self._adapter.load_dataset()
        except KeyError as error:
            raise DataError(f"EvalScope has no subject {error} in {self._bench.name}.", where=self._bench.source) from error
        waiting = {subset: iter(samples) for subset, samples in loaded.items()}
        found = [(item, next(waiting[item.subset])) for item in self._bench.items]
        return [Asked(item, _messages(sample), sample) for item, sample in found]

    def judge(self, asked: Asked, text: str) -> Verdict:
        """The verdict of EvalScope's own metric."""
        from evalscope.api.evaluator import TaskState
        from evalscope.api.model import ModelOutput

        output = ModelOutput.from_content(model="megaswift", content=text)
        state = TaskState(model="megaswift", sample=asked.handle, output=output, completed=True)
        score = self._adapter.calculate_metrics(state).score
        value = float(next(iter(score.value.values()), 0.0))
        return Verdict(str(score.extracted_prediction or ""), value >= 0.5, value)

    def judging(self) -> AbstractContextManager[Callable[[Asked, str], Verdict]]:
        """Letters are read here, mathematics in a process of its own (see `JudgeProcess`)."""
        if self._bench.kind != "gsm8k":
            return nullcontext(self.judge)
        small = replace(self._bench, items=self._bench.items[:1], shots={})  # the child gets each question with its answer
        return JudgeProcess(partial(EvalScopeScorer, small, 0, self._seed))

    def _load(self) -> tuple[Any, Any]:
        """What EvalScope's loader gives: samples by subset, and the solved examples."""
        from evalscope.api.dataset import DatasetDict, MemoryDataset

        questions = by_subset(self._bench.items)
        shots = {subset: list(self._shots(items)) for subset, items in questions.items()}

        def dataset(parts: dict[str, list[Item]]) -> Any:
            return DatasetDict({subset: MemoryDataset(self._samples(subset, items)) for subset, items in parts.items()})

        return dataset(questions), dataset(shots) if self._few_shot else None

    def _shots(self, items: list[Item]) -> tuple[Item, ...]:
        """Solved examples of a subset: EvalScope shows the same before each of its questions."""
        return self._bench.common_examples(items, self._few_shot) if self._few_shot else ()

    def _samples(self, subset: str, items: list[Item]) -> list[Any]:
        samples = []
        with self._adapter._temporary_attribute("current_subset_name", subset):
            for place, item in enumerate(items):
                sample = self._adapter.record_to_sample(_record(self._bench.kind, item))
                sample.id = sample.group_id = place
                samples.append(sample)
        return samples


def _record(kind: str, item: Item) -> dict[str, Any]:
    """A question in the columns of the hub's data set, which EvalScope reads."""
    if kind == "gsm8k":
        return {"question": item.question, "answer": f"{item.explanation}\n#### {item.answer}"}
    if kind == "mmlu":
        return {"question": item.question, "choices": list(item.choices), "answer": item.gold, "subject": item.subset}
    if kind == "ceval":
        letters = dict(zip("ABCD", item.choices))
        return {"id": item.id, "question": item.question, **letters, "answer": item.answer, "explanation": item.explanation}
    labels = list("ABCDEFGHIJ"[: len(item.choices)])
    return {
        "id": item.id,
        "question": item.question,
        "choices": {"text": list(item.choices), "label": labels},
        "answerKey": item.answer,
    }


def _messages(sample: Any) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.text} for message in sample.input]


def _quiet() -> None:
    """EvalScope's logger tells much that is not about the user's evaluation."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import evalscope  # noqa: F401
    for name in ("evalscope", "math_verify"):
        logging.getLogger(name).setLevel(logging.ERROR)
