"""The conversation in the terminal: `<<< ` asks, the answer streams, 50 dashes end it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TextIO

from megaswift.data.conversation import Conversation as DataConversation
from megaswift.inference.backends import Backend
from megaswift.inference.options import Answer, GenerationOptions, Message, PromptError
from megaswift.inference.results import ResultWriter
from megaswift.inference.text import clean_input, printable

RULE = "-" * 50
WORDS = (
    ("exit, quit", "end the conversation (also Ctrl-D)"),
    ("clear", "forget the conversation"),
    ("reset-system", "set another system prompt and forget the conversation"),
    ("multi-line", "questions of several lines, each ended by #"),
    ("single-line", "questions of one line again"),
    ("adapter NAME", "let another of several adapters answer; adapter alone: the model itself"),
    ("Ctrl-C", "stop an answer"),
)

Command = Literal["exit", "clear", "reset-system", "multi-line", "single-line"]
_COMMANDS: dict[str, Command] = {
    "exit": "exit",
    "quit": "exit",
    "clear": "clear",
    "reset-system": "reset-system",
    "multi-line": "multi-line",
    "single-line": "single-line",
}


class Terminal:
    """Lines in, text out; the same for a person at a terminal and for a pipe.

    A person gets line editing (Chinese and other wide characters included). A pipe gets no control codes, and its lines
    are repeated after the prompt, so that the output reads like the conversation.

    Attributes:
        person: whether somebody sits there.
    """

    def __init__(self, source: TextIO | None = None, output: TextIO | None = None) -> None:
        self._in, self._out = source or sys.stdin, output or sys.stdout
        self.person = self._in.isatty() and self._out.isatty() and self._in is sys.stdin
        for stream in (self._in, self._out):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        if self.person:
            _enable_line_editing()

    def ask(self, prompt: str) -> str:
        """One line, without its newline. Raises EOFError at the end of the input."""
        if self.person:
            return clean_input(input(prompt))
        self.say(prompt)
        line = self._in.readline()
        if not line:
            raise EOFError
        line = clean_input(line.rstrip("\r\n"))
        self.say(line + "\n")
        return line

    def say(self, text: str) -> None:
        """Show text at once."""
        self._out.write(text)
        self._out.flush()


def _enable_line_editing() -> None:
    """Backspace and cursor keys that know how wide a character is."""
    import locale

    if "utf" not in locale.nl_langinfo(locale.CODESET).lower():  # the line editor would cut characters into bytes
        variable = "LC_ALL" if os.environ.get("LC_ALL") else "LC_CTYPE"
        before = os.environ.get(variable, "C")
        for name in ("C.UTF-8", "en_US.UTF-8"):
            os.environ[variable] = name  # it asks the environment, at each line again
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, "")
                break
        else:
            os.environ[variable] = before
    with contextlib.suppress(ImportError):  # not on every platform; plain input() then
        import readline  # noqa: F401  input() uses it once it is imported


@dataclass
class Conversation:
    """One conversation: what was said, and how it is read, answered and kept.

    Attributes:
        system: system prompt; "" for none, None for the template's own.
        history: [question, answer] pairs so far.
        adapters: names of those that may answer.
        rows: what was asked and answered in all, as in the results file.
    """

    backend: Backend
    options: GenerationOptions
    terminal: Terminal
    system: str | None = None
    results: ResultWriter | None = None
    stream: bool = True
    multi_line: bool = False
    history: list[list[str]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    adapters: tuple[str, ...] = ()

    def run(self) -> list[dict[str, Any]]:
        """Talk until exit, quit or the end of the input."""
        while True:
            try:
                query = self._read_query()
                if query is None:
                    return self.rows
                if query.strip():
                    self._turn(query)
            except EOFError:
                self.terminal.say("\n")
                return self.rows
            except KeyboardInterrupt:
                self.terminal.say("\n(exit or Ctrl-D ends the conversation)\n")

    def _read_query(self) -> str | None:
        """The next question; "" when a word was obeyed; None to end."""
        line = self.terminal.ask("<<<[M] " if self.multi_line else "<<< ")
        if self.adapters and line.split()[:1] == ["adapter"] and self._switched(line.split()[1:]):
            return ""
        word = _COMMANDS.get(line.strip().removesuffix("#").strip().lower() if self.multi_line else line.strip().lower())
        if word is None:
            return self._read_more(line) if self.multi_line else line
        if word == "exit":
            return None
        if word == "clear":
            self._forget("The conversation is forgotten.")
        elif word == "reset-system":
            text = self.terminal.ask("<<<[S] ")
            self.system = text if text.strip() else None
            self._forget("The system prompt is set." if self.system else "The system prompt is the model's own again.")
        else:
            self.multi_line = word == "multi-line"
            self.terminal.say("End a question with #; single-line goes back.\n" if self.multi_line else "")
        return ""

    def _switched(self, words: list[str]) -> bool:
        """Let another adapter answer from now on; False where the line names none and is a question."""
        if words and (len(words) > 1 or words[0] not in self.adapters):
            return False
        self.options = replace(self.options, adapter=words[0] if words else None)
        self._forget(f"{words[0] if words else 'The model itself'} answers from now on; the conversation is forgotten.")
        return True

    def _read_more(self, line: str) -> str:
        """The rest of a question of several lines, up to the line that ends with #, or to the end of the input."""
        lines = [line]
        while not lines[-1].rstrip().endswith("#"):
            try:
                lines.append(self.terminal.ask(""))
            except EOFError:
                return "\n".join(lines)
        lines[-1] = lines[-1].rstrip()[:-1]
        return "\n".join(lines)

    def _forget(self, what: str) -> None:
        self.history = []
        self.terminal.say(f"{what}\n")

    def _turn(self, query: str) -> None:
        messages = messages_of(self.system, self.history, query)
        # Each turn has its own seed: the same question again may get another answer, the same session gets the same ones.
        seed = None if self.options.seed is None else self.options.seed + len(self.rows)
        try:
            answer = show_answer(self.backend, messages, replace(self.options, seed=seed), self.terminal, stream=self.stream)
        except PromptError as error:
            self.terminal.say(f"{error.text()}\n")
            return
        self.terminal.say(f"{RULE}\n")
        if answer.finish == "interrupted" and not answer.text:
            return  # stopped before it began
        row = {
            "system": self.backend.prompts.system_text(self.system),
            "query": query,
            "response": answer.text,
            "history": [list(pair) for pair in self.history],
        }
        self.rows.append(row)
        self.history.append([query, answer.text])
        if self.results is not None:
            self.results.write(row)


def messages_of(system: str | None, history: list[list[str]], query: str) -> list[Message]:
    """A conversation as chat messages; system None means that the template decides, "" that there is none."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": query}]


def show_answer(
    backend: Backend,
    messages: Sequence[Message] | DataConversation,
    options: GenerationOptions,
    terminal: Terminal,
    *,
    stream: bool,
) -> Answer:
    """Generate one answer and show it, ended by a newline. Ctrl-C ends the answer and keeps what there is."""
    pieces = backend.stream(messages, options)
    live, note = stream and options.num_beams == 1, ""
    try:
        for piece in pieces:
            if live:
                terminal.say(printable(piece))
    except KeyboardInterrupt:
        note = " (stopped)"
    finally:
        pieces.stop()
    answer = pieces.answer
    if not live:
        terminal.say(printable(answer.text))
    if answer.finish == "length" and not note:
        note = f" (ended after {answer.tokens} tokens)"
    terminal.say(f"{note}\n")
    return answer
