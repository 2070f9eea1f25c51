"""How an answer is drawn, and what an answer is: shared by all inference backends."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from megaswift.config.options import InferArguments
from megaswift.config.parse import check_number
from megaswift.errors import UserError

Message = dict[str, Any]  # role and content, and what else the chat template reads
FinishReason = Literal["stop", "length", "interrupted"]
# What must be in the range that `swift infer` declares for it, wherever it comes from: a request of the server, a script.
_NUMBERS = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "max_length")


class PromptError(UserError):
    """A conversation that cannot become a prompt (exit 2)."""


class PromptTooLongError(PromptError):
    """A prompt has more tokens than the model, or --max_length, allows (exit 2)."""


@dataclass(frozen=True)
class GenerationOptions:
    """Decoding options; the defaults are those of `swift infer`.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        do_sample, temperature: greedy when do_sample is false or temperature is 0.
        top_k: 0 for all tokens.
        stop_words: texts at which an answer ends; they are no part of it.
        max_length: longest prompt, in tokens; -1 for what the model allows.
        truncation: "delete" refuses a longer prompt, "truncation_left" drops its oldest tokens.
        seed: random state before generation; None leaves it alone.
        adapter: name of the adapter that answers, of those that the backend has; None: the model itself.
    """

    max_new_tokens: int = 2048
    do_sample: bool = True
    temperature: float = 0.3
    top_k: int = 20
    top_p: float = 0.7
    repetition_penalty: float = 1.0
    num_beams: int = 1
    stop_words: tuple[str, ...] = ()
    max_length: int = -1
    truncation: str = "delete"
    seed: int | None = 42
    adapter: str | None = None

    def __post_init__(self) -> None:
        for item in fields(InferArguments):
            if item.name in _NUMBERS:
                check_number(item, getattr(self, item.name))
        if any(not word for word in self.stop_words):
            raise UserError("an empty stop word would end every answer at once.", where="--stop_words")
        if self.truncation == "split":
            raise UserError(
                "a prompt cannot be split into several.",
                where="--truncation_strategy",
                fix="use delete (refuse prompts that are too long) or truncation_left (drop their oldest tokens)",
            )

    @classmethod
    def from_args(cls, args: InferArguments) -> GenerationOptions:
        """The decoding options of `swift infer`; raises UserError for values that cannot be."""
        return cls(
            max_new_tokens=args.max_new_tokens,
            do_sample=args.do_sample,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            num_beams=args.num_beams,
            stop_words=tuple(args.stop_words),
            max_length=args.max_length,
            truncation=args.truncation_strategy,
            seed=args.seed,
        )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.do_sample and self.temperature > 0


@dataclass(frozen=True)
class Answer:
    """A generated text.

    Attributes:
        text: the answer, without end tokens and stop words.
        prompt_tokens, tokens: lengths of the prompt and of what was generated (end token included).
        finish: "stop" (end token or stop word), "length" (max_new_tokens or the model's context) or "interrupted".
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish: FinishReason


def limited_context(allowed: int, wanted: int | None) -> int:
    """Most tokens of a prompt and its answer: --max_model_len, within what the model allows. Raises UserError."""
    if wanted is None:
        return allowed
    if wanted > allowed:
        raise UserError(
            f"--max_model_len {wanted} is more than the model's {allowed} tokens.",
            where="--max_model_len",
            fix=f"use at most {allowed}",
        )
    return wanted


def fit_prompt(ids: list[int], context: int, options: GenerationOptions) -> list[int]:
    """A prompt that leaves room for an answer: the ids, or with `truncation_left` their end.

    Raises PromptTooLongError.
    """
    limit = context - 1  # one token is left for the answer
    if options.max_length > 0:
        limit = min(limit, options.max_length)
    if len(ids) <= limit:
        return ids
    if options.truncation == "truncation_left":
        return ids[len(ids) - limit :]
    raise PromptTooLongError(
        f"the prompt has {len(ids)} tokens, but at most {limit} are possible.",
        where="--max_length" if limit == options.max_length else "the model's context (or --max_model_len)",
        fix="shorten it (in the terminal: clear), or drop its oldest tokens with --truncation_strategy truncation_left",
    )
