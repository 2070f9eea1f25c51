"""`swift pt`: continued pre-training on plain text. Its rows are cut from documents; all else is `swift sft`.

swift pt --model_type smollm2-135m --dataset books.jsonl:0.7 code/:0.3 --train_tokens 2B --max_length 4096 ...
"""

from __future__ import annotations

from pathlib import Path

from megaswift.commands.sft import sft_main
from megaswift.config.options import PtArguments, parse


def pt_main(args: PtArguments | list[str]) -> Path:
    """Train, and return the directory of the run.

    Args:
        args: options, or the words of the command line.

    Raises MegaswiftError; bad input is found before any process group exists, and leaves nothing behind.
    """
    return sft_main(parse(PtArguments, args) if isinstance(args, list) else args)
