"""Old Megatron checkpoints as input of `swift export`: their weights, and the config and tokenizer that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.config.files import MODEL_OPTIONS, fill_from_file, read_args_file
from megaswift.config.options import ExportArguments
from megaswift.errors import UserError
from megaswift.hub.locate import locate
from megaswift.terminal import say
from megaswift.weights import classic
from megaswift.weights.classic import Classic, ClassicReader
from megaswift.weights.hf.config import load_config


@dataclass(frozen=True)
class Old:
    """An opened classic checkpoint.

    Args:
        model_dir: where config.json and tokenizer are: the checkpoint's own directory, or the model that was found by name.
        overrides: fields of config.json that the weights ask to change.
        args: the options, model_type filled in.
    """

    reader: ClassicReader
    config: Any
    model_dir: Path
    overrides: dict[str, Any]
    args: ExportArguments


def open_classic(found: Classic, root: Path, args: ExportArguments) -> Old:
    """Open it with its config.json, or with that of --model_type / --model_id_or_path.

    Raises UserError where nothing says which model it is.
    """
    given = args.explicit()
    classic.check_flags(found, args.tp if "tp" in given else None, args.pp if "pp" in given else None)
    # Options that the original system kept here have names of its own for what is not filled in.
    args = fill_from_file(
        args,
        {name: value for name, value in read_args_file(root).items() if name in ("model_type", "model_revision")},
        MODEL_OPTIONS,
    )
    model_dir = root
    if not (root / "config.json").exists():
        if not args.model_type and not args.model_id_or_path:
            raise UserError(
                "the checkpoint has no config.json beside it.",
                where=str(root),
                fix="give --model_type NAME or --model_id_or_path DIR of the original model",
            )
        located = locate(args.model_type, args.model_id_or_path, args.model_revision)
        model_dir, args = located.path, args.changed(model_type=args.model_type or located.model_type)
    if not args.model_type:
        raise UserError("the directory does not say its model_type.", where=str(root), fix="give --model_type NAME")
    config = load_config(model_dir)
    reader = ClassicReader(found, config)
    overrides: dict[str, Any] = {}
    if config.tie_word_embeddings:
        if reader.has_own_output():
            say("  the output layer was trained as a matrix of its own: config.json gets tie_word_embeddings false")
            config.tie_word_embeddings = False
            overrides["tie_word_embeddings"] = False
        else:
            reader.drop("output_layer.weight")
    return Old(reader, config, model_dir, overrides, args.changed(tp=found.tp, pp=found.pp))
