"""`swift rlhf`: training from preferences. What it learns from is another than that of `swift sft`; all else is the same.

swift rlhf --rlhf_type dpo --model_type qwen2_5-0_5b-instruct --dataset pairs.jsonl --beta 0.1 ...
"""

from __future__ import annotations

from pathlib import Path

from megaswift.commands.sft import sft_main
from megaswift.config.options import RlhfArguments, parse


def rlhf_main(args: RlhfArguments | list[str]) -> Path:
    """Train, and return the directory of the run.

    Args:
        args: options, or the words of the command line.

    Raises MegaswiftError; bad input is found before any process group exists, and leaves nothing behind.
    """
    return sft_main(parse(RlhfArguments, args) if isinstance(args, list) else args)
