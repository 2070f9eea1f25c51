"""--loss_scale: which tokens carry loss and with what weight; never which tokens there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_chats import CHATS, tokenizer_of

from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import BadRow, Conversation, Message
from megaswift.data.loss_rules import LossRules
from megaswift.data.report import stretches
from megaswift.data.tokens import Encoded
from megaswift.errors import DataError, UserError

Q, A = (lambda text: Message("user", text)), (lambda text, **more: Message("assistant", text, **more))
THREE = [Message("system", "be brief"), Q("one"), A("first"), Q("two"), A("second"), Message("tool", "42"), A("third")]
THINKING = [Q("one"), A("<think>\n\n</think>\n\nfirst"), Q("two"), A("<think>\nhm hm\n</think>\n\nsecond")]


def template_of(text: str, name: str = "chatml", **more: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer_of(name), loss=LossRules.parse(text), **more)


def encoded(template: ChatTemplate, messages: list[Message]) -> Encoded:
    result = template.encode([Conversation(list(messages))])[0]
    if isinstance(result, BadRow):
        raise result
    return result


def weighed(template: ChatTemplate, messages: list[Message]) -> list[tuple[str, float]]:
    return [(text, weight) for text, weight in stretches(template, encoded(template, messages)) if weight]


def test_words_and_files_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"a+": 2, "Action:": [3, 0.5]}), encoding="utf-8")
    rules = LossRules.parse(f"ignore_empty_think+last_round+{file}")
    assert rules == LossRules("last_round", ("ignore_empty_think",), (("a+", 2.0),), (("Action:", 3.0, 0.5),))
    assert LossRules.from_record(json.loads(json.dumps(rules.record()))) == rules
    file.write_text(json.dumps({"query": {"please": 0.1}, "response": {"x": [0]}}), encoding="utf-8")
    assert LossRules.parse(str(file)) == LossRules(found=(("x", 0.0),), asked=(("please", 0.1),))
    assert LossRules.parse("default") == LossRules.parse("") == LossRules()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("last_rounds", "nearest: last_round"),
        ("all+last_round", "all and last_round contradict"),
        ("no_think+last_think", "contradict"),
    ],
)
def test_what_is_no_rule(text: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        LossRules.parse(text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1]", "expected an object"),
        ("{", "cannot be read"),
        ('{"(": 1}', "no regular expression"),
        ('{"a*": 1}', "matches no text at all"),
        ('{"a": -1}', "is not a weight of 0 or more, or two"),
        ('{"a": [1, 2, 3]}', "is not a weight of 0 or more, or two"),
        ('{"a": true}', "is not a weight"),
        ('{"query": {"a": [1, 2]}}', "is not a weight of 0 or more."),
    ],
)
def test_files_that_are_wrong(content: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"--loss_scale .*rules\.json") as caught:
        LossRules.parse(str(file))
    assert told in str(caught.value)


def test_rounds() -> None:
    end = "<|im_end|>"
    assert weighed(template_of("default"), THREE) == [(f"{text}{end}", 1.0) for text in ("first", "second", "third")]
    assert weighed(template_of("last_round"), THREE) == [(f"{text}{end}", 1.0) for text in ("second", "third")]
    ((whole, weight),) = weighed(template_of("all"), THREE)
    assert weight == 1.0 and whole == template_of("default").decode(encoded(template_of("default"), THREE).ids)
    silent = [*THREE[:2], A("first", loss=0.0), *THREE[3:]]
    assert "first" not in "".join(text for text, _ in weighed(template_of("all"), silent))


def test_thoughts() -> None:
    tokenizer = tokenizer_of("qwen3")

    def found(text: str) -> list[tuple[str, float]]:
        return weighed(ChatTemplate(tokenizer, loss=LossRules.parse(text)), [THINKING[2], THINKING[3]])

    end = "<|im_end|>"
    assert found("default") == [(f"<think>\nhm hm\n</think>\n\nsecond{end}", 1.0)]
    assert found("ignore_empty_think") == found("last_think") == found("default")
    assert found("no_think") == [(f"second{end}", 1.0)]
    empty = ChatTemplate(tokenizer, loss=LossRules.parse("ignore_empty_think"))
    assert weighed(empty, THINKING[:2]) == [(f"first{end}", 1.0)]
    chatml = [Q("one"), A("<think>\na\n</think>\n\nfirst"), *THINKING[2:]]
    texts = [text for text, _ in weighed(template_of("last_think"), chatml)]
    assert texts == [f"first{end}", f"<think>\nhm hm\n</think>\n\nsecond{end}"]


def test_weights_of_files(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text(
        json.dumps({"query": {"search": 0.5}, "response": {"Action:": [2, 3], "Input:": [1, 0.25], "Z": 4}}),
        encoding="utf-8",
    )
    messages = [Q("please search"), A("Action: go Input: far"), Q("and"), A("so: bZ Action: lZ", loss=0.5)]
    pieces = weighed(template_of(str(file)), messages)
    assert [(text.strip(), weight) for text, weight in pieces] == [
        ("Action:", 2.0), ("go", 3.0), ("Input:", 1.0), ("far", 0.25), ("<|im_end|>", 1.0),
        ("so: b", 0.5), ("Z", 2.0), ("", 0.5), ("Action:", 1.0), ("l", 1.5), ("Z", 2.0), ("<|im_end|>", 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(CHATS))
@pytest.mark.parametrize("rounds", ["default", "last_round"])
def test_tokens_stay_as_they_are(name: str, rounds: str, tmp_path: Path) -> None:
    """A rule that cuts through words changes weights, no token; each token has the weight of its last character."""
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"l+o? w": 2, "é": [3, 1], "[0-9]": 0}), encoding="utf-8")
    messages = [Q("hello 1"), A("hello world é 12 你好 \U0001f600"), Q("so"), A(" well wow é é7")]
    plain, ruled = (ChatTemplate(tokenizer_of(name), loss=LossRules.parse(text)) for text in (rounds, f"{rounds}+{file}"))
    one, other = encoded(plain, messages), encoded(ruled, messages)
    assert np.array_equal(one.ids, other.ids) and other.weights is not None
    assert set(other.weights.tolist()) <= {0.0, 1.0, 2.0, 3.0} and {2.0, 3.0} <= set(other.weights.tolist())
    assert not other.kept[~one.kept].any()


def test_rows_without_loss_are_told(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({".+": 0}), encoding="utf-8")
    assert weighed(template_of(str(file)), [Q("a"), A("b")]) == [("<|im_end|>", 1.0)]
    file.write_text(json.dumps({"a": 0}), encoding="utf-8")
    assert (
        weighed(template_of(f"all+{file}"), [Q("a"), A("a")])[0][0] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
