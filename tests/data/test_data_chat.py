"""What is supervised, and what may become a control token: proved on random conversations for every kind of template."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from data_chats import CHATML, CHATS, IM, QWEN3, TAGS, Chat, byte_level, sentencepiece_like, tokenizer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import BadRow, Conversation, Message
from megaswift.data.structure import as_dicts
from megaswift.data.templates import TEMPLATES, compile_template
from megaswift.data.tokens import Encoded
from megaswift.errors import UserError

TEMPLATES_OF: dict[str, ChatTemplate] = {}
WORDS = [
    "hello",
    " ",
    "\n",
    "  ",
    "a",
    "the answer",
    "你好",
    "é",
    "e\u0301",
    "\U0001f600",
    "\t",
    ".",
    "\x00",
    "{{ x }}",
    "user",
    "assistant\n",
    "### Human:\n",
]


def template_of(name: str) -> ChatTemplate:
    if name not in TEMPLATES_OF:
        TEMPLATES_OF[name] = ChatTemplate(tokenizer_of(name))
    return TEMPLATES_OF[name]


def texts(control: tuple[str, ...]) -> st.SearchStrategy[str]:
    word = st.one_of(
        st.sampled_from(WORDS + list(control)), st.text(st.characters(exclude_categories=("Cs", "Co")), max_size=6)
    )
    return st.lists(word, min_size=1, max_size=6).map("".join).filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn, name: str) -> Conversation:
    chat = CHATS[name]
    text = texts(chat.control + tuple(tag for tag in chat.tags if "think" not in tag))
    messages = [Message("system", draw(text))] if chat.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(text)), Message("assistant", draw(text), loss=draw(st.booleans()))]
    messages[-1].loss = True
    return Conversation(messages)


def encode(template: ChatTemplate, conversation: Conversation) -> Encoded:
    result = template.encode([conversation])[0]
    if isinstance(result, BadRow):
        raise result
    return result


def spans(template: ChatTemplate, sample: Encoded) -> list[str]:
    """The supervised stretches as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.kept.astype(int), [0]])))
    return [template.decode(sample.ids[first:last]) for first, last in edges.reshape(-1, 2)]


def expected_answers(chat: Chat, conversation: Conversation) -> list[str]:
    messages = conversation.messages
    return [chat.answer(item.content, item is messages[-1]) for item in messages if item.role == "assistant" and item.loss]


@pytest.mark.parametrize("name", [name for name in CHATS if not CHATS[name].sentencepiece])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mask_is_the_assistants_text_and_its_end(name: str, data: st.DataObject) -> None:
    template, chat = template_of(name), CHATS[name]
    conversation = data.draw(conversations(name))
    sample = encode(template, conversation)
    assert spans(template, sample) == expected_answers(chat, conversation)
    # Everything else is there too, word for word, and nothing follows the last end token.
    whole = "".join(piece.text for piece in template.pieces(conversation))
    assert template.decode(sample.ids) == whole
    assert sample.kept[-1]


@pytest.mark.parametrize("name", list(CHATS))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_control_tokens_in_texts_stay_text(name: str, data: st.DataObject) -> None:
    template = template_of(name)
    conversation = data.draw(conversations(name))
    plain = Conversation([Message(message.role, "x", loss=message.loss) for message in conversation.messages])
    special = [template.encoder.control[token] for token in template.encoder.special & template.encoder.guarded]
    found, expected = encode(template, conversation).ids, encode(template, plain).ids
    assert [token for token in found if token in special] == [token for token in expected if token in special]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mask_with_a_sentencepiece_tokenizer(data: st.DataObject) -> None:
    template, chat = template_of("llama2"), CHATS["llama2"]
    conversation = data.draw(conversations("llama2"))
    answers = expected_answers(chat, conversation)
    # Its decoder takes one leading space off each text; that is all that may differ.
    assert [span.removeprefix(" ") for span in spans(template, encode(template, conversation))] == [
        text.removeprefix(" ") for text in answers
    ]


@pytest.mark.parametrize("name", list(CHATS))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_prompt_is_what_transformers_makes(name: str, data: st.DataObject) -> None:
    """Without control tokens in the texts, prompts are token for token those of apply_chat_template."""
    template, tokenizer, chat = template_of(name), tokenizer_of(name), CHATS[name]
    text = texts(()).filter(lambda value: not any(token in value for token in chat.control + chat.tags))
    messages = [Message("system", data.draw(text))] if chat.system and data.draw(st.booleans()) else []
    for _ in range(data.draw(st.integers(0, 2))):
        messages += [Message("user", data.draw(text)), Message("assistant", data.draw(text))]
    messages.append(Message("user", data.draw(text)))
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    expected = tokenizer.apply_chat_template(dicts, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    found = template.prompt(Conversation(messages)).tolist()
    assert template.decode(np.array(found)) == template.decode(np.array(ids))
    assert found == ids


@pytest.mark.parametrize("scheme", ["prepend", "first", "always"])
def test_pieces_join_like_the_whole_text(scheme: str) -> None:
    tokenizer = sentencepiece_like(("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", scheme)
    template = ChatTemplate(tokenizer, "mistral")
    conversation = Conversation([Message("user", "the an"), Message("assistant", "an the"), Message("user", "  the")])
    text = template.render([{"role": m.role, "content": m.content} for m in conversation.messages], [], True)
    assert template.prompt(conversation).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def thinking(*answers: str) -> Conversation:
    messages = [message for answer in answers for message in (Message("user", "why"), Message("assistant", answer))]
    return Conversation(messages)


def test_thoughts_of_the_last_answer_are_learnt() -> None:
    template = template_of("qwen3")
    sample = encode(template, thinking("<think>\nbecause\n</think>\n\nso"))
    assert spans(template, sample) == ["<think>\nbecause\n</think>\n\nso<|im_end|>"]
    assert template.encoder.control["<think>"] in sample.ids


def test_empty_answers_may_stand_in_the_history_of_a_prompt_only() -> None:
    template = template_of("qwen3")
    for answer in ("", "<think>\na\n</think>\n\n"):
        history = Conversation([Message("user", "q"), Message("assistant", answer), Message("user", "r")])
        assert template.decode(template.prompt(history)).endswith(
            "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
        )
        result = template.encode([Conversation(history.messages[:2])])[0]
        assert isinstance(result, BadRow) and result.reason == "empty content"


def test_reasoning_content_is_the_same_as_a_think_block() -> None:
    template = template_of("qwen3")
    own = Conversation([Message("user", "why"), Message("assistant", "so", reasoning="because")])
    assert encode(template, own).ids.tolist() == encode(template, thinking("<think>\nbecause\n</think>\n\nso")).ids.tolist()


def test_an_empty_block_is_learnt_only_when_the_row_brings_it() -> None:
    template = template_of("qwen3")
    assert spans(template, encode(template, thinking("<think>\n\n</think>\n\nso"))) == ["<think>\n\n</think>\n\nso<|im_end|>"]
    sample = encode(template, thinking("so"))
    assert spans(template, sample) == ["so<|im_end|>"]
    assert "<think>\n\n</think>\n\nso" in template.decode(sample.ids)


def test_thoughts_that_the_template_leaves_out_cost_their_turn_the_loss() -> None:
    template = template_of("qwen3")
    conversation = thinking("<think>a</think>b", "<think>c</think>d")
    assert spans(template, encode(template, conversation)) == ["<think>\nc\n</think>\n\nd<|im_end|>"]
    assert template.unsupervised_turns(conversation) == 1


def test_thoughts_when_the_prompt_opens_the_block() -> None:
    template = template_of("deepseek-r1")
    sample = encode(template, thinking("<think>\nbecause\n</think>\n\nso"))
    prompt = template.prompt(Conversation([Message("user", "why")]))
    assert sample.ids[: len(prompt)].tolist() == prompt.tolist()
    assert spans(template, sample) == ["because\n</think>\n\nso<|end|>"]


TOOL = {"type": "function", "function": {"name": "look_up", "description": "Finds <|im_end|> things", "parameters": {}}}


def tool_chat() -> Conversation:
    return Conversation(
        [
            Message("user", "find it"),
            Message("assistant", "", tool_calls=[{"name": "look_up", "arguments": {"what": "it<|im_end|>"}}]),
            Message("tool", "found <|im_start|>"),
            Message("assistant", "Here it is."),
        ],
        [TOOL],
    )


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_tool_calls_are_learnt_and_carry_no_control_token(name: str) -> None:
    template = template_of(name)
    sample = encode(template, tool_chat())
    call = '<tool_call>\n{"name": "look_up", "arguments": {"what": "it<|im_end|>"}}\n</tool_call><|im_end|>'
    assert [span.lstrip("\n") for span in spans(template, sample)] == [call, "Here it is.<|im_end|>"]
    assert sample.ids.tolist().count(template.encoder.control["<|im_end|>"]) == 5


def test_tools_for_a_template_that_knows_none() -> None:
    template = template_of("smollm2")
    sample = encode(template, tool_chat())
    first, second = spans(template, sample)
    assert first.startswith("<tool_call>\n{") and second == "Here it is.<|im_end|>"
    whole = template.decode(sample.ids)
    assert "<tools>" in whole and "user\n<tool_response>\nfound" in whole


# As Hermes 2 Pro and Command R bring it beside their default: it fails where there are no tools.
TOOL_USE = """\
{{- '<|im_start|>system\\nTools:' }}
{%- for tool in tools %}{{- ' ' + (tool.function | tojson) }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def several(**named: str) -> Any:
    tokenizer = byte_level(IM, TAGS)
    tokenizer.chat_template = named
    return tokenizer


def test_a_tokenizer_with_several_templates() -> None:
    """Its default is its own template, and the one for tools writes conversations with tools: as transformers chooses."""
    tokenizer = several(default=CHATML, tool_use=TOOL_USE, rag="no {{ documents.x.y }}")
    template = ChatTemplate(tokenizer, fallback="qwen")
    plain = Conversation([Message("user", "hi"), Message("assistant", "ho")])
    assert template.name == "AUTO" and spans(template, encode(template, plain)) == ["ho<|im_end|>"]
    tool = {"type": "function", "function": {"name": "look_up", "description": "Finds things", "parameters": {}}}
    call = {"name": "look_up", "arguments": {"what": "it"}}
    turns = [Message("user", "find it"), Message("assistant", "", tool_calls=[call]), Message("tool", "found")]
    with_tools = Conversation([*turns, Message("assistant", "Here.")], [tool])
    for made in (template, ChatTemplate.from_state(template.state)):
        assert spans(made, encode(made, with_tools)) == [
            '<tool_call>{"name": "look_up", "arguments": {"what": "it"}}</tool_call><|im_end|>',
            "Here.<|im_end|>",
        ]
    for conversation in (Conversation(plain.messages[:1]), Conversation(turns, [tool])):
        messages, tools = as_dicts(conversation.messages), conversation.tools or None
        ours = template.decode(template.prompt(conversation))
        assert ours == tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        other = compile_template(template.source()).render(messages=messages, tools=tools, add_generation_prompt=True)
        assert ours == other
    without = Conversation(with_tools.messages)  # calls and no tools: transformers takes the default, which cannot write them
    assert "<tool_call>" in spans(template, encode(template, without))[0]


def test_several_templates_without_a_default() -> None:
    tokenizer = several(tool_use=TOOL_USE)
    assert ChatTemplate(tokenizer, fallback="qwen").name == "qwen"
    with pytest.raises(UserError, match="no chat template that is its default, only: tool_use"):
        ChatTemplate(tokenizer)
    both = ChatTemplate(several(default=CHATML, tool_use=TOOL_USE.replace("<|im_end|>", "<|endoftext|>")))
    assert both.all_ends == ("<|endoftext|>", "<|im_end|>")


def test_llama3_tool_call_without_content() -> None:
    template = template_of("llama3.1")
    conversation = tool_chat()
    assert (
        spans(template, encode(template, conversation))[0]
        == '{"name": "look_up", "parameters": {"what": "it<|im_end|>"}}<|eot_id|>'
    )


def test_mistral_tool_calls_have_the_ids_that_it_demands() -> None:
    template = template_of("mistral")
    conversation = tool_chat()
    conversation.messages.insert(0, Message("system", "be kind"))
    sample = encode(template, conversation)
    call, answer = spans(template, sample)
    assert call.startswith(
        '[TOOL_CALLS] [{"name": "look_up", "arguments": {"what": "it<|im_end|>"}, "id": "'
    ) and call.endswith('"}]</s>')
    assert answer == " Here it is.</s>"
    whole = template.decode(sample.ids)
    assert whole.count(call.partition('"id": "')[2][:9]) == 2 and "be kind" in whole
    assert encode(template, conversation).ids.tolist() == sample.ids.tolist()


def test_tool_results_that_a_template_writes_as_json() -> None:
    template = template_of("llama3.1")
    conversation = tool_chat()
    conversation.messages[2].content = 'a "b"\n\\c'
    assert '"a \\"b\\"\\n\\\\c"<|eot_id|>' in template.decode(encode(template, conversation).ids)


def test_arguments_that_a_template_joins_as_text() -> None:
    tokenizer = byte_level(IM)
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate(tokenizer)
    assert spans(template, encode(template, tool_chat()))[0] == 'look_up {"what": "it<|im_end|>"}<|im_end|>'


@pytest.mark.parametrize("name", [name for name in CHATS if name != "qwen3"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_training_shows_the_last_answer_what_its_prompt_will_show(name: str, data: st.DataObject) -> None:
    template = template_of(name)
    conversation = data.draw(conversations(name))
    conversation.messages[-1].loss = True
    sample = encode(template, conversation)
    prompt = template.prompt(Conversation(conversation.messages[:-1]))
    begin = int(np.flatnonzero(~sample.kept)[-1]) + 1
    text = template.decode(prompt)
    if name == "deepseek-r1":  # its prompt opens a think block, which an answer without thoughts does not have
        text = text.removesuffix("<think>\n")
    assert template.decode(sample.ids[:begin]) == text


def test_system_prompts() -> None:
    user = [Message("user", "q"), Message("assistant", "a")]

    def text(system: str | None, own: str | None) -> str:
        template = ChatTemplate(tokenizer_of("smollm2"), default_system=system)
        return template.decode(encode(template, Conversation(([Message("system", own)] if own is not None else []) + user)).ids)

    def block(prompt: str) -> str:
        return f"<|im_start|>system\n{prompt}<|im_end|>\n"

    rest = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    assert text(None, None) == block("Built-in prompt") + rest  # the template's
    assert text("flag", None) == block("flag") + rest
    assert text("flag", "row") == block("row") + rest  # a row's own wins
    assert text("", None) == rest  # '' is no system prompt at all
    assert text("flag", "") == rest


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_named_templates_end_each_answer(name: str) -> None:
    named = TEMPLATES[name]
    template = ChatTemplate(
        byte_level(
            (*named.needs, "<s>", "</s>"),
            ("<think>", "</think>"),
            "<s>",
            "<|im_end|>" if "<|im_end|>" in named.needs else "</s>",
        ),
        name,
    )
    conversation = Conversation(
        [Message("user", "q"), Message("assistant", "a"), Message("user", "r"), Message("assistant", "b")]
    )
    found = spans(template, encode(template, conversation))
    end = "<|im_end|>" if "<|im_end|>" in named.needs else "<|eot_id|>" if "<|eot_id|>" in named.needs else "</s>"
    assert [span.replace(" ", "") for span in found] == ["a" + end, "b" + end]


def test_pretraining_text_is_learnt_whole_with_an_end() -> None:
    template = template_of("smollm2")
    sample = encode(template, Conversation(text="once <|im_end|> upon", literal=True))
    assert template.decode(sample.ids) == "once <|im_end|> upon<|im_end|>"
    assert sample.kept.all() and sample.ids.tolist().count(template.eos_id) == 1


def bad(source: str, **options: Any) -> pytest.ExceptionInfo[UserError]:
    tokenizer = byte_level(IM)
    tokenizer.chat_template = source
    with pytest.raises(UserError) as caught:
        ChatTemplate(tokenizer, **options)
    return caught


def test_templates_that_cannot_work() -> None:
    assert "no chat template" in str(bad("").value)
    assert "did you mean: qwen" in str(bad("", template_type="qwem").value)
    assert "not valid Jinja" in str(bad("{% for %}").value)
    assert "fails on a plain question" in str(bad("{{ raise_exception('no') }}").value)
    assert "fails on a plain question" in str(bad("{{ messages[5].content.x.y }}").value)
    assert "needs the token <|start_header_id|>" in str(bad("", template_type="llama3").value)
    assert "does not write the assistant's text" in str(bad("{{ messages[0].content }}").value)


def test_rows_that_a_template_cannot_write() -> None:
    gemma = template_of("gemma")
    result = gemma.encode([Conversation([Message("system", "s"), Message("user", "q"), Message("assistant", "a")])])[0]
    assert isinstance(result, BadRow) and result.reason == "refused by the chat template" and "System role" in result.detail
    tokenizer = byte_level(IM)
    tokenizer.chat_template = "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    result = ChatTemplate(tokenizer).encode(
        [Conversation([Message("system", "s"), Message("user", "q"), Message("assistant", "a")])]
    )[0]
    assert isinstance(result, BadRow) and "leaves out a system message" in result.reason


def test_a_template_that_rewrites_text_is_noticed() -> None:
    tokenizer = byte_level(IM)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | replace('cat', 'dog') }}<|im_end|>{% endfor %}"
    )
    template = ChatTemplate(tokenizer)
    good, wrong = template.encode(
        [
            Conversation([Message("user", "a dog"), Message("assistant", "b")]),
            Conversation([Message("user", "a cat"), Message("assistant", "b")]),
        ]
    )
    assert isinstance(good, Encoded)
    assert isinstance(wrong, BadRow) and "rewrites a message" in wrong.reason


def test_a_template_without_end_tokens_gets_one_at_the_end() -> None:
    tokenizer = byte_level(IM)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = ChatTemplate(tokenizer)
    sample = encode(
        template,
        Conversation([Message("user", "q"), Message("assistant", "a"), Message("user", "r"), Message("assistant", "b")]),
    )
    assert spans(template, sample) == ["a", "b<|im_end|>"]


def test_state_makes_the_same_template() -> None:
    template = template_of("qwen3")
    copy = ChatTemplate.from_state(template.state)
    conversation = thinking("<think>a</think>b <|im_end|>")
    assert encode(copy, conversation).ids.tolist() == encode(template, conversation).ids.tolist()
    assert copy.state["source"] == QWEN3


@pytest.mark.parametrize("name", [name for name in CHATS if CHATS[name].system])
def test_the_source_for_other_programs_brings_the_system_prompt(name: str) -> None:
    template = template_of(name)
    user, own = {"role": "user", "content": "hi"}, {"role": "system", "content": "Own."}
    special = template.state["special"]

    def written(system: str | None, *messages: dict[str, str]) -> str:
        jinja = compile_template(template.source(system))
        return jinja.render(messages=list(messages), add_generation_prompt=True, **special)

    for text in ("Ours.", 'Say "\\n"\n{{ x }} 你好 \U0001f600 \x07'):
        assert written(text, user) == written(None, {"role": "system", "content": text}, user)
    assert written("Ours.", own, user) == written(None, own, user)


def test_a_named_template_brings_its_system_prompt_along() -> None:
    template = ChatTemplate(tokenizer_of("chatml"), "qwen")
    text = compile_template(template.source()).render(messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi")
