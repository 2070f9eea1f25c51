"""Models beside each other on the same questions: intervals, paired tests, flipped questions; table and page."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaswift.evaluation.items import Bench
from megaswift.evaluation.run import BenchResult
from megaswift.evaluation.statistics import Paired, paired, wilson
from megaswift.evaluation.weights import WeightsHashes, is_rounded
from megaswift.report import html
from megaswift.report.html import Markup
from megaswift.weights.dtypes import FLAG_OF

_SHOWN = 200  # flipped questions on the page
_BREAK = Markup("<br>")


@dataclass(frozen=True)
class Model:
    """One of the models that are compared.

    Attributes:
        title: as in tables.
        place: directory or name.
        weights: their hashes.
        results: one a benchmark, in the same order for all models.
    """

    title: str
    place: str
    weights: WeightsHashes
    results: tuple[BenchResult, ...]


@dataclass(frozen=True)
class Pair:
    """Two models on one benchmark, the second against the first."""

    bench: str
    first: str
    second: str
    same_weights: bool  # in the precision that they were asked in
    paired: Paired

    @property
    def broken(self) -> bool:
        """Equal weights that answered unequally: something is wrong with the conversion, the tokenizer or the machine."""
        return self.same_weights and self.paired.changed > 0


def pairs_of(models: Sequence[Model], seed: int) -> list[Pair]:
    """Every model against those before it, on every benchmark."""
    found = []
    for number, bench in enumerate(models[0].results):
        for first, second in itertools.combinations(models, 2):
            one, two = first.results[number], second.results[number]
            scores = [float(row["score"]) for row in one.rows], [float(row["score"]) for row in two.rows]
            changed = sum(_said(a) != _said(b) for a, b in zip(one.rows, two.rows, strict=True))
            result = paired(*scores, list(zip(one.correct, two.correct)), changed, seed)
            found.append(Pair(bench.bench.name, first.title, second.title, first.weights.asked == second.weights.asked, result))
    return found


def _said(row: dict[str, Any]) -> Any:
    """What must be the same for equal models: the answer's text, or the choice where there is no text."""
    return row.get("response", row["prediction"])


def roundings(models: Sequence[Model]) -> list[str]:
    """For models that differ in nothing but the precision of their weights: why answers may differ, and what asks both alike."""
    found = []
    for first, second in itertools.combinations(models, 2):
        if first.weights.asked == second.weights.asked:
            continue
        for rounded, whole in ((second, first), (first, second)):
            if is_rounded(rounded.weights, whole.weights):
                precision = str(rounded.weights.precision)
                found.append(
                    f"{rounded.title} has the weights of {whole.title}, rounded to {precision}: answers may differ; --dtype"
                    f" {FLAG_OF.get(precision, precision)} asks both the same"
                )
                break
    return found


def flips(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Questions that some models answer right and others wrong, or, with equal weights, differently at all."""
    found = []
    for number, result in enumerate(models[0].results):
        for place, item in enumerate(result.bench.items):
            rows = [model.results[number].rows[place] for model in models]
            if len({bool(row["correct"]) for row in rows}) > 1:
                answers = {
                    model.title: {"prediction": row["prediction"], "correct": row["correct"]}
                    for model, row in zip(models, rows)
                }
                found.append(
                    {"benchmark": result.bench.name, "subset": item.subset, "id": item.id, "question": item.question,
                     "choices": list(item.choices), "gold": item.answer, "answers": answers}
                )  # fmt: skip
    return found


def lines(models: Sequence[Model], pairs: Sequence[Pair], notes: Sequence[str] = ()) -> list[str]:
    """The comparison as plain text: one line a benchmark and model, then the pairs, notes, and what must not be overlooked."""
    width = max(len(model.title) for model in models)
    out = []
    for number, result in enumerate(models[0].results):
        out.append(f"{result.bench.name} ({len(result.rows)} of {result.bench.total} questions, {result.scored_by})")
        for model in models:
            out.append(f"  {model.title:<{width}}  {accuracy_text(model.results[number])}")
        for pair in pairs:
            if pair.bench == result.bench.name:
                out.append(f"  {pair.second} - {pair.first}: {pair_text(pair)}")
    return [*out, *notes, *(f"WARNING: {text}" for text in warnings(pairs))]


def accuracy_text(result: BenchResult) -> str:
    """Accuracy with its interval, and what happened to answers on the way."""
    low, high = wilson(sum(row["score"] for row in result.rows), len(result.rows))
    text = f"{result.accuracy:6.1%}  [{low:.1%}, {high:.1%}]"
    notes = [f"{name} {value:.1%}" for name, value in result.more.items() if isinstance(value, float)]
    unread = sum(not row["prediction"] for row in result.rows)
    cut, long = result.count("length"), result.count("too_long")
    counts = (
        (unread, "without a readable answer"),
        (cut, "cut at the length limit"),
        (result.thoughts_cut, "of these within their thoughts"),
        (long, "too long to ask"),
    )
    for count, what in counts:
        if count:
            notes.append(f"{count} {what}")
    return text + (f"  ({'; '.join(notes)})" if notes else "")


def pair_text(pair: Pair) -> str:
    """One paired difference in words."""
    found = pair.paired
    if found.changed == 0:
        return "every answer is the same"
    verdict = "significant" if found.significant else "not significant"
    return (
        f"{found.difference:+.1%} [{found.low:+.1%}, {found.high:+.1%}], {found.gained} gained, {found.lost} lost,"
        f" McNemar p = {found.p:.3g} ({verdict}), {found.changed} {'answer differs' if found.changed == 1 else 'answers differ'}"
    )


def warnings(pairs: Sequence[Pair]) -> list[str]:
    """What must be said loudly."""
    return [
        f"{pair.second} has the weights of {pair.first} in the precision that both were asked in, but answers on {pair.bench} differ ({pair.paired.changed}):"
        " the folders' tokenizers, templates or configs differ, or the machine does not compute the same twice"
        for pair in pairs
        if pair.broken
    ]


def write_comparison(directory: Path, models: Sequence[Model], pairs: Sequence[Pair], notes: Sequence[str] = ()) -> Path:
    """comparison.json and comparison.html; returns the page."""
    flipped = flips(models)
    content = {
        "models": [
            {
                "title": model.title,
                "place": model.place,
                "weights_sha256": model.weights.stored,
                "weights_asked_sha256": model.weights.asked,
            }
            for model in models
        ],
        "accuracy": {
            result.bench.name: {model.title: model.results[number].accuracy for model in models}
            for number, result in enumerate(models[0].results)
        },
        "pairs": [asdict(pair) | {"significant": pair.paired.significant, "broken": pair.broken} for pair in pairs],
        "notes": list(notes),
        "flipped": flipped,
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (directory / "comparison.json").write_text(text + "\n", encoding="utf-8")
    page = directory / "comparison.html"
    page.write_text(_page(models, pairs, flipped, notes), encoding="utf-8")
    return page


def _page(models: Sequence[Model], pairs: Sequence[Pair], flipped: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    hashes = [[model.title, model.place, html.element("code", model.weights.stored[:16])] for model in models]
    more = len(flipped) - _SHOWN
    return html.page(
        "Comparison",
        *(html.paragraph(text, kind="loud") for text in warnings(pairs)),
        *map(html.paragraph, notes),
        html.table(["model", "place", "weights (SHA-256)"], hashes),
        *(_bench_part(result.bench, number, models, pairs) for number, result in enumerate(models[0].results)),
        html.heading(f"Questions that flipped: {len(flipped)}"),
        *map(_flip_part, flipped[:_SHOWN]),
        *([html.paragraph(f"{more} more are in comparison.json.")] if more > 0 else []),
    )


def _bench_part(bench: Bench, number: int, models: Sequence[Model], pairs: Sequence[Pair]) -> Markup:
    result = models[0].results[number]
    rows: list[list[Any]] = []
    for model in models:
        own = model.results[number]
        low, high = wilson(sum(row["score"] for row in own.rows), len(own.rows))
        rows.append([model.title, html.interval(low, high, own.accuracy), accuracy_text(own)])
    rows += [[f"{pair.second} \u2212 {pair.first}", pair_text(pair)] for pair in pairs if pair.bench == bench.name]
    return html.inside(
        html.heading(bench.name),
        html.paragraph(f"{len(result.rows)} of {bench.total} questions; {result.scored_by}"),
        html.table(["model", "0 to 100 %", "accuracy, 95 % interval"], rows),
    )


def _flip_part(row: dict[str, Any]) -> Markup:
    choices = [html.inside(_BREAK, f"{letter}. {choice}") for letter, choice in zip("ABCDEFGHIJ", row["choices"])]
    answers = [
        html.element(
            "li", f"{title}: {str(answer['prediction'])[:300] or '(none)'}", kind="good" if answer["correct"] else "bad"
        )
        for title, answer in row["answers"].items()
    ]
    return html.details(
        f"{row['benchmark']}, {row['subset']} {row['id']}: {row['question'][:100]}",
        html.paragraph(row["question"], *choices),
        html.paragraph(f"right: {row['gold']}"),
        html.element("ul", *answers),
    )
