"""`swift infer`: a conversation in the terminal, or answers to a file of questions.

swift infer --ckpt_dir DIR
swift infer --model_type qwen2-7b-instruct --model_id_or_path DIR --val_dataset questions.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.args_file import DATASET_OPTIONS, MODEL_OPTIONS, fill_from_file, read_args_file
from megaswift.arguments import InferArguments, parse
from megaswift.errors import UserError

if TYPE_CHECKING:
    from megaswift.hf.locate import Located

TRACKER = "latest_checkpointed_iteration.txt"  # only Megatron directories have it


def infer_main(args: InferArguments | list[str]) -> list[dict[str, Any]]:
    """Answer questions from the terminal or from a file; returns the rows that the results file holds.

    Args:
        args: options, or the words of the command line.

    Raises UserError or DataError for options, folders and files that cannot work, before a model is loaded where that
    can be known.
    """
    request = prepare(parse(InferArguments, args) if isinstance(args, list) else args)
    from megaswift.inference.results import ResultWriter, check_writable

    results = None
    if request.args.save_result:
        check_writable(request.result_dir)
        results = ResultWriter(request.result_dir)
    try:
        return _talk(request, results) if request.talks else _answer_file(request, results)
    finally:
        if results is not None:
            results.close()
            if results.path is not None and results.rows:
                _note(f"{results.rows} answers are in {results.path}")


@dataclass(frozen=True)
class Request:
    """What is to be done, with everything found that can be found without loading a model.

    Attributes:
        args: options, those of the model's options file filled in.
        located: where the model is.
        talks: a conversation (True) or a file of questions (False).
    """

    args: InferArguments
    located: Located
    talks: bool

    @property
    def result_dir(self) -> Path:
        """Where results go: --result_dir, else infer_result/ in the model's directory.

        A hub cache is shared with other programs, so for a model from there it is infer_result/ in the current directory.
        """
        if self.args.result_dir is not None:
            return Path(self.args.result_dir).expanduser()
        return (self.located.path if self.located.kind == "local" else Path()) / "infer_result"


def prepare(args: InferArguments) -> Request:
    """Check the options, read the model's options file and find the model. Loads nothing."""
    from megaswift.hf.locate import locate
    from megaswift.inference.options import GenerationOptions

    directory = _model_directory(args)
    if directory is not None:
        values = read_args_file(directory)
        args = fill_from_file(args, values, MODEL_OPTIONS + (DATASET_OPTIONS if args.load_dataset_config else ()))
        if args.load_dataset_config and not values.get("dataset") and not values.get("val_dataset"):
            raise UserError(
                "--load_dataset_config true finds no dataset in the model's directory.",
                where=str(directory),
                fix="give --val_dataset FILE; only a model made from a training run has sft_args.json with its datasets",
            )
    elif args.load_dataset_config:
        raise UserError(
            "--load_dataset_config true needs a model directory.", where="--load_dataset_config", fix="give --ckpt_dir DIR"
        )
    GenerationOptions.from_args(args)
    if args.infer_batch_size < 1:
        raise UserError(
            f"--infer_batch_size {args.infer_batch_size} is not possible.", where="--infer_batch_size", fix="use 1 or more"
        )
    talks = _talks(args)
    if directory is not None:
        located = locate(args.model_type, str(directory), args.model_revision)
    else:
        located = locate(args.model_type, args.model_id_or_path, args.model_revision)
    return Request(args, located, talks)


def _model_directory(args: InferArguments) -> Path | None:
    """The local directory of the model, or None for a model that is looked up by name."""
    if args.ckpt_dir is None:
        if args.model_type is None and args.model_id_or_path is None:
            fix = "give --ckpt_dir DIR, or --model_type NAME, or --model_id_or_path DIR"
            raise UserError("no model is named.", where="command line", fix=fix)
        path = Path(args.model_id_or_path).expanduser() if args.model_id_or_path else None
        if path is None or not path.is_dir():
            return None
        _refuse_megatron(path, "--model_id_or_path")
        return path
    if args.model_id_or_path is not None:
        raise UserError(
            "--ckpt_dir and --model_id_or_path both name a model.", where="command line", fix="leave one of them out"
        )
    path = Path(args.ckpt_dir).expanduser()
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}.", where="--ckpt_dir", fix="give a directory made by `swift export --to_hf true`")
    _refuse_megatron(path, "--ckpt_dir")
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} holds no config.json, so it is no Hugging Face model.", where="--ckpt_dir", fix=_nearby_models(path)
        )
    return path


def _refuse_megatron(path: Path, flag: str) -> None:
    """Megatron weights cannot be loaded here; say how they become a model that can."""
    if not (path / TRACKER).is_file():
        return
    fix = f"swift export --ckpt_dir {path} --to_hf true"
    exported = _exported_models(path)
    if exported:
        fix += f"\n         or, made earlier: swift infer --ckpt_dir {exported[-1]}"
    raise UserError(f"{path} holds Megatron weights, not a Hugging Face model.", where=flag, fix=fix)


def _exported_models(path: Path) -> list[Path]:
    return sorted((file.parent for file in path.glob("*-hf/config.json")), key=lambda place: place.stat().st_mtime)


def _nearby_models(path: Path) -> str:
    """What to do about a directory without a model: name those just below it."""
    below = _exported_models(path) or sorted(file.parent for file in path.glob("*/config.json"))
    runs = sorted(file.parent for file in path.glob(f"*/{TRACKER}"))
    if below:
        return f"swift infer --ckpt_dir {below[-1]}"
    if runs:
        return f"swift export --ckpt_dir {runs[-1]} --to_hf true"
    return "give a directory made by `swift export --to_hf true`"


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
    from megaswift.inference.transformers_backend import TransformersBackend

    args, located = request.args, request.located
    dtype = args.dtype
    if not _has_gpu() and dtype in ("bf16", "fp16"):
        if "dtype" in args.explicit():
            _note(f"{dtype} on a CPU is slower than fp32; leave --dtype out for fp32")
        else:  # the precision in which a GPU trained it: fp32 holds the same values and is faster here
            dtype = "AUTO"
    backend = TransformersBackend.load(
        located.path, dtype=dtype, template_type=args.template_type, model_type=located.model_type
    )
    _note(f"{located.model_type} from {located.path} ({backend.description})")
    if args.num_beams > 1 and args.stream:
        _note(f"beam search cannot stream: with --num_beams {args.num_beams} each answer appears when it is complete")
    return backend


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _talk(request: Request, results: Any) -> list[dict[str, Any]]:
    from megaswift.inference.chat import WORDS, Conversation, Terminal
    from megaswift.inference.options import GenerationOptions

    backend, args = _load(request), request.args
    terminal = Terminal()
    if terminal.person:
        width = max(len(word) for word, _ in WORDS)
        terminal.say("".join(f"  {word:<{width}}  {meaning}\n" for word, meaning in WORDS))
    options = GenerationOptions.from_args(args)
    return Conversation(backend, options, terminal, args.system, results, args.stream).run()


def _answer_file(request: Request, results: Any) -> list[dict[str, Any]]:
    from megaswift.inference.options import GenerationOptions
    from megaswift.inference.questions import answer_questions, read_questions

    questions = read_questions(request.args)  # before the model is loaded: a bad file is told at once
    backend = _load(request)
    args = request.args
    return answer_questions(
        backend,
        questions,
        GenerationOptions.from_args(args),
        batch_size=args.infer_batch_size,
        stream=args.stream,
        results=results,
    )


def _note(text: str) -> None:
    """A line about the program, beside the conversation: stdout holds questions and answers only."""
    print(text, file=sys.stderr, flush=True)
