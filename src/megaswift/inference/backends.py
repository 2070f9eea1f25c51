"""Which backend answers, and how it is loaded: transformers (pt) or vLLM, behind one interface."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megaswift.config.options import BackendArguments
from megaswift.data.conversation import Conversation
from megaswift.errors import UserError
from megaswift.inference.options import Answer, GenerationOptions, Message
from megaswift.inference.prompts import Prompts

if TYPE_CHECKING:
    import torch

_BATCH = {"infer_batch_size", "eval_batch_size"}  # vLLM has its own idea of how many answers fit, unless the user gives one

_VLLM_ONLY = ("gpu_memory_utilization", "tensor_parallel_size")


class Stream(Iterator[str], Protocol):
    """Pieces of one answer while it is made."""

    @property
    def answer(self) -> Answer:
        """The whole answer, or what there is of it so far."""

    def stop(self) -> Answer:
        """End generation now and return what there is."""


class Backend(Protocol):
    """What answers.

    Attributes:
        tokenizer: of transformers.
        prompts: conversations -> token ids.
        context: most tokens of a prompt and its answer together.
        dtype: torch's, in which the model computes.
        description: device and precision, in words.
    """

    tokenizer: Any
    prompts: Prompts
    context: int

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def description(self) -> str: ...

    def prompt_ids(self, messages: Sequence[Message] | Conversation, options: GenerationOptions) -> list[int]:
        """Token ids up to where the assistant begins. Raises PromptTooLongError."""

    def answer_all(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        batch_size: int = 1,
        given_up: Callable[[int], bool] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Answers as (index of the prompt, answer), as they are done.

        `given_up` says, while they are made, whether nobody waits for that of a prompt any more: it ends and does not come.
        """

    def stream(self, messages: Sequence[Message] | Conversation, options: GenerationOptions) -> Stream:
        """One answer, piece by piece."""

    def stream_ids(self, prompt: Sequence[int], options: GenerationOptions) -> Stream:
        """One answer to a prompt of token ids, piece by piece."""


def pick_backend(name: str) -> str:
    """pt or vllm, from --infer_backend. Raises UserError where vLLM is wanted and cannot be had."""
    if name == "pt":
        return "pt"
    if name == "vllm":
        if find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed.",
                where="--infer_backend vllm",
                fix="on NVIDIA GPUs, in the checkout: pip install '.[vllm]'; on a CPU see docs/evaluation.md; or use --infer_backend pt",
            )
        return "vllm"
    return "vllm" if find_spec("vllm") is not None and _has_gpu() else "pt"


def check_backend(args: BackendArguments) -> None:
    """Raise UserError for options of the backend that cannot be, before a model is loaded.

    `args` as the user gave them: which options those were is asked.
    """
    if pick_backend(args.infer_backend) == "pt":
        _refuse_vllms(args)


def _refuse_vllms(args: BackendArguments) -> None:
    """Raise UserError where an option is given that only vLLM has, and pt answers."""
    given = [name for name in _VLLM_ONLY if name in args.explicit()]
    if given:
        picked = "" if args.infer_backend == "pt" else f" (--infer_backend {args.infer_backend} is pt here)"
        raise UserError(
            f"--{given[0]} is vLLM's: it does nothing with pt.",
            where=f"--{given[0]}{picked}",
            fix="leave it out, or use --infer_backend vllm",
        )


def load_backend(
    args: BackendArguments,
    path: Path,
    model_type: str | None,
    *,
    repeatable: bool = False,
    adapters: Mapping[str, Path] | None = None,
) -> Any:
    """Load a Hugging Face folder into the backend that the options name.

    Args:
        args: --infer_backend, --dtype, --template_type and the backend's own options.
        path: the folder.
        model_type: registered name, for the template of a tokenizer that brings none.
        repeatable: vLLM makes the same batches of the same prompts in every run; pt always does.
        adapters: name -> directory of LoRA adapters that are loaded beside the model (`GenerationOptions.adapter`).
    """
    common: dict[str, Any] = {
        "dtype": usable_dtype(args),
        "template_type": args.template_type,
        "model_type": model_type,
        "max_model_len": args.max_model_len,
        "adapters": adapters or {},
    }
    if pick_backend(args.infer_backend) == "vllm":
        from megaswift.inference.vllm_backend import STARTING, VllmBackend

        note(STARTING)
        return VllmBackend.load(
            path,
            gpu_memory_utilization=args.gpu_memory_utilization,
            tensor_parallel_size=args.tensor_parallel_size,
            max_num_seqs=next((getattr(args, name) for name in _BATCH & args.explicit()), None),
            seed=args.seed,
            repeatable=repeatable,
            **common,
        )
    from megaswift.inference.transformers_backend import TransformersBackend

    return TransformersBackend.load(path, **common)


def usable_dtype(args: BackendArguments) -> str:
    """--dtype for this machine: on a CPU fp32 in place of the precision in which a GPU trained the model."""
    if _has_gpu() or args.dtype not in ("bf16", "fp16"):
        return args.dtype
    if "dtype" in args.explicit():
        note(f"{args.dtype} on a CPU is slower than fp32; leave --dtype out for fp32")
        return args.dtype
    return "AUTO"  # fp32, which holds the same values and is faster here


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def empty_gpu() -> None:
    """Give memory that nothing holds any more back to the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def note(text: str) -> None:
    """A line about the program on stderr: stdout holds questions, answers and results only."""
    print(text, file=sys.stderr, flush=True)
