"""A file of questions: read, answered in batches, shown, and kept row by row."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from megaswift.config.options import InferArguments
from megaswift.data.conversation import NOT_TEXT, BadRow, Conversation, Message
from megaswift.data.encode import recipe_of
from megaswift.data.encoding import refuse_encoding
from megaswift.data.pipeline import Pipeline, Recipe
from megaswift.data.preference import says_bad
from megaswift.data.read import decode
from megaswift.data.resolve import Dataset, resolve
from megaswift.data.rows import RESPONSE_NAMES
from megaswift.data.sampling import sample_validation, split_and_sample
from megaswift.data.spec import parse_specs
from megaswift.errors import DataError
from megaswift.inference.backends import Backend
from megaswift.inference.chat import RULE, Terminal, show_answer
from megaswift.inference.options import Answer, GenerationOptions, PromptError
from megaswift.inference.results import ResultWriter
from megaswift.inference.text import printable

QUIET_FROM = 100  # questions; so many are not printed one by one
PLAIN = Recipe()  # columns as they are
_MEDIA = ("images?", "image_url", "videos?", "audios?", "input_audio")  # columns, and kinds of content blocks
_SHOWN = 5  # bad rows named one by one


@dataclass(frozen=True)
class Question:
    """One row to answer.

    Attributes:
        conversation: ends with the question; a system message is there only where the row or --system gives one.
        label: the answer that the row brings, or None.
        where: file and line, for messages.
    """

    conversation: Conversation
    label: str | None
    where: str

    @property
    def query(self) -> str:
        """The text that is asked."""
        return self.conversation.messages[-1].content

    @property
    def system(self) -> str | None:
        """The system prompt; "" for none, None for the template's own."""
        first = self.conversation.messages[0]
        return first.content if first.role == "system" else None

    @property
    def history(self) -> list[list[str]]:
        """Earlier turns as [question, answer]."""
        turns = [message for message in self.conversation.messages[:-1] if message.role != "system"]
        return [[turns[place].content, turns[place + 1].content] for place in range(0, len(turns) - 1, 2)]


def question_of(row: dict[str, Any], where: str = "", system: str | None = None, recipe: Recipe = PLAIN) -> Question:
    """The question in a row of any shape that training data may have; an answer in it becomes the label.

    Args:
        row: column name to value; the answer may be missing or empty.
        system: system prompt of rows that bring none.
        recipe: how the columns of this dataset are read.

    Raises BadRow for a row without a question.
    """
    name = {column: recipe.columns.get(column, column) for column in row}
    row = {
        column: value
        for column, value in row.items()
        if value is not None and not (name[column] in RESPONSE_NAMES and value == "")
    }
    read = {name[column] for column in row}
    unanswered = "instruction" in read and not read.intersection(RESPONSE_NAMES)
    conversation = _conversation(row | {"output": "?"} if unanswered else row, recipe, answered=False)
    if conversation.text is not None:
        if "text" not in read:
            raise BadRow("no question", f"columns: {', '.join(row)}")
        conversation = Conversation([Message("user", conversation.text)])
    messages, label = list(conversation.messages), None
    if messages[-1].role == "assistant":
        label = None if unanswered or says_bad(row) else messages[-1].content
        messages.pop()
    if not messages or messages[-1].role not in ("user", "tool"):
        raise BadRow("no question", "no user turn stands at the end")
    if system is not None and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return Question(replace(conversation, messages=messages), label, where)


def read_questions(args: InferArguments) -> list[Question]:
    """The questions that the options name: at most --show_dataset_sample of them, in their order.

    These are the rows of --val_dataset; without it the validation rows that training takes from --dataset.
    Bad rows are counted, and the first ones shown, on stderr. Raises DataError when no question is left, with --strict
    for the first bad row.
    """
    questions: list[Question] = []
    bad = _BadRows(args.strict)
    total = 0
    for dataset, numbers in _drawn(args):
        recipe = recipe_of(dataset, args)
        total += len(numbers)
        for number in numbers:
            if 0 <= args.show_dataset_sample <= len(questions):
                break
            where = dataset.source.where(number)
            with bad.counted(where):
                questions.append(question_of(decode(dataset.source.raw(number)), where, args.system, recipe))
    bad.tell()
    if not questions:
        where, fix = " ".join(args.val_dataset or args.dataset), 'a row needs a question, for example {"query": "Who are you?"}'
        raise DataError("no question is left to answer." if bad.lines else "there is no question.", where=where, fix=fix)
    if len(questions) + len(bad.lines) < total:
        _note(f"{len(questions)} of {total} questions (--show_dataset_sample -1 for all)")
    return questions


class _BadRows:
    """Rows that are no questions: counted and told, or an error with --strict."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self.lines: list[str] = []

    @contextlib.contextmanager
    def counted(self, where: str) -> Iterator[None]:
        """Turn a BadRow of the block into a count, or into a DataError."""
        try:
            yield
        except BadRow as error:
            refuse_encoding(error, where)
            if self._strict:
                raise DataError(
                    f"bad row: {error}.", where=where, fix="mend the row, or leave --strict out to skip such rows"
                ) from error
            self.lines.append(f"{where}: {error}")

    def tell(self) -> None:
        """Name the first bad rows on stderr."""
        if self.lines:
            _note(f"left out, no question in them: {len(self.lines)}" + "".join(f"\n  {line}" for line in self.lines[:_SHOWN]))


def _drawn(args: InferArguments) -> Iterator[tuple[Dataset, Sequence[int]]]:
    """Each dataset with the numbers of its rows that are asked."""
    seed = args.seed if args.dataset_seed is None else args.dataset_seed
    for spec in parse_specs(args.val_dataset or args.dataset):
        dataset = resolve(spec, args.custom_dataset_info)
        if args.val_dataset and spec.count is None:
            yield dataset, range(len(dataset.source))
        elif args.val_dataset:
            usable = _usable(dataset, args, answered=False)
            yield dataset, [usable[place] for place in sample_validation(len(usable), spec.count, seed, spec.text)]
        elif args.dataset_test_ratio > 0:  # the same rows that training held out
            usable = _usable(dataset, args, answered=True)
            if usable:
                _, held_out = split_and_sample(len(usable), spec.count, args.dataset_test_ratio, seed)
                yield dataset, [usable[place] for place in held_out]


def _usable(dataset: Dataset, args: InferArguments, *, answered: bool) -> list[int]:
    """Numbers of the rows from which #N and the validation share are drawn."""
    recipe, numbers = recipe_of(dataset, args), []
    for number in range(len(dataset.source)):
        with contextlib.suppress(BadRow):
            row = decode(dataset.source.raw(number))
            _ = _conversation(row, recipe, answered=True) if answered else question_of(row, recipe=recipe)
            numbers.append(number)
    return numbers


def _conversation(row: dict[str, Any], recipe: Recipe, *, answered: bool) -> Conversation:
    """A row as training reads it. Reading needs none of the template and lengths that a whole Pipeline holds."""
    try:
        return Pipeline.__new__(Pipeline).conversation(row, recipe, answered=answered)
    except BadRow as error:
        if error.reason != NOT_TEXT:
            raise
        named = re.search(rf'"({"|".join(_MEDIA)})"', json.dumps(row, default=str))
        raise BadRow(error.reason, f"{named.group(1) if named else 'it'} is not supported; the model reads text only") from None


@dataclass
class _Run:
    """Questions on their way to answers; rows leave in the order of the questions."""

    backend: Backend
    questions: Sequence[Question]
    options: GenerationOptions
    terminal: Terminal
    results: ResultWriter | None

    def __post_init__(self) -> None:
        queries = [question.query for question in self.questions]
        self.rows: list[dict[str, Any]] = self.results.take_up(queries) if self.results is not None else []
        self.earlier = len(self.rows)  # answers that an earlier command left
        self.tokens = 0

    def keep(self, question: Question, answer: Answer) -> None:
        """Store one answer."""
        row = {
            "system": self.backend.prompts.system_text(question.system),
            "query": question.query,
            "response": answer.text,
            "history": question.history,
            "label": question.label,
        }
        self.rows.append(row)
        self.tokens += answer.tokens
        if self.results is not None:
            self.results.write(row)

    def show_question(self, question: Question) -> None:
        system = self.backend.prompts.system_text(question.system)
        lines = [f"[SYSTEM]{system}\n"] if system else []
        lines += [f"[QUERY]{earlier}\n[RESPONSE]{reply}\n" for earlier, reply in question.history]
        self.terminal.say(printable("".join(lines) + f"[QUERY]{question.query}\n[RESPONSE]"))

    def show_label(self, question: Question) -> None:
        label = f"[LABELS]{question.label}\n" if question.label is not None else ""
        self.terminal.say(printable(f"{label}{RULE}\n"))

    def stream_all(self) -> None:
        """One question after the other, each answer shown while it is made."""
        for number, question in enumerate(self.questions[self.earlier :], self.earlier):
            seed = None if self.options.seed is None else self.options.seed + number
            self.show_question(question)
            answer = show_answer(
                self.backend, question.conversation, replace(self.options, seed=seed), self.terminal, stream=True
            )
            if answer.finish == "interrupted":
                raise KeyboardInterrupt
            self.show_label(question)
            self.keep(question, answer)

    def batch_all(self, prompts: list[list[int]], batch_size: int, *, quiet: bool) -> None:
        """In batches of similar length; results are shown and stored in order, as far as they are complete."""
        waiting: dict[int, Answer] = {}
        done = 0
        questions, prompts = self.questions[self.earlier :], prompts[self.earlier :]
        seed = None if self.options.seed is None else self.options.seed + self.earlier
        with _Progress(len(prompts), shown=quiet) as progress:
            for place, answer in self.backend.answer_all(prompts, replace(self.options, seed=seed), batch_size=batch_size):
                waiting[place] = answer
                progress.add(answer.tokens)
                while done in waiting:
                    self._deliver(questions[done], waiting.pop(done), quiet)
                    done += 1

    def _deliver(self, question: Question, answer: Answer, quiet: bool) -> None:
        if not quiet:
            self.show_question(question)
            self.terminal.say(printable(answer.text) + "\n")
            self.show_label(question)
        self.keep(question, answer)


def answer_questions(
    backend: Backend,
    questions: Sequence[Question],
    options: GenerationOptions,
    *,
    batch_size: int = 1,
    stream: bool = True,
    results: ResultWriter | None = None,
) -> list[dict[str, Any]]:
    """Answer questions, show them (fewer than 100) or their progress, and return the rows of the results file.

    Questions that are too long, or that the chat template refuses, are left out and counted. Ctrl-C keeps what is done
    and is raised again.
    """
    prompts, kept = _fitting(backend, questions, options)
    quiet = len(kept) >= QUIET_FROM
    run, started = _Run(backend, kept, options, Terminal(), results), time.perf_counter()
    if run.earlier:
        _note(f"{run.earlier} of {len(kept)} questions are answered already, in {results.path if results else ''}")
    try:
        if stream and not quiet and batch_size == 1 and options.num_beams == 1:
            run.stream_all()
        else:
            run.batch_all(prompts, batch_size, quiet=quiet)
    except KeyboardInterrupt:
        _note(f"\nstopped: {len(run.rows)} of {len(kept)} questions are answered")
        raise
    seconds = max(time.perf_counter() - started, 1e-9)
    _note(
        f"{len(run.rows) - run.earlier} questions, {run.tokens} tokens in {seconds:.1f} s ({run.tokens / seconds:.1f} tokens/s)"
    )
    return run.rows


def _fitting(
    backend: Backend, questions: Sequence[Question], options: GenerationOptions
) -> tuple[list[list[int]], list[Question]]:
    """Prompts and questions, without the questions that cannot become a prompt."""
    prompts, kept, refused = [], [], []
    for question in questions:
        try:
            prompts.append(backend.prompt_ids(question.conversation, options))
            kept.append(question)
        except PromptError as error:
            refused.append((question.where, error))
    if refused:
        _note(
            f"left out, they cannot be asked: {len(refused)}"
            + "".join(f"\n  {where}: {error.what}" for where, error in refused[:_SHOWN])
        )
    if not kept:
        raise DataError(f"no question can be asked: {refused[0][1].what}", where=refused[0][0], fix=refused[0][1].fix)
    return prompts, kept


class _Progress:
    """A bar on stderr with questions, tokens/s and the time left; nothing where stderr is no terminal."""

    def __init__(self, total: int, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (
            TextColumn("answers"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self._task = self._bar.add_task("", total=total, speed="")
        self._tokens = 0

    def __enter__(self) -> Self:
        self._bar.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def add(self, tokens: int) -> None:
        """One answer of so many tokens is there."""
        self._tokens += tokens
        speed = self._tokens / max(time.perf_counter() - self._started, 1e-9)
        self._bar.update(self._task, advance=1, speed=f"{speed:,.0f} tokens/s")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
