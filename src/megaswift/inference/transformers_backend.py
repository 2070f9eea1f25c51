"""Answers by transformers: one model on one device, in left-padded batches or as a stream of text."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megaswift.data.conversation import Conversation
from megaswift.errors import NonFiniteError, UserError
from megaswift.inference import decoding
from megaswift.inference.loading import load_model, load_tokenizer
from megaswift.inference.options import Answer, FinishReason, GenerationOptions, Message, fit_prompt, limited_context
from megaswift.inference.prompts import Prompts
from megaswift.inference.text import StopWords, TextAssembler, first_stop, whole_text
from megaswift.models.lengths import context_length
from megaswift.models.whole import text_of

_WINDOW = 32  # batches that are sorted by length together: short enough that results keep coming


class TransformersBackend:
    """A loaded model with its tokenizer and prompt format.

    Attributes:
        model, tokenizer: of transformers; the model's own generation settings are emptied, except its end tokens.
        prompts: conversations -> token ids.
        context: most tokens of a prompt and its answer together.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: Prompts, max_model_len: int | None = None) -> None:
        from transformers import GenerationConfig

        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.context = limited_context(context_length(text_of(model.config)), max_model_len)
        self._adapted: Any = None  # PEFT's view of the same model
        self._ends = decoding.end_ids(model, tokenizer) | prompts.end_ids
        # generate() fills what a caller leaves open from here; nothing may come from a file that the user never saw.
        model.generation_config = GenerationConfig()

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str = "AUTO",
        template_type: str = "AUTO",
        model_type: str | None = None,
        max_model_len: int | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> TransformersBackend:
        """Load a Hugging Face directory.

        Args:
            path: config.json, safetensors and tokenizer files; code in it is never run.
            dtype: AUTO (bf16 on a GPU that has it, fp32 on a CPU), bf16, fp16 or fp32.
            template_type: name of the chat template; AUTO is the tokenizer's own, else that of the model type.
            model_type: registered name, for the template of a tokenizer that brings none.
            max_model_len: most tokens of a prompt and its answer together; None for what the model allows.
            adapters: name -> directory of LoRA adapters in PEFT's form that answer by name, see GenerationOptions.

        Raises DataError for a folder that is damaged or incomplete.
        """
        tokenizer = load_tokenizer(path)
        prompts = Prompts(tokenizer, template_type=template_type, model_type=model_type)
        made = cls(load_model(path, dtype), tokenizer, prompts, max_model_len)
        for name, directory in (adapters or {}).items():
            made._add_adapter(name, directory)
        return made

    def _add_adapter(self, name: str, directory: Path) -> None:
        """Load an adapter into the model's layers, beside those that are there."""
        if self._adapted is None:
            from peft import PeftModel

            self._adapted = PeftModel.from_pretrained(self.model, str(directory), adapter_name=name)
        else:
            self._adapted.load_adapter(str(directory), adapter_name=name)
        self._adapted.eval()

    @contextlib.contextmanager
    def _answering(self, adapter: str | None) -> Iterator[None]:
        """Let the model compute with one of its adapters, or with none."""
        if self._adapted is None:
            yield
        elif adapter is None:
            with self._adapted.disable_adapter():
                yield
        else:
            self._adapted.set_adapter(adapter, inference_mode=True)
            yield

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the model computes."""
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def description(self) -> str:
        """Device and precision, for the header of a conversation."""
        return f"{self.model.device}, {str(self.model.dtype).removeprefix('torch.')}"

    def close(self) -> None:
        """Nothing has to be ended: memory is free when nobody holds the backend any more."""

    def prompt_ids(self, messages: Sequence[Message] | Conversation, options: GenerationOptions) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins.

        Raises PromptTooLongError, or drops the oldest tokens with `truncation_left`.
        """
        return fit_prompt(self.prompts.ids(messages), self.context, options)

    def generate(
        self, conversations: Sequence[Sequence[Message] | Conversation], options: GenerationOptions, *, batch_size: int = 1
    ) -> list[Answer]:
        """Answers to conversations, in their order. Raises PromptTooLongError for the first that is too long."""
        answers: list[Answer | None] = [None] * len(conversations)
        prompts = [self.prompt_ids(messages, options) for messages in conversations]
        for place, answer in self.answer_all(prompts, options, batch_size=batch_size):
            answers[place] = answer
        return [answer for answer in answers if answer is not None]

    def answer_all(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        batch_size: int = 1,
        given_up: Callable[[int], bool] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Answers to prompts (from `prompt_ids`) as (index of the prompt, answer), each batch as soon as it is done.

        Prompts of similar length share a batch, so order of arrival differs from order of asking by at most 32 batches.
        An answer that is `given_up` (see Backend) ends at the token that it is at; a batch ends with its last other one.
        """
        for start in range(0, len(prompts), _WINDOW * batch_size):
            window = range(start, min(start + _WINDOW * batch_size, len(prompts)))
            by_length = sorted(window, key=lambda place: -len(prompts[place]))  # the largest first: out of memory shows early
            for first in range(0, len(by_length), batch_size):
                places = by_length[first : first + batch_size]
                seed = None if options.seed is None else options.seed + min(places)
                stops = None if given_up is None else [partial(given_up, place) for place in places]
                answers = self._generate_batch([prompts[place] for place in places], options, seed, stops)
                for place, answer in zip(places, answers, strict=True):
                    if given_up is None or not given_up(place):
                        yield place, answer

    def stream(self, messages: Sequence[Message] | Conversation, options: GenerationOptions) -> AnswerStream:
        """Pieces of the answer while it is made; with beams, which end together, the whole answer as one piece."""
        return self.stream_ids(self.prompt_ids(messages, options), options)

    def stream_ids(self, prompt: Sequence[int], options: GenerationOptions) -> AnswerStream:
        """`stream` for a prompt of token ids."""
        return AnswerStream(self, list(prompt), options)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        seed: int | None,
        *,
        streamer: Any = None,
        stops: Sequence[Callable[[], bool]] | None = None,
    ) -> torch.Tensor:
        """One call of the model's generate().

        Args:
            prompts: token ids; shorter ones are padded on the left.
            streamer: gets the prompt, then each token, as transformers' streamers do.
            stops: for each prompt, whether its answer is to end now.

        Returns ids of shape [batch, longest prompt + longest answer].
        """
        device = self.model.device
        longest = max(map(len, prompts))
        pad = self._pad_id()
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        room = [min(options.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        if seed is not None:
            torch.manual_seed(seed)
        try:
            with self._answering(options.adapter):
                return self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=decoding.generation_config(options, max(room), sorted(self._end_ids(options)), pad),
                    logits_processor=decoding.processors(options, mask, ids),
                    stopping_criteria=decoding.criteria(self.tokenizer, options, longest, room, stops),
                    streamer=streamer,
                )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is full ({len(prompts)} prompts of up to {longest} tokens).",
                fix="lower --infer_batch_size, --max_length or --max_new_tokens",
            ) from error
        except RuntimeError as error:
            if "probability tensor contains" in str(error):
                raise NonFiniteError(
                    "the model's output is not a number.", fix="try --dtype fp32; check the weights"
                ) from error
            raise

    def _generate_batch(
        self,
        prompts: list[Sequence[int]],
        options: GenerationOptions,
        seed: int | None,
        stops: Sequence[Callable[[], bool]] | None = None,
    ) -> list[Answer]:
        output = self.run(prompts, options, seed, stops=stops)
        longest = max(map(len, prompts))
        return [self.finished(prompt, row, options) for prompt, row in zip(prompts, output[:, longest:].tolist(), strict=True)]

    def finished(
        self, prompt: Sequence[int], generated: Sequence[int], options: GenerationOptions, interrupted: bool = False
    ) -> Answer:
        """The answer in a row of generated tokens: up to its end token, its length limit or a stop word."""
        ends = self._end_ids(options)
        limit = min(options.max_new_tokens, self.context - len(prompt))
        count = next((place + 1 for place, token in enumerate(generated) if token in ends), None)
        finish: FinishReason = "stop" if count is not None and count <= limit else "interrupted" if interrupted else "length"
        kept = list(generated[: min(count or limit, limit)])
        text = whole_text(self.tokenizer, kept[:-1] if finish == "stop" else kept)
        cut = first_stop(text, options.stop_words)
        if cut is not None:
            text, finish = text[:cut], "stop"
            kept = kept[: _tokens_until_stop(self.tokenizer, kept, options.stop_words)]
        return Answer(text, len(prompt), len(kept), finish)

    def _end_ids(self, options: GenerationOptions) -> frozenset[int]:
        return self._ends | decoding.special_stop_ids(self.tokenizer, options.stop_words)

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self._ends, default=0)


def _tokens_until_stop(tokenizer: Any, ids: list[int], words: Sequence[str]) -> int:
    """How many tokens it took until a stop word was complete."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if first_stop(whole_text(tokenizer, ids[:middle]), words) is None:
            low = middle + 1
        else:
            high = middle
    return low


class AnswerStream(Iterator[str]):
    """Pieces of one answer. The model runs in a thread, so that Ctrl-C reaches the reader at once.

    Iterate to the end, or call `stop()`; then `answer` holds the whole.
    """

    def __init__(self, backend: TransformersBackend, prompt: list[int], options: GenerationOptions) -> None:
        self._backend, self._prompt, self._options = backend, prompt, options
        self._tokens: Tokens = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._generated: list[int] = []
        self._assembler = TextAssembler(backend.tokenizer)
        self._words = StopWords(options.stop_words)
        self._ends = backend._end_ids(options)
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer, or what there is of it so far."""
        return self._answer or self._backend.finished(self._prompt, self._generated, self._options, interrupted=True)

    def __next__(self) -> str:
        if self._answer is not None:
            raise StopIteration
        if self._options.num_beams > 1:
            [self._answer] = self._backend._generate_batch([self._prompt], self._options, self._options.seed)
            return self._answer.text
        if self._thread is None:
            work = (self._backend, self._prompt, self._options, self._tokens, self._stopped)
            self._thread = threading.Thread(target=_generate_into, args=work, name="generate", daemon=True)
            self._thread.start()
        while True:
            token = self._tokens.get()
            if isinstance(token, BaseException):
                self._thread.join()
                raise token
            if token is None:
                return self._last_piece()
            self._generated.append(token)
            if token not in self._ends and not self._words.found:
                piece = self._words.feed(self._assembler.push(token))
                if piece:
                    return piece

    def stop(self) -> Answer:
        """End generation now and return what there is; later pieces are dropped."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if self._answer is None:
            self._answer = self.answer
        return self._answer

    def _last_piece(self) -> str:
        assert self._thread is not None
        self._thread.join()
        self._answer = self._backend.finished(self._prompt, self._generated, self._options)
        return self._words.feed(self._assembler.flush()) + self._words.flush()

    def __del__(self) -> None:
        self._stopped.set()  # nobody reads any more


Tokens = queue.SimpleQueue  # of int, then None at the end or the exception that ended it


def _generate_into(
    backend: TransformersBackend, prompt: list[int], options: GenerationOptions, tokens: Tokens, stopped: threading.Event
) -> None:
    """What the thread does; it holds no reference to the stream, so that a stream nobody reads can end it."""
    try:
        backend.run([prompt], options, options.seed, streamer=_ToQueue(tokens), stops=[stopped.is_set])
    except BaseException as error:
        tokens.put(error)
    else:
        tokens.put(None)


class _ToQueue:
    """A transformers streamer that hands on each generated token."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self._prompt_seen = tokens, False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt once, then with each token."""
        if self._prompt_seen:
            for token in value.reshape(-1).tolist():
                self._tokens.put(token)
        self._prompt_seen = True

    def end(self) -> None:
        """Called after the last token."""
