"""Thoughts in answers: with both tags, with the closing one alone, beside the answer; and templates that know none."""

from __future__ import annotations

from typing import Any

import pytest
from data_chats import CHATML, DEEPSEEK_R1, IM, QWEN3, TAGS, byte_level
from test_data_chat import encode, spans

from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import BadRow
from megaswift.data.rows import to_conversation

# It takes thoughts from the text before the closing tag alone, and writes those of every turn.
SPLITS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}{% set r = '' %}{% if m.role == 'assistant' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].strip() %}{% set c = c.split('</think>')[-1].strip() %}{% endif %}"
    "<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As QwQ: the text of the last turn stays as it is, that of earlier ones loses its thoughts.
CUTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def made(source: str | None, name: str = "AUTO") -> tuple[ChatTemplate, Any]:
    tokenizer = byte_level(IM, TAGS)
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer, name), tokenizer


def chat(*answers: str | dict[str, str]) -> dict[str, Any]:
    messages: list[dict[str, str]] = []
    for answer in answers:
        messages += [{"role": "user", "content": "2+2"}]
        messages += [{"role": "assistant", **(answer if isinstance(answer, dict) else {"content": answer})}]
    return {"messages": messages}


@pytest.mark.parametrize("source", [QWEN3, SPLITS])
@pytest.mark.parametrize("answers", [["add two\n</think>\n\n4"], ["one\n</think>\n\n3", "add two\n</think>\n\n4"]])
def test_a_closing_tag_alone_has_the_ids_of_transformers(source: str, answers: list[str]) -> None:
    template, tokenizer = made(source)
    row = chat(*answers)
    sample = encode(template, to_conversation(row))
    expected = list(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False))
    assert sample.ids.tolist() == expected[: len(sample.ids)] and tokenizer.decode(expected[len(sample.ids) :]).strip() == ""
    assert spans(template, sample)[-1] == "<think>\nadd two\n</think>\n\n4<|im_end|>"
    told = template.unsupervised_turns(to_conversation(row))
    assert (len(spans(template, sample)), told) == ((len(answers), 0) if source == SPLITS else (1, len(answers) - 1))


@pytest.mark.parametrize(
    ("source", "name"), [(None, "qwen3"), (QWEN3, "AUTO"), (SPLITS, "AUTO"), (CUTS, "AUTO"), (DEEPSEEK_R1, "AUTO")]
)
def test_every_way_to_write_thoughts_gives_the_same(source: str | None, name: str) -> None:
    tokenizer = byte_level(("<|begin|>", *IM, "<|end|>"), ("<|User|>", "<|Assistant|>", *TAGS))
    tokenizer.chat_template = source
    template = ChatTemplate(tokenizer, name)
    rows = [
        chat("add two\n</think>\n\n4"),
        chat("<think>\nadd two\n</think>\n\n4"),
        chat("<think>add two</think>4"),
        chat({"content": "4", "reasoning_content": "add two"}),
    ]
    first, *others = [encode(template, to_conversation(row)) for row in rows]
    whole = template.decode(first.ids)
    assert whole.count("<think>") == whole.count("</think>") == 1 and "<think>\nadd two\n</think>\n\n4" in whole
    assert spans(template, first)[-1].removeprefix("<think>\n").startswith("add two\n</think>\n\n4<|")
    assert all(other.ids.tolist() == first.ids.tolist() for other in others)
    assert all(other.kept.tolist() == first.kept.tolist() for other in others)


def test_thoughts_of_earlier_turns_that_a_template_drops_are_told() -> None:
    for source in (QWEN3, CUTS):
        template, _ = made(source)
        conversation = to_conversation(chat("one\n</think>\n\n3", "add two\n</think>\n\n4"))
        assert template.unsupervised_turns(conversation) == 1 and len(spans(template, encode(template, conversation))) == 1
        conversation.messages[-1].loss = False
        result = template.encode([conversation])[0]
        assert isinstance(result, BadRow) and "leaves out the thoughts" in result.detail


def test_a_tag_before_the_thoughts_is_no_thought() -> None:
    template, _ = made(None, "qwen3")
    sample = encode(template, to_conversation(chat("Well. <think>\na\n</think>\n\n4")))
    assert spans(template, sample) == ["Well. <think>\na\n</think>\n\n4<|im_end|>"]


@pytest.mark.parametrize("name", ["AUTO", "chatml", "qwen2_5", "default"])
def test_a_template_without_thoughts_trains_every_turn(name: str) -> None:
    template, _ = made(CHATML, name)
    beside = [{"content": f"answer {k}", "reasoning_content": f"thought {k}"} for k in range(3)]
    inside = [f"<think>\nthought {k}\n</think>\n\nanswer {k}" for k in range(3)]
    sample, other = (encode(template, to_conversation(chat(*answers))) for answers in (beside, inside))
    assert spans(template, sample) == [f"{text}<|im_end|>" for text in inside]
    assert sample.ids.tolist() == other.ids.tolist() and sample.kept.tolist() == other.kept.tolist()
    assert template.unsupervised_turns(to_conversation(chat(*beside))) == 0
