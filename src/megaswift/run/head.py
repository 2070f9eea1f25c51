"""Whether a run gives its model a head of scores: what the options ask for, and the model that they meet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaswift.config.options import InspectArguments, RlhfArguments, SftArguments
from megaswift.errors import UserError
from megaswift.models.head import REGRESSION, SINGLE, ScoreHead, labels_of
from megaswift.models.whole import whole_of
from megaswift.run.problem import Problem
from megaswift.terminal import shown
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.score_head import with_score_head

TASK_OPTIONS = ("task_type", "num_labels", "problem_type")
CLASSES = "seq_cls"


def method_of(args: SftArguments) -> str | None:
    """How `swift rlhf` learns, or `swift data --rlhf_type` reads rows; None for what `swift sft` does."""
    return args.rlhf_type if isinstance(args, (RlhfArguments, InspectArguments)) else None


def head_asked(args: SftArguments) -> ScoreHead | None:
    """The head that options ask for; None for a language model. Nothing is judged."""
    method = method_of(args)
    if method is not None:
        return ScoreHead(1) if method == "rm" else None
    if args.task_type != CLASSES:
        return None
    return ScoreHead(args.num_labels or 1, args.problem_type or SINGLE)


def head_contradictions(args: SftArguments) -> Iterator[Problem]:
    """Options of a head of scores that mean nothing, or that exclude each other."""
    rlhf = method_of(args) is not None
    if rlhf or args.task_type != CLASSES:
        given = next((name for name in TASK_OPTIONS if getattr(args, name) not in (None, "causal_lm")), None)
        if given is not None:
            yield Problem(
                f"--{given} is an option of swift sft{'' if rlhf else ' --task_type seq_cls'}: it says which classes rows have.",
                where=f"--{given}",
                fix="leave it out; --rlhf_type rm has one score" if rlhf else "leave it out, or add --task_type seq_cls",
            )
        return
    if args.num_labels is None:
        yield Problem(
            "--task_type seq_cls needs the number of classes.",
            where="--num_labels",
            fix="add --num_labels N; labels are 0 to N - 1",
        )
    elif args.num_labels == 1 and args.problem_type != REGRESSION:
        yield Problem(
            "one class leaves nothing to choose.",
            where="--num_labels",
            fix="use --num_labels 2 or more, or --problem_type regression for labels that are numbers",
        )
    if args.truncation_strategy == "split":
        yield Problem(
            "--truncation_strategy split would give every piece of a text the label of the whole.",
            where="--truncation_strategy",
            fix="use delete or truncation_left",
        )
    if args.loss_scale != "default":
        yield Problem(
            "--loss_scale is about the tokens of answers, and one score of each row is trained here.",
            where="--loss_scale",
            fix="leave it out",
        )


def with_head(args: SftArguments, root: Path, config: Any) -> tuple[Path, Any, bool]:
    """Where the model's config and tokenizer are, its config, and whether its head of scores begins anew.

    Raises UserError where the model has a head and none is asked for, or another one.
    """
    head, labels = head_asked(args), labels_of(config)
    if head is None:
        if labels is not None:
            raise UserError(
                f"this model gives scores ({labels} of each sequence) and has no output layer.",
                where=shown(root),
                fix="train it as what it is: swift rlhf --rlhf_type rm, or swift sft --task_type seq_cls --num_labels N",
            )
        return root, config, False
    if whole_of(config) is not None:
        raise UserError(
            f"{config.model_type} reads pictures, too, and a head of scores is made for language models alone.",
            where=shown(root),
            fix="begin from a language model",
        )
    if labels is None:
        made = with_score_head(root, head)
        return made, load_config(made), True
    problem = getattr(config, "problem_type", None)
    if labels != head.labels or (head.problem is not None and problem not in (None, head.problem)):
        raise UserError(
            f"this model has a head of {labels} scores{f' ({problem})' if problem else ''}, "
            f"and {head.labels}{f' ({head.problem})' if head.problem else ''} are asked for.",
            where=shown(root),
            fix="begin from the language model, which gets a new head, or ask for what this one has",
        )
    if config.pad_token_id is None or problem != head.problem:
        made = with_score_head(root, head)
        return made, load_config(made), False
    return root, config, False
