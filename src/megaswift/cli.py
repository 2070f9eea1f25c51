"""The `swift` command: verb -> function. Nothing heavy is imported before a verb runs.

swift export | sft | infer [--options]
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import sys
import traceback
from typing import Any

from megaswift.errors import ExitCode, MegaswiftError, UserError, disk_full, nearest
from megaswift.terminal import not_utf8, refuse_not_utf8, speak_utf8, terminal_may_be_gone

NO_READER = 141  # 128 + SIGPIPE: what shells say of a program that ended because nobody read its output

# verb -> (module, function, argument class, one line of help)
VERBS = {
    "export": (
        "megaswift.commands.export",
        "export_main",
        "ExportArguments",
        "convert between a Hugging Face folder and Megatron weights",
    ),
    "verify": (
        "megaswift.commands.verify",
        "verify_main",
        "VerifyArguments",
        "check a directory, and everything that it was made from",
    ),
    "sft": ("megaswift.commands.sft", "sft_main", "SftArguments", "fine-tune Megatron weights"),
    "pt": ("megaswift.commands.pt", "pt_main", "PtArguments", "continued pre-training on text, or from nothing"),
    "rlhf": ("megaswift.commands.rlhf", "rlhf_main", "RlhfArguments", "train from preferences: dpo, kto and others"),
    "plan": ("megaswift.commands.plan", "plan_main", "PlanArguments", "memory, time and money of a run, before it is one"),
    "doctor": ("megaswift.commands.doctor", "doctor_main", "DoctorArguments", "would a run start on this machine?"),
    "data": ("megaswift.commands.data", "data_main", "InspectArguments", "show what training would read, without a model"),
    "parity": (
        "megaswift.commands.parity",
        "parity_main",
        "ParityArguments",
        "compare a run with transformers, or layouts with each other",
    ),
    "experts": (
        "megaswift.commands.experts",
        "experts_main",
        "ExpertsArguments",
        "what the routers of a model with experts do with rows",
    ),
    "families": (
        "megaswift.commands.families",
        "families_main",
        "FamiliesArguments",
        "which models can be trained, and what of a config counts",
    ),
    "infer": ("megaswift.commands.infer", "infer_main", "InferArguments", "talk to a model, or answer a file of questions"),
    "eval": (
        "megaswift.commands.eval",
        "eval_main",
        "EvalArguments",
        "benchmarks for one model, or several on the same questions",
    ),
    "deploy": ("megaswift.commands.deploy", "deploy_main", "DeployArguments", "serve a model behind the OpenAI API"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    # Imports make half a million lasting objects; looking for garbage among them again and again costs a second.
    gc.set_threshold(50_000, 20, 20)
    if argv is None:
        speak_utf8()
    words = list(sys.argv[1:] if argv is None else argv)
    code = 1
    try:
        code = _run(words)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # the interpreter would do it when nobody can catch any more what it raises
        return code
    except BrokenPipeError:  # the reader has gone (swift infer ... | head): that is no error, and nobody is there to be told
        _write_nowhere(_without_reader())
        return NO_READER
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        _write_nowhere([1, 2])  # the terminal was closed; the exit code still tells what became of the command
        return code


def _write_nowhere(streams: list[int]) -> None:
    """What is still in a buffer is written at the end of the process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)


def _run(words: list[str]) -> int:
    try:
        refuse_not_utf8(words)
        if not words or words[0] in ("-h", "--help"):
            print(overview())
            return ExitCode.DONE
        if words[0] in ("-V", "--version"):
            from megaswift import __version__

            print(f"megaswift {__version__}")
            return ExitCode.DONE
        return run_verb(words[0], words[1:])
    except MegaswiftError as error:
        with terminal_may_be_gone():
            report_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def run_verb(verb: str, words: list[str]) -> int:
    """Parse the options of a verb and call its function."""
    if verb not in VERBS:
        raise UserError(
            f"there is no command {verb!r}.",
            where="command line",
            fix=f"did you mean: {nearest(verb, list(VERBS))}? (swift --help)",
        )
    module, function, arguments, _ = VERBS[verb]
    from megaswift.config import options as all_arguments

    cls = getattr(all_arguments, arguments)
    if "-h" in words or "--help" in words:
        print(help_text(verb, cls))
        return ExitCode.DONE
    args = all_arguments.parse(cls, words)
    try:
        getattr(importlib.import_module(module), function)(args)
    except (MegaswiftError, KeyboardInterrupt):
        raise
    except SystemExit as error:  # rich's answer to a reader that has gone
        raise (error.__context__ if isinstance(error.__context__, BrokenPipeError) else error) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _without_reader():
            raise
        known = disk_full(error) or not_utf8(error)
        if known is not None:
            raise known from None
        traceback.print_exc()
        print("\nThis is a defect of megaswift, not of your input. Please report the lines above.", file=sys.stderr)
        return 1
    return ExitCode.DONE


def _without_reader() -> list[int]:
    """Which of standard output and standard error are pipes that nobody reads any more; other pipes may break too."""
    import select

    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)  # errors are always told
    return [stream for stream, event in poll.poll(0) if event & select.POLLERR]


def report_error(error: MegaswiftError) -> None:
    """Print an error on standard error, in red where that is a terminal."""
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    label = "\033[31merror:\033[0m" if color else "error:"
    print(f"{label} {error.text()}", file=sys.stderr, flush=True)


def overview() -> str:
    """Help without a verb."""
    lines = ["usage: swift COMMAND [--option value ...]", "", "commands:"]
    width = max(map(len, VERBS)) + 2
    lines += [f"  {verb:{width}}{text}" for verb, (_, _, _, text) in VERBS.items()]
    return "\n".join([*lines, "", "swift COMMAND --help lists the options of a command."])


def help_text(verb: str, cls: Any) -> str:
    """All options of a command in their groups, each with default, range, unit and the name that Megatron-Core has for it."""
    import dataclasses
    import textwrap

    from megaswift.config.options import allowed, default_of
    from megaswift.run.table import megatron_names

    names = megatron_names() if verb in ("sft", "pt", "rlhf", "parity") else {}
    meant, meaningless = getattr(cls, "MEANT", None), getattr(cls, "MEANINGLESS", {})
    lines = [f"usage: swift {verb} [options.json | options.yaml] [--option value ...]", "", VERBS[verb][3] + "."]
    items = {item.name: item for item in dataclasses.fields(cls)}
    shown_already: set[str] = set()
    groups = reversed([part for part in cls.__mro__ if dataclasses.is_dataclass(part)])
    for group in sorted(groups, key=lambda group: group not in getattr(cls, "FIRST", ())):
        own = [name for name in vars(group).get("__annotations__", {}) if name in items and name not in meaningless]
        own = [name for name in own if name not in shown_already]
        if not own or (meant is not None and group not in meant and group is not cls):
            continue
        shown_already.update(own)
        lines += ["", (group.__doc__ or "").strip().split("\n")[0]]
        for item in (items[name] for name in own):
            default, choices = default_of(item), item.metadata["choices"]
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            shown = shown.lower() if isinstance(default, bool) else shown
            facts = [] if default in (None, [], "") else [f"default {shown}"]
            facts += [item.metadata["unit"], allowed(item), f"one of: {', '.join(map(str, choices))}" if choices else ""]
            facts += [f"Megatron: {names[item.name]}"] if item.name in names else []
            head = textwrap.wrap("; ".join(filter(None, facts)), 100 - 4 - len(item.name) - 4, break_long_words=False) or [""]
            lines.append(f"  --{item.name}{'  ' if head[0] else ''}{head[0]}")
            lines += [f"      {more}" for more in head[1:]]
            lines += textwrap.wrap(item.metadata["help"], 100, initial_indent="      ", subsequent_indent="      ")
    if meant is not None:
        lines += [
            "",
            f"The other options of swift sft may stand here too, so that its command can be used as it is; they change nothing in swift {verb}.",
        ]
    if meaningless:
        lines += ["", f"Options of swift sft that mean nothing in swift {verb}, and are refused:"]
        lines += [f"  --{name}: {reason}" for name, reason in meaningless.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
