"""Templates by name: the mask is the assistant's text and its end token, on random conversations for each of them."""

from __future__ import annotations

import pytest
from data_chats import byte_level
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_chat import encode, spans, texts

from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import Conversation, Message
from megaswift.data.templates import TEMPLATES

MADE: dict[str, ChatTemplate] = {}


def template_of(name: str) -> ChatTemplate:
    """The named template on a tokenizer that knows its control tokens."""
    if name not in MADE:
        needs = TEMPLATES[name].needs
        end = "<|im_end|>" if "<|im_end|>" in needs else "</s>"
        MADE[name] = ChatTemplate(byte_level((*needs, "<s>", "</s>"), ("<think>", "</think>"), "<s>", end), name)
    return MADE[name]


def answer(name: str, text: str) -> str:
    """What is supervised of an answer: its text as the template writes it, and the token that ends it."""
    if name == "llama3":
        return text.strip() + "<|eot_id|>"
    if name == "llama2":
        return f" {text} </s>"
    if name == "mistral":
        return f" {text}</s>"
    return text + ("<|im_end|>" if "<|im_end|>" in TEMPLATES[name].needs else "</s>")


@pytest.mark.parametrize("name", list(TEMPLATES))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mask_is_the_assistants_text_and_its_end(name: str, data: st.DataObject) -> None:
    template = template_of(name)
    text = texts((*template.encoder.special, "[INST]", "[/INST]", "<<SYS>>", "### Assistant:\n"))
    messages = [Message("system", data.draw(text))] if data.draw(st.booleans()) else []
    for _ in range(data.draw(st.integers(1, 3))):
        messages += [Message("user", data.draw(text)), Message("assistant", data.draw(text), loss=data.draw(st.booleans()))]
    messages[-1].loss = True
    sample = encode(template, Conversation(messages))
    assert spans(template, sample) == [
        answer(name, item.content) for item in messages if item.role == "assistant" and item.loss
    ]
    plain = encode(template, Conversation([Message(item.role, "x", loss=item.loss) for item in messages]))
    special = [template.encoder.control[token] for token in template.encoder.special & template.encoder.guarded]
    control = [[token for token in found.ids.tolist() if token in special] for found in (sample, plain)]
    assert control[0] == control[1], "control tokens come from the template alone"
