"""The conversation: each word, history, several lines, the end of the input, Ctrl-C, odd bytes."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megaswift.inference.chat import RULE, Conversation, Terminal, messages_of
from megaswift.inference.options import Answer, GenerationOptions, PromptTooLongError
from megaswift.inference.results import ResultWriter


class FakeStream:
    """Pieces of a prepared answer; `interrupt_at` raises KeyboardInterrupt there, as Ctrl-C does."""

    def __init__(self, pieces: list[str], interrupt_at: int | None) -> None:
        self.pieces, self.interrupt_at, self.shown, self.stopped = pieces, interrupt_at, 0, False

    def __iter__(self):
        return self

    def __next__(self) -> str:
        if self.shown == self.interrupt_at:
            raise KeyboardInterrupt
        if self.shown == len(self.pieces):
            raise StopIteration
        self.shown += 1
        return self.pieces[self.shown - 1]

    def stop(self) -> None:
        self.stopped = True

    @property
    def answer(self) -> Answer:
        whole = self.shown == len(self.pieces)
        return Answer("".join(self.pieces[: self.shown]), 1, self.shown, "stop" if whole else "interrupted")


@dataclass
class FakeBackend:
    """Answers by repeating the question; remembers what it was asked."""

    asked: list = field(default_factory=list)
    interrupt_at: int | None = None
    last: FakeStream | None = None

    @property
    def prompts(self):
        return self

    def system_text(self, system: str | None) -> str | None:
        return "own" if system is None else system or None

    def stream(self, messages, options) -> FakeStream:
        self.asked.append((messages, options.seed))
        query = messages[-1]["content"]
        if query == "long":
            raise PromptTooLongError("the prompt has 9 tokens, but at most 8 are possible.", fix="clear")
        self.last = FakeStream(["re: ", query], self.interrupt_at)
        return self.last


def talk(
    typed: str, *, system: str | None = None, results: ResultWriter | None = None, **backend
) -> tuple[str, list[dict], FakeBackend]:
    fake, output = FakeBackend(**backend), io.StringIO()
    rows = Conversation(fake, GenerationOptions(), Terminal(io.StringIO(typed), output), system, results).run()
    return output.getvalue(), rows, fake


@pytest.mark.parametrize("end", ["exit", "quit", " EXIT "])
def test_a_conversation_reads_like_the_documented_one(end: str) -> None:
    output, rows, _ = talk(f"你是谁\nwho are you\n{end}\nnot read\n")
    assert output == f"<<< 你是谁\nre: 你是谁\n{RULE}\n<<< who are you\nre: who are you\n{RULE}\n<<< {end}\n"
    assert RULE == "-" * 50
    assert rows == [
        {"system": "own", "query": "你是谁", "response": "re: 你是谁", "history": []},
        {"system": "own", "query": "who are you", "response": "re: who are you", "history": [["你是谁", "re: 你是谁"]]},
    ]


def test_history_is_part_of_the_next_prompt_until_clear() -> None:
    _, rows, fake = talk("a\nb\nclear\nc\n")
    first, second, third = [messages for messages, _ in fake.asked]
    assert second == [*first, {"role": "assistant", "content": "re: a"}, {"role": "user", "content": "b"}]
    assert third == [{"role": "user", "content": "c"}]
    assert rows[2]["history"] == []


def test_reset_system() -> None:
    output, rows, fake = talk("a\nreset-system\n你是诗人\nb\nreset-system\n\nc\n", system="first")
    assert [row["system"] for row in rows] == ["first", "你是诗人", "own"]
    assert fake.asked[1][0] == [{"role": "system", "content": "你是诗人"}, {"role": "user", "content": "b"}]
    assert "<<<[S] 你是诗人\n" in output


def test_an_empty_system_means_none() -> None:
    _, rows, fake = talk("a\n", system="")
    assert fake.asked[0][0][0] == {"role": "system", "content": ""}
    assert rows[0]["system"] is None


def test_multi_line_and_back() -> None:
    output, rows, _ = talk("multi-line\nfirst\n\n  third#\nsecond question #\nsingle-line\none\nmulti-line\nexit\n")
    assert [row["query"] for row in rows] == ["first\n\n  third", "second question ", "one"]
    assert "<<<[M] first\n" in output


def test_words_may_end_with_the_mark_in_multi_line_mode() -> None:
    _, rows, _ = talk("multi-line\nclear#\nexit#\nx#\n")
    assert rows == []


def test_input_that_ends_inside_several_lines_is_still_answered() -> None:
    _, rows, _ = talk("multi-line\nfirst\nsecond")
    assert [row["query"] for row in rows] == ["first\nsecond"]


def test_end_of_input_ends_the_conversation_on_a_new_line() -> None:
    output, rows, _ = talk("a")
    assert output.endswith(f"{RULE}\n<<< \n")
    assert len(rows) == 1


def test_empty_lines_ask_nothing() -> None:
    _, rows, _ = talk("\n   \na\n")
    assert [row["query"] for row in rows] == ["a"]


def test_control_c_stops_the_answer_and_not_the_conversation() -> None:
    output, rows, fake = talk("a\nb\n", interrupt_at=1)
    assert fake.last is not None and fake.last.stopped
    assert [row["response"] for row in rows] == ["re: ", "re: "]
    assert output.count(" (stopped)\n") == 2
    assert rows[1]["history"] == [["a", "re: "]]


def test_an_answer_stopped_before_it_began_is_not_kept() -> None:
    output, rows, _ = talk("a\n", interrupt_at=0)
    assert rows == []
    assert output.endswith("<<< \n")


def test_control_c_at_the_prompt_says_how_to_end() -> None:
    class Impatient(io.StringIO):
        def readline(self, *args) -> str:
            if not self.tell():
                self.seek(1)
                raise KeyboardInterrupt
            return super().readline(*args)

    output = io.StringIO()
    rows = Conversation(FakeBackend(), GenerationOptions(), Terminal(Impatient(" a\n"), output)).run()
    assert "Ctrl-D ends" in output.getvalue()
    assert [row["query"] for row in rows] == ["a"]


def test_a_prompt_that_is_too_long_is_told_and_forgotten() -> None:
    output, rows, _ = talk("a\nlong\nb\n")
    assert "at most 8 are possible" in output
    assert rows[1]["history"] == [["a", "re: a"]]


def test_each_turn_has_its_own_seed_and_a_session_repeats() -> None:
    seeds = [seed for _, seed in talk("a\na\n")[2].asked]
    assert seeds == [42, 43]


def test_results_are_on_disk_while_the_conversation_goes_on(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path / "infer_result")
    assert not (tmp_path / "infer_result").exists()
    seen: list[int] = []

    class Watching(io.StringIO):
        def readline(self, *args) -> str:
            seen.append(len(writer.path.read_text(encoding="utf-8").splitlines()) if writer.path else 0)
            return super().readline(*args)

    Conversation(FakeBackend(), GenerationOptions(), Terminal(Watching("你好\nb\n"), io.StringIO()), None, writer).run()
    writer.close()
    assert seen == [0, 1, 2]
    assert writer.path is not None
    lines = writer.path.read_text(encoding="utf-8").splitlines()
    assert "你好" in lines[0]
    assert json.loads(lines[1])["history"] == [["你好", "re: 你好"]]


def test_two_programs_in_one_second_write_two_files(tmp_path: Path) -> None:
    writers = [ResultWriter(tmp_path) for _ in range(3)]
    for number, writer in enumerate(writers):
        writer.write({"number": number})
        writer.close()
    assert len({writer.path for writer in writers}) == len(list(tmp_path.iterdir())) == 3


def test_messages_of() -> None:
    assert messages_of(None, [], "q") == [{"role": "user", "content": "q"}]
    assert [message["role"] for message in messages_of("", [["a", "b"]], "q")] == ["system", "user", "assistant", "user"]
