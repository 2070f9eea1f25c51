"""One model through the benchmarks: what is known already is taken, the rest is asked in batches and judged at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from megaswift import __version__
from megaswift.errors import UserError
from megaswift.evaluation.answers import AnswerStore, answer_key
from megaswift.evaluation.evalscope_scorer import EvalScopeScorer
from megaswift.evaluation.items import LETTERS, Bench, Item
from megaswift.evaluation.scoring import Asked, OwnScorer, Scorer, Verdict
from megaswift.inference.options import Answer, GenerationOptions, PromptError
from megaswift.inference.thoughts import apart, opens_thought


@dataclass(frozen=True)
class Settings:
    """How questions are asked.

    Attributes:
        options: decoding; max_new_tokens is replaced by the scorer's unless `own_limit`, with room for thoughts where the
            chat template has any.
        method: generate or loglikelihood.
        few_shot, batch_size, seed: as the options say.
        system: system prompt; None for the template's own.
        own_limit: the user gave --max_new_tokens.
    """

    options: GenerationOptions
    method: str = "generate"
    few_shot: int = 0
    batch_size: int = 8
    seed: int = 42
    system: str | None = None
    own_limit: bool = False


@dataclass
class BenchResult:
    """The answers of one model to one benchmark.

    Attributes:
        bench: the questions.
        rows: as in answers.jsonl, in the order of the questions.
        scored_by, version: who judged.
        seconds: spent on this benchmark; answers taken from earlier evaluations cost none.
        asked: questions that were really asked now.
        limit: most tokens of an answer; 0 where none is generated.
        more: further figures, such as acc_norm.
    """

    bench: Bench
    rows: list[dict[str, Any]] = field(default_factory=list)
    scored_by: str = ""
    version: str = ""
    seconds: float = 0.0
    asked: int = 0
    limit: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def correct(self) -> list[bool]:
        """Right or wrong, question by question."""
        return [bool(row["correct"]) for row in self.rows]

    @property
    def accuracy(self) -> float:
        """Share of right answers; for own open questions the mean overlap with the right text."""
        return sum(row["score"] for row in self.rows) / max(len(self.rows), 1)

    def count(self, finish: str) -> int:
        """Answers that ended in one way: stop, length, too_long."""
        return sum(row.get("finish") == finish for row in self.rows)

    @property
    def thoughts_cut(self) -> int:
        """Answers that the length limit cut within their thoughts, so that nothing was answered."""
        return sum(bool(row.get("thought_cut")) for row in self.rows)


THOUGHTS = 8192  # tokens beside the answer's own, where a chat template has thoughts: those about mathematics take thousands
_WRONG = Verdict("", False, 0.0)
Tell = Callable[[str, int, int, float], None]  # benchmark, done, of, seconds


def run_bench(
    backend: Any, model_key: str, bench: Bench, settings: Settings, store: AnswerStore, tell: Tell | None = None
) -> BenchResult:
    """Ask a model the questions of a benchmark.

    Args:
        backend: a loaded model.
        model_key: hash of its weights; answers are only taken from an evaluation of the same ones.
        store: keeps each answer as soon as it is there.
        tell: hears how far it is.

    Questions that do not fit the context count as wrong ("too_long"). Ctrl-C keeps what is done.
    """
    likelihood = settings.method == "loglikelihood" and not bench.generated
    work: _Work = _Likelihoods(backend, bench, settings) if likelihood else _Generated(backend, bench, settings)
    result = BenchResult(bench, scored_by=work.title, version=work.version, limit=work.limit)
    keys = [answer_key(model_key, bench.name, item.id, work.identity(place)) for place, item in enumerate(bench.items)]
    rows: dict[int, dict[str, Any]] = {}
    for place, key in enumerate(keys):
        row = store.known(key)
        if row is not None and row.get("gold") == bench.items[place].answer:
            rows[place] = row
            store.write(row)
            store.reused += 1
    waiting = [place for place in range(len(bench.items)) if place not in rows]
    began = time.perf_counter()
    for place, values in work.run(waiting):
        item = bench.items[place]
        row = {"benchmark": bench.name, "subset": item.subset, "id": item.id, "key": keys[place], "gold": item.answer, **values}
        rows[place] = row
        store.write(row)
        if tell is not None:
            tell(bench.name, len(rows), len(bench.items), time.perf_counter() - began)
    result.rows = [rows[place] for place in range(len(bench.items))]
    result.asked, result.seconds = len(waiting), time.perf_counter() - began
    if likelihood and bench.kind == "arc":  # letters all have the same length
        result.more["acc_norm"] = sum(row["correct_norm"] for row in result.rows) / max(len(result.rows), 1)
    return result


def thinks(backend: Any) -> bool:
    """Whether the chat template has thoughts, or begins one for the model: then answers need room for them."""
    return backend.prompts.template.thinks or opens_thought(
        backend.tokenizer, backend.prompts.ids([{"role": "user", "content": "x"}])
    )


class _Work:
    """How one benchmark is asked: by generation or by log-likelihood."""

    title: str
    version: str
    limit = 0

    def identity(self, place: int) -> Any:
        """What an answer depends on beside the weights."""
        raise NotImplementedError

    def run(self, waiting: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Answers and verdicts, as they are done."""
        raise NotImplementedError


class _Generated(_Work):
    def __init__(self, backend: Any, bench: Bench, settings: Settings) -> None:
        self._scorer: Scorer = make_scorer(bench, settings.few_shot, settings.seed)
        self.title, self.version = self._scorer.title, self._scorer.version
        room = self._scorer.max_new_tokens + (THOUGHTS if thinks(backend) else 0)
        self.limit = settings.options.max_new_tokens if settings.own_limit else room
        self._options = replace(settings.options, max_new_tokens=self.limit, seed=settings.seed)
        self._backend, self._batch = backend, settings.batch_size
        self._asked: list[Asked] = self._scorer.asked()
        system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
        self._messages = [system + asked.messages for asked in self._asked]
        self._prompts: list[list[int] | None] = [self._ids(messages) for messages in self._messages]

    def _ids(self, messages: list[dict[str, Any]]) -> list[int] | None:
        try:
            return self._backend.prompt_ids(messages, self._options)
        except PromptError:
            return None

    def identity(self, place: int) -> Any:
        decoding = vars(self._options) | {"seed": self._options.seed if self._options.samples else None}
        backend = [type(self._backend).__name__, self._backend.context]
        return [self.title, self.version, "thoughts apart", self._messages[place], self._prompts[place], decoding, *backend]

    def run(self, waiting: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        fitting = []
        for place in waiting:
            if self._prompts[place] is None:
                yield place, _row(Answer("", 0, 0, "length"), "too_long", _WRONG)
            else:
                fitting.append(place)
        prompts = [prompt for place in fitting if (prompt := self._prompts[place]) is not None]
        if not prompts:
            return
        with self._scorer.judging() as judge:
            for number, answer in self._backend.answer_all(prompts, self._options, batch_size=self._batch):
                place = fitting[number]
                said, unfinished = apart(answer.text, opens_thought(self._backend.tokenizer, prompts[number]))
                verdict = judge(self._asked[place], said) if said else _WRONG
                cut = unfinished and answer.finish == "length"
                yield place, _row(answer, answer.finish, verdict) | ({"thought_cut": True} if cut else {})


def _row(answer: Answer, finish: str, verdict: Verdict) -> dict[str, Any]:
    """An answer and its verdict, as in answers.jsonl."""
    return {
        "prediction": verdict.prediction,
        "correct": verdict.correct,
        "score": verdict.score,
        "finish": finish,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "response": answer.text,
    }


class _Likelihoods(_Work):
    version = "1"

    def __init__(self, backend: Any, bench: Bench, settings: Settings) -> None:
        from megaswift.evaluation.likelihood import LikelihoodScorer, texts

        if not hasattr(backend, "model"):
            raise UserError(
                "log-likelihoods need the pt backend.", where="--eval_method loglikelihood", fix="use --infer_backend pt"
            )
        self.title = f"megaswift {__version__}, log-likelihood"
        self._bench, self._batch = bench, settings.batch_size
        self._texts = [texts(bench, item, settings.few_shot) for item in bench.items]
        self._context = backend.context
        self._scorer = LikelihoodScorer(backend.model, backend.tokenizer, backend.context)

    def identity(self, place: int) -> Any:
        return [self.title, self.version, self._texts[place], self._context]

    def run(self, waiting: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, found in self._scorer.score_all([self._texts[place] for place in waiting], self._batch):
            item: Item = self._bench.items[waiting[number]]
            yield (
                waiting[number],
                {
                    "prediction": LETTERS[found.best],
                    "correct": found.best == item.gold,
                    "score": float(found.best == item.gold),
                    "correct_norm": found.best_normalised == item.gold,
                    "finish": "stop",
                    "tokens": 0,
                    "prompt_tokens": found.tokens,
                    "log_likelihoods": [round(value, 4) for value in found.sums],
                },
            )


def make_scorer(bench: Bench, few_shot: int, seed: int) -> Scorer:
    """EvalScope for its own benchmarks where it is installed; ours for custom ones and everywhere else."""
    if not bench.custom and find_spec("evalscope") is not None:
        return EvalScopeScorer(bench, few_shot, seed)
    return OwnScorer(bench, few_shot)
