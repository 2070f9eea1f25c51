"""`swift infer`: a conversation in the terminal, or answers to a file of questions.

swift infer --ckpt_dir DIR         (also a run of swift sft that still goes on: its newest complete checkpoint)
swift infer --model_type qwen2-7b-instruct --model_id_or_path DIR --val_dataset questions.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.config.files import DATASET_OPTIONS
from megaswift.config.options import InferArguments, parse
from megaswift.errors import UserError
from megaswift.inference.model_ref import ModelRef, choose, gives_scores
from megaswift.inference.options import GenerationOptions
from megaswift.inference.results import ResultWriter, check_writable

if TYPE_CHECKING:
    from megaswift.hub.locate import Located


# Options that mean nothing where rows are scored.
_OF_ANSWERS = (
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "stop_words", "stream", "resume_result",
    "max_length", "gpu_memory_utilization", "tensor_parallel_size",
)  # fmt: skip


def infer_main(args: InferArguments | list[str]) -> list[dict[str, Any]]:
    """Answer questions from the terminal or from a file; returns the rows that the results file holds.

    Args:
        args: options, or the words of the command line.

    Raises UserError or DataError for options, folders and files that cannot work, before a model is loaded where that
    can be known.
    """
    request = prepare(parse(InferArguments, args) if isinstance(args, list) else args)
    results = None
    if request.args.save_result:
        check_writable(request.result_dir)
        results = ResultWriter(request.result_dir, go_on=request.args.resume_result)
    try:
        if gives_scores(request.chosen):
            return _score_file(request, results)
        return _talk(request, results) if request.talks else _answer_file(request, results)
    finally:
        if results is not None:
            results.close()
            if results.path is not None and results.rows:
                verb = "answer is" if results.rows == 1 else "answers are"
                _note(f"{results.rows} {verb} in {results.path}")


@dataclass(frozen=True)
class Request:
    """What is to be done, with everything found that can be found without converting or loading a model.

    Attributes:
        args: options, those of the model's options file filled in.
        chosen: which model.
        talks: a conversation (True) or a file of questions (False).
    """

    args: InferArguments
    chosen: ModelRef
    talks: bool

    @property
    def result_dir(self) -> Path:
        """Where results go: --result_dir, else infer_result/ in the model's directory.

        A hub cache is shared with other programs, so for a model from there it is infer_result/ in the current directory.
        """
        if self.args.result_dir is not None:
            return Path(self.args.result_dir).expanduser()
        return (self.chosen.home or Path()) / "infer_result"

    @cached_property
    def located(self) -> Located:
        """The model's Hugging Face folder; for Megatron weights it is made now."""
        return self.chosen.locate()


def prepare(args: InferArguments) -> Request:
    """Check the options, read the model's options file and find the model. Loads nothing."""
    from megaswift.inference.backends import check_backend

    check_backend(args)
    chosen = choose(args, DATASET_OPTIONS if args.load_dataset_config else ())
    values, args = chosen.values, chosen.args
    if args.load_dataset_config and chosen.directory is None:
        raise UserError(
            "--load_dataset_config true needs a model directory.", where="--load_dataset_config", fix="give --ckpt_dir DIR"
        )
    if args.load_dataset_config and not values.get("dataset") and not values.get("val_dataset"):
        raise UserError(
            "--load_dataset_config true finds no dataset in the model's directory.",
            where=str(chosen.directory),
            fix="give --val_dataset FILE; only a model made from a training run has sft_args.json with its datasets",
        )
    _check_held_out(args, values)
    if len(chosen.named) > 1 and not _talks(args):
        raise UserError(
            "a file of questions is answered by one model.",
            where="--adapters",
            fix=f"name one of {', '.join(chosen.named)}; or compare them: swift eval --compare base=MODEL NAME=DIR ...",
        )
    GenerationOptions.from_args(args)
    request = Request(args, chosen, _talks(args))
    if not chosen.megatron:
        _ = request.located  # a model that cannot be found is told before anything else is done
    return request


def _check_held_out(args: InferArguments, values: dict[str, Any]) -> None:
    """Raise UserError where the questions would be rows that a run held out, and it held none out."""
    if values.get("streaming") is True and args.dataset and not args.val_dataset and args.dataset == values.get("dataset"):
        raise UserError(
            "the run that made the model streamed its data and held no row out: what it read, it was trained on.",
            where="--dataset" if "dataset" in args.explicit() else "--load_dataset_config",
            fix="give questions of their own: --val_dataset FILE",
        )


def _talks(args: InferArguments) -> bool:
    """Whether this is a conversation; raises UserError where the options say both or neither."""
    has_questions = bool(args.dataset or args.val_dataset)
    if args.eval_human is None:
        return not has_questions
    if args.eval_human and has_questions:
        raise UserError(
            "a dataset is given, but --eval_human true asks for a conversation.",
            where="--eval_human",
            fix="leave one of them out",
        )
    if not args.eval_human and not has_questions:
        raise UserError("--eval_human false needs questions.", where="--eval_human", fix="give --val_dataset FILE")
    return args.eval_human


def _load(request: Request) -> Any:
    from megaswift.inference.backends import load_backend

    args, located = request.args, request.located
    backend = load_backend(args, located.path, located.model_type, adapters=request.chosen.named)
    _note(f"{located.model_type} from {located.origin if request.chosen.megatron else located.path} ({backend.description})")
    if args.num_beams > 1 and args.stream:
        _note(f"beam search cannot stream: with --num_beams {args.num_beams} each answer appears when it is complete")
    return backend


def _talk(request: Request, results: Any) -> list[dict[str, Any]]:
    from megaswift.inference.chat import WORDS, Conversation, Terminal

    backend, args = _load(request), request.args
    terminal = Terminal()
    if terminal.person:
        width = max(len(word) for word, _ in WORDS)
        terminal.say("".join(f"  {word:<{width}}  {meaning}\n" for word, meaning in WORDS))
    return Conversation(
        backend, _options(request), terminal, args.system, results, args.stream, adapters=tuple(request.chosen.named)
    ).run()


def _options(request: Request) -> GenerationOptions:
    """How answers are drawn; of several adapters the first answers until another is asked for."""
    return replace(GenerationOptions.from_args(request.args), adapter=next(iter(request.chosen.named), None))


def _answer_file(request: Request, results: Any) -> list[dict[str, Any]]:
    from megaswift.inference.questions import answer_questions, read_questions

    questions = read_questions(request.args)  # before the model is loaded: a bad file is told at once
    backend = _load(request)
    args = request.args
    return answer_questions(
        backend,
        questions,
        _options(request),
        batch_size=args.infer_batch_size,
        stream=args.stream,
        results=results,
    )


def _score_file(request: Request, results: Any) -> list[dict[str, Any]]:
    """Rows scored by a reward model, or one that gives classes."""
    from megaswift.inference.scores import Scorer, read_rows, score_file

    if request.talks:
        raise UserError(
            "this model gives scores and no answers.", where="swift infer", fix="give rows to score: --val_dataset FILE"
        )
    given = request.args.explicit()
    meaningless = next((name for name in _OF_ANSWERS if name in given), None)
    if meaningless is None and request.args.infer_backend == "vllm":
        meaningless = "infer_backend"
    if meaningless is not None:
        raise UserError(
            f"--{meaningless} is about answers, and this model gives scores.", where=f"--{meaningless}", fix="leave it out"
        )
    rows = read_rows(request.args)
    scorer = Scorer.load(request.args, request.located)
    _note(f"{request.located.model_type} from {request.located.path} ({scorer.description})")
    return score_file(scorer, rows, request.args.infer_batch_size, results)


def _note(text: str) -> None:
    """A line about the program, beside the conversation: stdout holds questions and answers only."""
    print(text, file=sys.stderr, flush=True)
