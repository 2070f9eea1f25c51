"""`swift export`: a Hugging Face model to Megatron weights, and Megatron weights back to a Hugging Face model.

    swift export --model_type qwen2-7b-instruct --to_megatron true --tp 2 --dtype bf16
    swift export --ckpt_dir qwen2-7b-instruct-tp2-pp1 --to_hf true

Runs in one process, without a GPU. The result appears under its name only when it is complete and proven.
"""

from __future__ import annotations

from pathlib import Path

from megaswift.config.files import with_home
from megaswift.config.options import ExportArguments, parse
from megaswift.errors import UserError
from megaswift.export.to_hf import to_hf
from megaswift.export.to_megatron import classic_to_megatron, to_megatron
from megaswift.store.sign import load_private_key

__all__ = ["export_main"]


def export_main(args: ExportArguments | list[str]) -> Path:
    """Convert, and return the directory that was made.

    Args:
        args: options, or the words of the command line.

    Raises UserError or DataError; then nothing was made.
    """
    args = with_home(parse(ExportArguments, args) if isinstance(args, list) else args)
    if args.to_megatron == args.to_hf:
        raise UserError(
            "exactly one of --to_megatron true and --to_hf true is needed.",
            where="swift export",
            fix="--to_megatron true makes Megatron weights, --to_hf true makes a Hugging Face model",
        )
    if args.allow_nonfinite and args.resume:
        raise UserError(
            "--resume true keeps files without reading them, so --allow_nonfinite true could not say what is in them.",
            where="--allow_nonfinite, --resume",
            fix="leave --resume out",
        )
    if args.to_hf and args.new_special_tokens:
        raise UserError(
            "tokens are added on the way to Megatron weights, or when training begins.",
            where="--new_special_tokens, --to_hf",
            fix="leave it out here; give it to swift export --to_megatron true or to swift sft",
        )
    if args.sign:
        load_private_key(Path(args.sign))  # a bad key is found before hours of work
    if args.to_hf:
        return to_hf(args)
    return classic_to_megatron(args) if args.ckpt_dir else to_megatron(args)
