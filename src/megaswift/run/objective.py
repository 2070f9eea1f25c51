"""What a run learns from: the objective that the options ask for, and which options mean something to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megaswift.config.options import PtArguments, RlhfArguments, SftArguments, default_of
from megaswift.config.preference import PreferenceArguments
from megaswift.errors import UserError
from megaswift.models.head import REGRESSION
from megaswift.run.head import head_asked, head_contradictions
from megaswift.run.problem import Problem
from megaswift.run.spec import ObjectiveSpec, Run

# The forms of each method's loss, the default first: TRL's names.
FORMS = {
    "dpo": (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
        "sigmoid_norm",
    ),
    "ipo": ("ipo",),
    "simpo": ("simpo",),
    "orpo": ("orpo",),
    "cpo": ("sigmoid", "hinge", "ipo"),
    "kto": ("kto", "apo_zero_unpaired"),
    "rm": ("rm",),
}  # fmt: skip
# TRL's forms that are not here, and why.
NOT_HERE = {
    "aot": "it sorts the pairs of a batch, so its loss depends on how rows share micro batches",
    "aot_pair": "it sorts the pairs of a batch, so its loss depends on how rows share micro batches",
    "aot_unpaired": "it sorts the pairs of a batch, so its loss depends on how rows share micro batches",
    "sft": "the chosen answer's own loss is added with --rpo_alpha",
    "alphapo": "its reward is not made here",
}
SMOOTHED = {("dpo", "sigmoid"), ("dpo", "exo_pair"), ("dpo", "robust"), ("cpo", "sigmoid"), ("simpo", "simpo")}
BETAS = {"simpo": 2.0}  # where the default is not 0.1
EXO_SMOOTHING = 1e-3  # exo_pair has the logarithm of it, so 0 is no choice
PREFERENCE_OPTIONS = tuple(item.name for item in fields(PreferenceArguments) if item.name != "seed")
# Options and the methods that they mean something to.
MEANT_FOR = {
    "simpo_gamma": ("simpo",),
    "rpo_alpha": ("dpo", "ipo"),
    "cpo_alpha": ("cpo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "beta": ("dpo", "ipo", "simpo", "orpo", "cpo", "kto"),
    "center_rewards_coefficient": ("rm",),
}


def objective_of(args: SftArguments) -> ObjectiveSpec:
    """The objective of a run: supervised tokens for `swift sft`, or classes. Nothing is judged."""
    if isinstance(args, PtArguments):
        return ObjectiveSpec(kind="text")
    head = head_asked(args)
    if not isinstance(args, RlhfArguments):
        return ObjectiveSpec() if head is None else ObjectiveSpec(kind="seq_cls", form=str(head.problem), labels=head.labels)
    kind = args.rlhf_type
    if head is not None:
        return ObjectiveSpec(kind="rm", form="rm", center=args.center_rewards_coefficient or 0.0, labels=head.labels)
    form = args.loss_type or FORMS[kind][0]
    nll = {
        "dpo": args.rpo_alpha or 0.0,
        "ipo": args.rpo_alpha or 0.0,
        "simpo": args.cpo_alpha,
        "cpo": args.cpo_alpha,
        "orpo": 1.0,
    }
    smoothing = args.label_smoothing or (EXO_SMOOTHING if form == "exo_pair" else 0.0)
    return ObjectiveSpec(
        kind=kind,  # type: ignore[arg-type]
        form=form,
        beta=BETAS.get(kind, 0.1) if args.beta is None else args.beta,
        label_smoothing=smoothing,
        gamma=args.simpo_gamma if kind == "simpo" else 0.0,
        nll_weight=nll.get(kind, 0.0),
        desirable_weight=args.desirable_weight if kind == "kto" else 1.0,
        undesirable_weight=args.undesirable_weight if kind == "kto" else 1.0,
    )


def objective_contradictions(args: SftArguments) -> Iterator[Problem]:
    """Options that mean nothing for text, or for a head of scores; those of preference training that mean nothing for its method, and forms that it has not."""
    if isinstance(args, PtArguments):
        yield from _not_of_text(args)
        return
    yield from head_contradictions(args)
    if not isinstance(args, RlhfArguments):
        return
    kind, form = args.rlhf_type, args.loss_type or FORMS[args.rlhf_type][0]
    if form not in FORMS[kind]:
        why = f": {NOT_HERE[form]}" if form in NOT_HERE else ""
        yield Problem(
            f"--rlhf_type {kind} has no form {form!r}{why}.", where="--loss_type", fix=f"use one of: {', '.join(FORMS[kind])}"
        )
        return
    defaults = {item.name: default_of(item) for item in fields(PreferenceArguments)}
    for name, kinds in MEANT_FOR.items():
        if kind not in kinds and _given(args, name, defaults):
            yield Problem(
                f"--{name} means nothing for --rlhf_type {kind}.",
                where=f"--{name}",
                fix=f"leave it out, or use --rlhf_type {' or '.join(kinds)}",
            )
    if (kind, form) not in SMOOTHED and _given(args, "label_smoothing", defaults):
        named = ", ".join(f"{kind} {form}" for kind, form in sorted(SMOOTHED))
        yield Problem(
            f"--label_smoothing means nothing for --rlhf_type {kind} --loss_type {form}.",
            where="--label_smoothing",
            fix=f"leave it out; it belongs to {named}",
        )
    if "all" in map(str.strip, args.loss_scale.split("+")):
        yield Problem(
            "--loss_scale all counts the question, which says nothing about which answer is better.",
            where="--loss_scale",
            fix="leave it out",
        )
    if args.truncation_strategy == "split":
        yield Problem(
            "--truncation_strategy split would cut an answer into pieces, which no preference is about.",
            where="--truncation_strategy",
            fix="use delete or truncation_left",
        )


def _not_of_text(args: PtArguments) -> Iterator[Problem]:
    """Options that mean nothing for text."""
    defaults = {item.name: default_of(item) for item in fields(PtArguments)}
    for name, reason in args.MEANINGLESS.items():
        if _given(args, name, defaults):
            yield Problem(f"--{name} means nothing in swift pt: {reason}.", where=f"--{name}", fix="leave it out")


def _given(args: SftArguments, name: str, defaults: dict[str, Any]) -> bool:
    """Whether an option was given another value than its default: a file of options has all of them."""
    return name in args.explicit() and getattr(args, name) != defaults[name]


def check_same_objective(args: SftArguments, manifest: dict[str, Any], where: str) -> None:
    """Raise UserError where a run that goes on learnt something else until now."""
    before, now = str(dict(manifest.get("objective") or {}).get("kind", "supervised")), objective_of(args).kind
    if before != now:
        words = {kind: f"swift rlhf --rlhf_type {kind}" for kind in FORMS}
        words |= {"supervised": "swift sft", "seq_cls": "swift sft --task_type seq_cls", "text": "swift pt"}
        raise UserError(
            f"this run was trained by {words.get(before, before)}, and does not go on by {words[now]}.",
            where=where,
            fix="export it (swift export --ckpt_dir RUN --to_hf true), and begin a new run from that folder",
        )


def objective_problems(run: Run) -> Iterator[Problem]:
    """What does not go with the objective of a run."""
    if run.objective.desirable_weight == 0.0 == run.objective.undesirable_weight:
        yield Problem(
            "--desirable_weight and --undesirable_weight are both 0, so nothing would be learnt.",
            where="--desirable_weight, --undesirable_weight",
            fix="give one of them another value",
        )


def in_words(spec: ObjectiveSpec) -> str:
    """An objective in a line, for people."""
    if spec.kind == "seq_cls":
        what = "classes" if spec.form != REGRESSION else "number" + "s" * (spec.labels > 1)
        return f"{spec.labels if spec.labels > 1 else 'one'} {what} ({spec.form})"
    if spec.kind == "rm":
        return "rm (reward model)" + (f", center_rewards_coefficient {spec.center:g}" if spec.center else "")
    parts = [f"{spec.kind} ({spec.form})" if spec.form != spec.kind else spec.kind, f"beta {spec.beta:g}"]
    named = {"label smoothing": spec.label_smoothing, "gamma": spec.gamma, "loss of the chosen answer x": spec.nll_weight}
    parts += [f"{name} {value:g}" for name, value in named.items() if value]
    if spec.kind == "kto":
        parts.append(f"desirable x {spec.desirable_weight:g}, undesirable x {spec.undesirable_weight:g}")
    return ", ".join(parts)
