"""A tokenizer's chat template as something that turns conversations into token ids with a loss mask.

template = ChatTemplate(tokenizer)        # the tokenizer's own template
template.encode([conversation])[0]        # ids and loss mask: the assistant's text and its end token, nothing else
template.prompt(conversation)             # generation: ids up to and with the assistant's header
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from megaswift.data.conversation import NOT_TEXT, BadRow, Conversation, Message
from megaswift.data.loss_rules import LossRules
from megaswift.data.probes import A_CALL, A_TOOL, own_tokens, where_thoughts_stand
from megaswift.data.structure import NO_SYSTEM, Structure, align, as_dicts, build, render
from megaswift.data.templates import TEMPLATES, TemplateRaised, choose_source, compile_template
from megaswift.data.tokens import Encoded, Kind, Piece, PieceEncoder, tokenizer_json
from megaswift.data.tools import tools_as_text
from megaswift.errors import UserError

# The opening tag may have stood in the prompt, as R1's and Qwen3-Thinking's answers come.
AS_ROWS_SAY = LossRules()
THOUGHTS = re.compile(r"\s*(?:<think>|(?!(?:(?!</think>).)*<think>))(.*?)</think>\s*(.*)\Z", re.DOTALL)
SHIELD = 0xE100  # control token number k inside tool texts is written as this character + k


class ChatTemplate:
    """The chat template of a tokenizer, or a named one.

    Args:
        tokenizer: a Hugging Face tokenizer with a fast backend.
        template_type: AUTO for the tokenizer's own template, or a name of `templates.TEMPLATES`.
        default_system: system prompt of conversations that bring none; "" for none at all; None for the template's.
        fallback: name to use when AUTO finds no template in the tokenizer.
        date: YYYY-MM-DD for templates that write the date; None for the day on which they are used.
        loss: which parts of a conversation carry loss.
        pictures: texts that stand for a picture, a video or a sound: a conversation that has one is refused.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_type: str = "AUTO",
        default_system: str | None = None,
        *,
        fallback: str | None = None,
        date: str | None = None,
        loss: LossRules = AS_ROWS_SAY,
        pictures: Sequence[str] = (),
    ) -> None:
        source, tool_use, name, system = choose_source(tokenizer, template_type, fallback)
        special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token).", where=str(getattr(tokenizer, "name_or_path", "")))
        state = {
            "name": name,
            "source": source,
            "tool_use": tool_use,
            "date": _day(date) if "strftime_now" in source + (tool_use or "") else "",
            "special": special,
            "default_system": system if default_system is None else default_system,
            "tokenizer": tokenizer_json(tokenizer),
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            "bos_id": own_bos(tokenizer),
        }
        if loss != AS_ROWS_SAY:  # else the digests of rows that were made before there were rules would change
            state["loss"] = loss.record()
        if pictures:
            state["pictures"] = list(pictures)
        self._setup(state)
        for token in TEMPLATES[name].needs if name in TEMPLATES else ():
            if token not in self.encoder.control:
                raise UserError(
                    f"template {name} needs the token {token}, which this tokenizer does not know.",
                    where="--template_type",
                    fix="use --template_type default, or a tokenizer that knows it",
                )

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ChatTemplate:
        """A template from `state` of another one: the same, without the tokenizer object."""
        template = cls.__new__(cls)
        template._setup(state)
        return template

    def _setup(self, state: dict[str, Any], without_tools: ChatTemplate | None = None) -> None:
        """`without_tools`: the template of all other conversations, where this one is for those with tools."""
        self.state = state
        self.name: str = state["name"]
        self.default_system: str | None = state["default_system"]
        self.eos_id: int = state["eos_id"]
        self.pad_id: int = state["pad_id"]
        self.loss = LossRules.from_record(state["loss"]) if "loss" in state else AS_ROWS_SAY
        self.pictures: tuple[str, ...] = tuple(state.get("pictures", ()))
        self.encoder: PieceEncoder = without_tools.encoder if without_tools else PieceEncoder(state["tokenizer"])
        self._jinja = compile_template(state["source"], state["date"])
        self.thinks = "</think>" in state["source"]
        self.writes_tools = without_tools is not None or ("tools" in state["source"] and "tool_calls" in state["source"])
        self.any_tools = A_TOOL if without_tools else []  # a template for tools may fail without any
        self._structures: dict[Any, Structure] = {}
        self.eos: str = state["special"].get("eos_token", "")
        self._decoder: Any = None
        self._system_block: tuple[str, str] | None = None
        self.header, self.after_user, self.ends = self._look()
        self.text_arguments = self.writes_tools and self._wants_text_arguments()
        self._system_block = self._find_system_block()
        self.encoder.guard(own_tokens(self))
        self.thoughts = where_thoughts_stand(self)
        self._tool_use: ChatTemplate | None = None  # what conversations with tools are written with, as in transformers
        if state["tool_use"]:
            self._tool_use = ChatTemplate.__new__(ChatTemplate)
            self._tool_use._setup(state | {"source": state["tool_use"], "tool_use": None}, self)

    # What the template looks like

    def _look(self) -> tuple[str, str, tuple[str, ...]]:
        """(assistant header, what follows a user's text, tokens that end an assistant turn), from small renderings."""
        user, tools = {"role": "user", "content": "\ue0e0"}, self.any_tools
        try:
            plain, prompt = self.render([user], tools, False), self.render([user], tools, True)
            full = self.render([user, {"role": "assistant", "content": "\ue0e1"}], tools, False)
        except BadRow as error:
            raise UserError(
                f"the chat template fails on a plain question: {error}.",
                where="chat_template",
                fix="choose a template by name with --template_type",
            ) from error
        if "\ue0e1" not in full:
            raise UserError(
                "the chat template does not write the assistant's text.",
                where="chat_template",
                fix="choose a template by name with --template_type",
            )
        tail = full.partition("\ue0e1")[2]
        cut = re.compile("|".join(re.escape(token) for token in sorted(self.encoder.special, key=len, reverse=True)) or r"(?!)")
        end = cut.search(tail)
        known = {end.group(), self.eos, "<|eom_id|>"} if end else set()
        header = prompt[len(plain) :] if prompt.startswith(plain) else ""
        ends = tuple(sorted(token for token in known if token and token in self.encoder.control))
        return header, prompt.partition("\ue0e0")[2], ends

    def _wants_text_arguments(self) -> bool:
        """Whether the template fails on arguments that are an object, and takes them as JSON text."""
        messages = [Message("user", "x"), A_CALL, Message("tool", "x")]
        for text_arguments in (False, True):
            try:
                self.render(as_dicts(messages, text_arguments), A_TOOL, True)
                return text_arguments
            except BadRow:
                continue
        return False

    @cached_property
    def _shields(self) -> dict[str, str]:
        return {token: chr(SHIELD + k) for k, token in enumerate(sorted(self.encoder.guarded))}

    @cached_property
    def _shielded_tokens(self) -> dict[str, str]:
        return {shield: token for token, shield in self._shields.items()}

    def _find_system_block(self) -> tuple[str, str] | None:
        """(before, after) of a system message's block, where a second one is written just like the first."""
        first, second = "\ue0e0", "\ue0e1"
        try:
            text = self.render(
                [{"role": "system", "content": first}, {"role": "system", "content": second}, {"role": "user", "content": "x"}],
                self.any_tools,
                False,
            )
        except BadRow:
            return None
        before, _, rest = text.partition(first)
        between = rest.partition(second)[0]
        bos = self.state["special"].get("bos_token", "")
        opening = (
            before.removeprefix(bos) if between.endswith(before.removeprefix(bos)) and not between.endswith(before) else before
        )
        if second not in rest or not opening or not between.endswith(opening):
            return None
        return opening, between[: -len(opening)]

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], prompt: bool) -> str:
        """The template's text. Raises BadRow when the template refuses the conversation."""
        import jinja2

        try:
            text = self._jinja.render(
                messages=messages, tools=tools or None, add_generation_prompt=prompt, **self.state["special"]
            )
        except TemplateRaised as error:
            raise BadRow("refused by the chat template", str(error)) from None
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise BadRow("the chat template fails", f"{type(error).__name__}: {error}") from None
        if self._system_block and NO_SYSTEM in text:
            text = text.replace(self._system_block[0] + NO_SYSTEM + self._system_block[1], "", 1)
        return text

    # From conversations to ids

    def encode(self, conversations: list[Conversation]) -> list[Encoded | BadRow]:
        """Ids and loss mask of each conversation, or why it cannot be had. One call of the tokenizer for all."""
        result: list[Encoded | BadRow | None] = []
        pieces, factors = [], []
        for conversation in conversations:
            try:
                own, factor = self._weighed(conversation)
                pieces.append(own)
                factors.append(factor)
                result.append(None)
            except BadRow as error:
                result.append(error)
        encoded = iter(self.encoder.encode(pieces, factors))
        done = [item if item is not None else next(encoded) for item in result]
        return [
            self._with_ends(item) if isinstance(item, Encoded) and conversation.text is not None else item
            for item, conversation in zip(done, conversations, strict=True)
        ]

    def _weighed(self, conversation: Conversation) -> tuple[list[Piece], np.ndarray | None]:
        """Its pieces, and what `loss` makes of the weight of each of their characters. Raises BadRow."""
        pieces = [piece for piece in self.pieces(conversation) if piece.text]
        if conversation.text is not None or self.loss == AS_ROWS_SAY:
            return pieces, None
        writer = self._tool_use if self._tool_use is not None and conversation.tools else self
        messages = writer._prepared(conversation).messages
        return self.loss.everything(pieces, messages), self.loss.factors(pieces, messages)

    def _with_ends(self, item: Encoded) -> Encoded:
        """Pre-training text: the tokenizer's own first token, when it has one, and the end token around it, each once."""
        bos = self.state["bos_id"]
        first = [] if bos is None or item.ids[:1] == bos else [bos]
        last = [] if item.ids[-1:] == self.eos_id else [self.eos_id]
        ids = np.concatenate([np.array(first, np.int32), item.ids, np.array(last, np.int32)])
        kept = np.ones(len(ids), bool)
        kept[: len(first)] = False
        return Encoded(ids, kept)

    def prompt(self, conversation: Conversation) -> np.ndarray:
        """Token ids (int32) from which the assistant's next turn is generated. Raises BadRow."""
        return self.encoder.encode([self.pieces(conversation, prompt=True)])[0].ids

    def pieces(self, conversation: Conversation, prompt: bool = False) -> list[Piece]:
        """The conversation as text pieces, each with who wrote it and whether it carries loss. Raises BadRow."""
        self._refuse_pictures(conversation)
        if conversation.text is not None:
            return [Piece(conversation.text, Kind.LITERAL if conversation.literal else Kind.TEMPLATE, 1.0)]
        if self._tool_use is not None and conversation.tools:
            return self._tool_use.pieces(conversation, prompt)
        conversation = self._prepared(conversation)
        messages = conversation.messages
        if not prompt and any(m.role == "assistant" and not m.content.strip() and not m.tool_calls for m in messages):
            raise BadRow("empty content", "an assistant turn has thoughts and no answer")
        structure = self._structure(conversation, prompt)
        written = as_dicts(messages, self.text_arguments, self.thoughts)
        real = render(self, written, conversation.tools, prompt, structure.deferred)
        texts = align(structure, messages, real)
        pieces = []
        for segment in structure.segments:
            weight = 0.0 if prompt else segment.weight  # a prompt is not cut where loss begins, so it is tokenized as one text
            if segment.slot is None:
                pieces.extend(self._unshield(segment.text, weight))
                continue
            kind, number = segment.slot
            message = messages[number]
            text = texts.get(segment.slot, (message.reasoning or "").strip("\n") if kind == "r" else message.content)
            pieces.append(Piece(text, Kind.ANSWER if message.role == "assistant" else Kind.CONTENT, weight, number))
        if not prompt and not any(piece.weight and piece.text for piece in pieces):
            raise BadRow("no supervised turn", "the chat template leaves out the thoughts of every supervised turn")
        return pieces

    def _refuse_pictures(self, conversation: Conversation) -> None:
        """Raise BadRow where a text stands for a picture, a video or a sound, naming it and its place."""
        texts = [("text", conversation.text or "")] if conversation.text is not None else []
        for number, message in enumerate(conversation.messages, start=1):
            texts.append((f"message {number}", f"{message.content}\n{message.reasoning or ''}"))
        for where, text in texts:
            mark = next((mark for mark in self.pictures if mark in text), None)
            if mark is not None:
                raise BadRow(NOT_TEXT, f"{mark} in {where} stands for one, and only text can be trained")

    def decode(self, ids: np.ndarray) -> str:
        """The text of some token ids, control tokens included."""
        return self._whole_tokenizer().decode(ids.tolist(), skip_special_tokens=False)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, added ones included."""
        return self._whole_tokenizer().get_vocab(with_added_tokens=True)

    def _whole_tokenizer(self) -> Any:
        if self._decoder is None:
            from tokenizers import Tokenizer

            self._decoder = Tokenizer.from_str(self.state["tokenizer"])
        return self._decoder

    def unsupervised_turns(self, conversation: Conversation) -> int:
        """How many assistant turns get no loss because the template leaves out their thoughts. Raises BadRow."""
        if self._tool_use is not None and conversation.tools:
            return self._tool_use.unsupervised_turns(conversation)
        if not self.thinks or not any(message.reasoning or "</think>" in message.content for message in conversation.messages):
            return 0
        return len(self._structure(self._prepared(conversation), False).unsupervised)

    def _structure(self, conversation: Conversation, prompt: bool) -> Structure:
        if conversation.tools or any(message.tool_calls for message in conversation.messages):
            return build(self, conversation, prompt)
        key = (
            prompt,
            *(
                (m.role, m.loss, m.reasoning is None, bool(m.reasoning), bool(m.content), m.content == NO_SYSTEM)
                for m in conversation.messages
            ),
        )
        structure = self._structures.get(key)
        if structure is None:
            structure = build(self, conversation, prompt)
            if len(self._structures) < 2048:
                self._structures[key] = structure
        return structure

    def source(self, system: str | None = None) -> str:
        """The Jinja of this template for another program, with a system prompt for conversations that bring none.

        Args:
            system: that prompt; None for the template's default. "" adds none, and leaves what the Jinja writes by itself.
        """
        own, both = self.default_system if system is None else system, self._both_sources()
        if own is None or not own.strip():
            return both
        text = json.dumps(own, ensure_ascii=False)  # Jinja reads the escapes of JSON
        first = f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}{{% endif %}}"
        return first + "{{ '' }}" + both  # an expression, so that no line break after the block is lost

    def _both_sources(self) -> str:
        """The Jinja of this template and of that for tools as one, which chooses as we do."""
        if self._tool_use is None:
            return self.state["source"]
        parts = [template.state["source"].removesuffix("\n") for template in (self._tool_use, self)]  # as Jinja does at an end
        return "{% if tools %}{{ '' }}" + "{{ '' }}{% else %}{{ '' }}".join(parts) + "{{ '' }}{% endif %}"

    @property
    def has_place_for_tools(self) -> bool:
        """Whether the Jinja itself has a place for tools; else they are written into the messages before it sees them."""
        return self.writes_tools or self._tool_use is not None

    @property
    def all_ends(self) -> tuple[str, ...]:
        """Tokens that end an answer, with and without tools."""
        return self.ends if self._tool_use is None else tuple(sorted({*self.ends, *self._tool_use.ends}))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer, the tokenizer's own end token among them."""
        return tuple(sorted({self.eos_id} | {self.encoder.control[token] for token in self.all_ends}))

    # What happens to a conversation before the template sees it

    def _prepared(self, conversation: Conversation) -> Conversation:
        """With its system prompt settled, thoughts apart from answers, and tools as this template can write them."""
        messages = self.loss.chosen(self._with_system(conversation.messages))
        if self.thinks:
            messages = [_split_thoughts(message) for message in messages]
        tools = conversation.tools
        if tools or any(message.tool_calls or message.role == "tool" for message in messages):
            if self.writes_tools:
                messages, tools = self._shielded(messages, tools)
            else:
                messages, tools = tools_as_text(messages, tools, self.default_system), []
        return Conversation(messages, tools, shape=conversation.shape)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        has_own = bool(messages) and messages[0].role == "system"
        own = messages[0].content if has_own else self.default_system
        rest = messages[1:] if has_own else messages
        if own is None:
            return messages
        if own.strip():
            return [Message("system", own), *rest]
        return [Message("system", NO_SYSTEM), *rest] if self._system_block else rest

    def _shielded(self, messages: list[Message], tools: list[dict[str, Any]]) -> tuple[list[Message], list[dict[str, Any]]]:
        """Tools and calls with control tokens inside them written as private-use characters."""
        return [replace(message, tool_calls=self._shield(message.tool_calls)) for message in messages], self._shield(tools)

    def _shield(self, value: Any) -> Any:
        text = json.dumps(value, ensure_ascii=False)
        if any("\ue0f0" <= character <= "\uf8ff" for character in text):
            raise BadRow("private-use characters in tools", "U+E0F0 to U+F8FF")
        inside = [token for token in self._shields if token in text]
        for token in sorted(inside, key=len, reverse=True):
            text = text.replace(token, self._shields[token])
        return json.loads(text) if inside else value

    def _unshield(self, text: str, weight: float) -> list[Piece]:
        if text.isascii():
            return [Piece(text, Kind.TEMPLATE, weight)]
        names = self._shielded_tokens
        parts = re.split(r"([\ue100-\uf8ff])", text)
        return [
            Piece(names[part], Kind.CONTENT, weight) if part in names else Piece(part, Kind.TEMPLATE, weight)
            for part in parts
            if part
        ]


def _split_thoughts(message: Message) -> Message:
    """`<think>R</think>C`, or `R</think>C`, typed as one text becomes reasoning R and content C; an empty block reasoning ''."""
    if message.role != "assistant" or message.reasoning is not None or "</think>" not in message.content:
        return message
    match = THOUGHTS.match(message.content)
    if match is None:
        return message
    return replace(message, reasoning=match.group(1).strip("\n").strip(), content=match.group(2))


def _day(date: str | None) -> str:
    try:
        return datetime.date.fromisoformat(date).isoformat() if date else ""
    except ValueError as error:
        raise UserError(f"{date!r} is no date.", where="--template_date", fix="for example 2026-11-29") from error


def own_bos(tokenizer: Any) -> int | None:
    """The first token that the tokenizer itself puts before a text, or None."""
    if tokenizer.bos_token_id is None:
        return None
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None
