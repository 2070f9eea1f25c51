"""Models beside each other on the same questions: intervals, paired tests, flipped questions; table and page."""

from __future__ import annotations

import html
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
from megaswift.weights.dtypes import FLAG_OF

_SHOWN = 200  # flipped questions on the page


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


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:.6rem 0 1.6rem}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left}"
    "td.n{font-variant-numeric:tabular-nums}.bar{position:relative;width:16rem;height:1.1rem;background:#f0f2f5}"
    ".bar i{position:absolute;top:.45rem;height:.2rem;background:#7aa5d8}.bar b{position:absolute;top:.2rem;width:.25rem;height:.7rem;"
    "background:#1f5fa8}.loud{background:#fde8e8;border-left:.4rem solid #c0392b;padding:.6rem 1rem}.yes{color:#176b2c}.no{color:#a02318}"
    "@media(prefers-color-scheme:dark){body{background:#16181c;color:#ddd}td,th{border-color:#333}.bar{background:#23262c}"
    ".loud{background:#3a1d1d}.yes{color:#6fd08c}.no{color:#ff8d80}}"
)


def _page(models: Sequence[Model], pairs: Sequence[Pair], flipped: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    parts = [f"<!doctype html><meta charset=utf-8><title>Comparison</title><style>{_STYLE}</style><h1>Comparison</h1>"]
    parts += [f"<p class=loud>{html.escape(text)}</p>" for text in warnings(pairs)]
    parts += [f"<p>{html.escape(text)}</p>" for text in notes]
    rows = "".join(
        f"<tr><td>{html.escape(model.title)}<td>{html.escape(model.place)}<td><code>{model.weights.stored[:16]}</code>"
        for model in models
    )
    parts.append(f"<table><tr><th>model<th>place<th>weights (SHA-256){rows}</table>")
    for number, result in enumerate(models[0].results):
        parts.append(_bench_part(result.bench, number, models, [pair for pair in pairs if pair.bench == result.bench.name]))
    parts.append(f"<h2>Questions that flipped: {len(flipped)}</h2>")
    parts += [_flip_part(row) for row in flipped[:_SHOWN]]
    if len(flipped) > _SHOWN:
        parts.append(f"<p>{len(flipped) - _SHOWN} more are in comparison.json.</p>")
    return "\n".join(parts) + "\n"


def _bench_part(bench: Bench, number: int, models: Sequence[Model], pairs: Sequence[Pair]) -> str:
    result = models[0].results[number]
    head = f"<h2>{html.escape(bench.name)}</h2><p>{len(result.rows)} of {bench.total} questions; {html.escape(result.scored_by)}</p>"
    rows = []
    for model in models:
        own = model.results[number]
        low, high = wilson(sum(row["score"] for row in own.rows), len(own.rows))
        bar = (
            f"<div class=bar><i style='left:{low:.2%};width:{high - low:.2%}'></i><b style='left:{own.accuracy:.2%}'></b></div>"
        )
        rows.append(f"<tr><td>{html.escape(model.title)}<td>{bar}<td class=n>{html.escape(accuracy_text(own))}")
    tests = "".join(
        f"<tr><td>{html.escape(pair.second)} &minus; {html.escape(pair.first)}<td colspan=2>{html.escape(pair_text(pair))}"
        for pair in pairs
    )
    return f"{head}<table><tr><th>model<th>0 to 100 %<th>accuracy, 95 % interval{''.join(rows)}{tests}</table>"


def _flip_part(row: dict[str, Any]) -> str:
    choices = "".join(f"<br>{letter}. {html.escape(choice)}" for letter, choice in zip("ABCDEFGHIJ", row["choices"]))
    answers = "".join(
        f"<li class={'yes' if answer['correct'] else 'no'}>{html.escape(title)}: {html.escape(str(answer['prediction'])[:300] or '(none)')}"
        for title, answer in row["answers"].items()
    )
    head = f"{row['benchmark']}, {row['subset']} {row['id']}"
    return (
        f"<details><summary>{html.escape(head)}: {html.escape(row['question'][:100])}</summary>"
        f"<p>{html.escape(row['question'])}{choices}</p><p>right: {html.escape(row['gold'])}</p><ul>{answers}</ul></details>"
    )
