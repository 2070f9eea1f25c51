"""Conversations as prompts: the same template and the same tokens as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from megaswift.data.chat import ChatTemplate
from megaswift.data.conversation import BadRow, Conversation
from megaswift.data.messages import read_messages
from megaswift.inference.options import PromptError
from megaswift.models.registry import MODEL_TYPES

_MARK = "\ue0e0"  # a private-use character, which no template writes


class Prompts:
    """Turns conversations into token ids.

    Args:
        tokenizer: a Hugging Face tokenizer with a fast backend.
        template_type: name of a template; AUTO is the tokenizer's own, else that of the model type.
        model_type: registered name of the model, or None.
    """

    def __init__(self, tokenizer: Any, *, template_type: str = "AUTO", model_type: str | None = None) -> None:
        self.template = ChatTemplate(tokenizer, template_type, fallback=fallback_template(model_type))

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens with which the template ends an answer."""
        control = self.template.encoder.control
        return frozenset(control[token] for token in self.template.all_ends)

    def ids(self, messages: Sequence[Mapping[str, Any]] | Conversation) -> list[int]:
        """Token ids up to where the assistant begins.

        Args:
            messages: role and content, the question last. Without a system message the template adds its own, if it has
                one; a system message with empty content means that there is none.

        Raises PromptError where the template refuses the conversation.
        """
        try:
            conversation = (
                messages
                if isinstance(messages, Conversation)
                else Conversation(read_messages([dict(item) for item in messages]))
            )
            return self.template.prompt(conversation).tolist()
        except BadRow as error:
            raise PromptError(
                f"this conversation cannot become a prompt: {error}.",
                fix="change it, or choose another template with --template_type",
            ) from error

    def system_text(self, system: str | None) -> str | None:
        """The system prompt that the model sees: `system`, or for None the template's own; None where there is none."""
        return (self._default_system if system is None else system) or None

    @cached_property
    def _default_system(self) -> str | None:
        """The system prompt that the template adds by itself, read from what it writes."""
        if self.template.default_system is not None:
            return self.template.default_system
        user = {"role": "user", "content": "x"}
        try:
            plain = self.template.render([user], [], True)
            before, found, after = self.template.render([{"role": "system", "content": _MARK}, user], [], True).partition(_MARK)
        except BadRow:
            return None  # a template without system prompts
        if found and plain.startswith(before) and plain.endswith(after) and len(plain) >= len(before) + len(after):
            return plain[len(before) : len(plain) - len(after)]
        return None


def fallback_template(model_type: str | None) -> str | None:
    """The named template of a registered model, for a tokenizer that brings none; None where nothing is known."""
    entry = MODEL_TYPES.get(model_type or "")
    return entry.template if entry is not None else None
