"""What a run is made of before any rank starts: chat template, tokenized data, and the Run that ranks read.

start = resolve_source(args)
template = template_of(start.args, start)
data = prepared(start.args, template, start)
run = resolved(start.args, start, data, processes, run_dir, template.pad_id)
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.config.files import read_args_file
from megaswift.config.options import PtArguments, RlhfArguments, SftArguments
from megaswift.data.blend import parse_weighted
from megaswift.data.labels import Classes
from megaswift.data.preference import LABELLED, MARGINS, MISMATCHED, PAIRS
from megaswift.errors import UserError
from megaswift.models.head import labels_of
from megaswift.models.registry import MODEL_TYPES
from megaswift.models.whole import picture_ids, whole_of
from megaswift.run.head import head_asked, method_of
from megaswift.run.objective import objective_of
from megaswift.run.problems import contradictions, problems, refuse
from megaswift.run.resolve import World, global_batch_size, resolve
from megaswift.run.source import TrainingSource
from megaswift.run.spec import DataRef, Run
from megaswift.store.cache import cache_root
from megaswift.terminal import typed
from megaswift.weights.hf.tokenizer import read_tokenizer, require_embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.data.chat import ChatTemplate
    from megaswift.data.encode import PreparedData
    from megaswift.data.text import TextTokens

TAGS = ("<image>", "<video>", "<audio>")  # where a row's pictures, videos and sounds belong, as ms-swift writes it


def template_of(args: SftArguments, start: TrainingSource) -> ChatTemplate | TextTokens:
    """The chat template of the run; of text, which has none, what makes tokens of it."""
    if not args.dataset:
        fix = f"for example: --dataset {'books.jsonl' if isinstance(args, PtArguments) else 'self-cognition#500 my_rows.jsonl'}"
        if start.run_dir is not None:
            run, options = typed(start.run_dir), typed(start.run_dir / "sft_args.json")
            fix = f"the same data as before; all options of the run: swift {args.VERB} {options} --resume_from_checkpoint {run}"
        raise UserError("no training data is named.", where="--dataset", fix=fix)
    tokenizer = read_tokenizer(start.root)
    if isinstance(args, PtArguments):
        from megaswift.data.text import TextTokens

        return TextTokens(tokenizer)
    from megaswift.data.chat import ChatTemplate
    from megaswift.data.loss_rules import LossRules

    began = (
        read_args_file(start.root).get("template_date") if start.run_dir else None
    )  # else the rows would be others every day
    date = args.template_date or began or datetime.date.today().isoformat()
    return ChatTemplate(
        tokenizer,
        args.template_type,
        args.system,
        fallback=_registered_template(args),
        date=date,
        loss=LossRules.parse(args.loss_scale),
        pictures=picture_marks(tokenizer, start.config),
    )


def picture_marks(tokenizer: Any, config: PreTrainedConfig) -> tuple[str, ...]:
    """What stands for a picture in the text of rows, for models that read pictures: common tags, and the model's own tokens."""
    ids = picture_ids(config)
    tokens = [token for token in tokenizer.convert_ids_to_tokens(list(ids)) if isinstance(token, str)] if ids else []
    return tuple(dict.fromkeys((*TAGS, *tokens))) if whole_of(config) is not None else ()


def _registered_template(args: SftArguments) -> str | None:
    entry = MODEL_TYPES.get(args.model_type or "")
    return entry.template if entry else None


def streamed_rows(args: SftArguments, world_size: int, batch: int | None = None) -> int | None:
    """Training rows that a streamed run needs, `batch` a step where that is kept; None where all data is read."""
    if not args.streaming:
        return None
    if args.max_steps <= 0:
        raise UserError(
            "streamed data has no length, so the number of steps must be given.", where="--streaming", fix="add --max_steps N"
        )
    return args.max_steps * (batch or global_batch_size(args, world_size))


def prepared(
    args: SftArguments, template: ChatTemplate | TextTokens, start: TrainingSource, stream_rows: int | None = None
) -> PreparedData:
    """The data of a run. Raises DataError for a token without a row in the embedding, in the rows or in the tokenizer alone."""
    table = start.config.vocab_size
    if isinstance(args, PtArguments):
        data = _text(args, template, table)
    else:
        from megaswift.data.encode import prepare

        chats: Any = template
        data = prepare(
            args, chats, cache_dir=cache_root(), packing=args.packing, stream_rows=stream_rows, table=table,
            preferences=preferences_of(args),
        )  # fmt: skip
    require_embedding_rows(template.vocabulary, table, start.root)
    return data


def _text(args: PtArguments, tokens: Any, table: int) -> PreparedData:
    """Rows of text. Raises UserError where options say twice how much is trained on, or of a blend by weights not at all."""
    from megaswift.data.pretrain import prepare_text

    if args.train_tokens is not None and args.max_steps > 0:
        raise UserError(
            "--train_tokens and --max_steps both say how much is trained on.",
            where="--train_tokens, --max_steps",
            fix="give one of the two",
        )
    blend = parse_weighted(args.dataset, args.custom_dataset_info)
    if len(blend) > 1 and blend[0][1] is not None and args.train_tokens is None and args.max_steps <= 0:
        raise UserError(
            "weights say how a blend is shared out, and nothing says how much of it is trained on.",
            where="--dataset, --train_tokens",
            fix="add --train_tokens 500M or --max_steps N; without weights an epoch is every document once",
        )
    return prepare_text(args, tokens, cache_dir=cache_root(), table=table)


def preferences_of(args: SftArguments) -> str | Classes:
    """What the rows of a run are taken for, as `prepare` has it."""
    method, head = method_of(args), head_asked(args)
    if method is None:
        return "" if head is None else Classes(str(head.problem), head.labels)
    if head is not None:
        return MARGINS
    if not isinstance(args, RlhfArguments):  # to be looked at: what KTO measures its distance by is left out
        return LABELLED if method == "kto" else PAIRS
    objective = objective_of(args)
    return PAIRS if objective.pairs else MISMATCHED if objective.looks_ahead else LABELLED


def resolved(
    args: SftArguments,
    start: TrainingSource,
    data: PreparedData,
    processes: int,
    run_dir: Path,
    pad_id: int,
    earlier_batch: int | None = None,
    end_ids: tuple[int, ...] = (),
) -> Run:
    """Everything that follows from options, model, rows and processes. Raises UserError or DataError for what cannot work.

    Args:
        earlier_batch: rows of a step where an earlier part of the run fixed them; it divides into batch_size x dp.
    """
    rows = DataRef(
        train=str(data.train.path),
        val=str(data.val.path) if data.val is not None else None,
        train_rows=len(data.train),
        val_rows=len(data.val) if data.val is not None else 0,
        pad_id=pad_id if labels_of(start.config) is None else start.config.pad_token_id,
        end_ids=end_ids,
    )
    run = resolve(args, start, World.of(processes), rows, run_dir=run_dir, earlier_batch=earlier_batch)
    refuse(contradictions(args))
    refuse(problems(run, start.config))
    return run
