"""From words of the command line, or a file of options, to the values of a dataclass; what cannot be is told by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from megaswift.errors import UserError, nearest
from megaswift.terminal import say

T = TypeVar("T")


def option(
    default: Any, help: str, choices: tuple[str, ...] | tuple[int, ...] | None = None, *, low: float | None = None, above: float | None = None,
    high: float | None = None, below: float | None = None, also: float | None = None, unit: str = "", size: bool = False, count: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field with its help text, and what its value may be.

    Args:
        choices: the words, or numbers, that it is one of.
        low, high: the least and the largest number; above, below: what it may not reach from there.
        also: a number outside of that range which has a meaning of its own.
        unit: what the number counts.
        size: the text is a number of bytes: `size_of` reads it.
        count: the text is a number of things: `count_of` reads it.
    """
    metadata = {
        "help": help, "choices": choices, "low": low, "above": above, "high": high, "below": below, "also": also, "unit": unit,
        "size": size, "count": count,
    }  # fmt: skip
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def allowed(item: dataclasses.Field[Any]) -> str:
    """The range of an option's number in words; "" where every number will do."""
    names = {"low": "{:g} or more", "above": "above {:g}", "high": "at most {:g}", "below": "below {:g}"}
    parts = [text.format(item.metadata[name]) for name, text in names.items() if item.metadata.get(name) is not None]
    also = item.metadata.get("also")
    return ", ".join(parts) if also is None else f"{also:g}, or {', '.join(parts)}"


def check_number(item: dataclasses.Field[Any], value: Any) -> None:
    """Raise UserError for a number out of the range that an option declares; None is in every range."""
    if value is not None and not _in_range(item, value):
        name, words = f"--{item.name}", allowed(item)
        shown = f"{value:g}" if isinstance(value, float) else value
        raise UserError(f"{name} {shown} is not {words}.", where=name, fix=f"use a number that is {words}")


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_of(text: str, name: str) -> int:
    """Bytes of a size like 5GB, 500MB or 2GiB, one at least. Raises UserError for anything else.

    Args:
        name: of the option, for the error.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", text)
    if not match or match.group(2).upper() not in _UNITS or float(match.group(1)) <= 0:
        raise UserError(f"--{name} {text!r} is no size.", where=f"--{name}", fix="use for example 500MB or 5GB")
    return max(1, int(float(match.group(1)) * _UNITS[match.group(2).upper()]))


_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def count_of(text: str, name: str) -> int:
    """The number that a text like 2B, 1.5M or 4096 means, one at least. Raises UserError for anything else, parts of one included.

    Args:
        name: of the option, for the error.
    """
    match = re.fullmatch(r"\s*([\d_,]*\.?\d+)\s*([A-Za-z]?)\s*", text)
    if match and match.group(2).upper() in _COUNTS:
        number = Fraction(re.sub("[_,]", "", match.group(1))) * _COUNTS[match.group(2).upper()]
        if number >= 1 and number.denominator == 1:
            return int(number)
    raise UserError(f"--{name} {text!r} is no number of tokens.", where=f"--{name}", fix="use for example 500M, 2B or 1500000")


def default_of(item: dataclasses.Field[Any]) -> Any:
    """The default value of a dataclass field."""
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


@dataclass(kw_only=True)
class BaseArguments:
    """What all commands share."""

    _given: ClassVar[frozenset[str]]

    seed: int = option(42, "Seed of sampling, shuffling and generation; the same on all ranks.")

    def __new__(cls, **values: Any) -> Self:
        self = super().__new__(cls)
        self._given = frozenset(values)  # type: ignore[misc]
        return self

    def __post_init__(self) -> None:
        self.check_choices()

    def check_choices(self) -> None:
        """Raise UserError for a value that is none of the option's words, a number out of its range, no size, or no seed for numpy."""
        for item in fields(self):
            name, choices, value = f"--{item.name}", item.metadata.get("choices"), getattr(self, item.name)
            if choices and value is not None and value not in choices:
                raise UserError(
                    f"{name} {value!r} is not known.", where=name, fix=f"use one of: {', '.join(map(str, choices))}"
                )
            if item.name.endswith("seed") and value is not None and not 0 <= value < 2**32:
                raise UserError(f"{name} {value} is no seed.", where=name, fix=f"use a whole number from 0 to {2**32 - 1}")
            if item.metadata.get("size"):
                size_of(value, item.name)
            if item.metadata.get("count") and value is not None:
                count_of(value, item.name)
            check_number(item, value)

    def explicit(self) -> frozenset[str]:
        """Names of the options that the user gave, as flags or as arguments; the others have their defaults."""
        return self._given

    def changed(self, **values: Any) -> Self:
        """A copy with other values for some options, which does not make them given."""
        result = copy.copy(self)
        for name, value in values.items():
            setattr(result, name, value)
        return result

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON-ready values, for sft_args.json and export_args.json."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def _in_range(item: dataclasses.Field[Any], value: Any) -> bool:
    """NaN is in no range."""
    if item.metadata.get("also") is not None and value == item.metadata["also"]:
        return True
    low, above, high, below = (item.metadata.get(name) for name in ("low", "above", "high", "below"))
    return (
        (low is None or value >= low) and (above is None or value > above)
        and (high is None or value <= high) and (below is None or value < below)
    )  # fmt: skip


# Options that ms-swift's users know and that would do nothing here: refused, each with what to use instead.
REFUSED = {
    "deepspeed": "Megatron-Core's distributed optimizer already shards the optimizer state over data-parallel ranks",
    "fsdp": "Megatron-Core's distributed optimizer already shards the optimizer state over data-parallel ranks",
    "lora_bias": "adapters have no biases (what vLLM loads has none)",
    "neftune_noise_alpha": "noise on embeddings is not part of the Megatron engine",
    "fp16": "use --dtype fp16",
    "bf16": "use --dtype bf16",
    "device_map": "use --tp and --pp",
    "device_map_config_path": "use --tp and --pp",
    "report_to": "TensorBoard (runs/) and logging.jsonl are always written",
    "evaluation_strategy": "use --eval_steps",
    "save_strategy": "use --save_steps",
    "lr_scheduler_kwargs": "use --min_lr, --warmup_steps and --lr_scheduler_type",
    "use_loss_scale": "use --loss_scale with a file of weights",
    "loss_scale_config_path": "use --loss_scale with that file: --loss_scale default+FILE.json",
    "moe_grouped_gemm": "the products of all experts are grouped always",
    "moe_expert_capacity_factor": "experts have no capacity, so no token is dropped",
    "moe_token_drop_policy": "experts have no capacity, so no token is dropped",
    "moe_pad_expert_input_to_capacity": "experts have no capacity, so no token is dropped",
    "moe_token_dispatcher_type": "tokens are exchanged all to all",
    "moe_permute_fusion": "rows are gathered in one pass always",
    "moe_shared_expert_overlap": "the shared expert runs beside the others only in their order",
    "moe_router_load_balancing_type": "--moe_aux_loss_coeff balances each layer by itself; 0, the default, does not",
    "expert_model_parallel_size": "use --ep",
    "expert_tensor_parallel_size": "use --etp",
    "eval_batch_size": "evaluation uses --batch_size",
    "reset_position_ids": "positions begin anew where attention does: --reset_attention_mask of swift pt",
    "eod_mask_loss": "what follows the end of a document carries loss only where attention crosses it: --reset_attention_mask of swift pt",
}

# Megatron-Core's names for options that have a shorter one here.
RENAMED = {
    "virtual_pipeline_model_parallel_size": "use --vpp, with the same number",
    "num_virtual_stages_per_pipeline_rank": "use --vpp, with the same number",
    "num_layers_per_virtual_pipeline_stage": "use --vpp: the layers of the model / (--pp x this number)",
}

# Other names that ms-swift gives to options, and what they are called here.
ALIASES = {
    "quant_bits": "quantization_bit",
    "tuner_type": "sft_type",
    "train_type": "sft_type",
    "lora_target_modules": "target_modules",
    "target_regex": "target_modules",
    "lora_target_regex": "target_modules",
    "lora_dropout_p": "lora_dropout",
    "lora_modules_to_save": "modules_to_save",
    "lorap_lr_ratio": "lora_plus_lr_ratio",
    "lora_lr_ratio": "lora_plus_lr_ratio",
    "init_lora_weights": "init_weights",
}


def _own_name(name: str, known: dict[str, Any]) -> str:
    """The name of an option here; another name of it is told."""
    own = ALIASES.get(name, name)
    if name in known or own not in known:
        return name
    say(f"[yellow]--{name} is --{own} here[/yellow]")
    return own


def parse(cls: type[T], argv: list[str]) -> T:
    """Build `cls` from command line words.

    A first word that ends in .json or .yaml is a file of options; flags after it win. Booleans take true or false, a
    bare flag means true. Raises UserError for an unknown flag, a missing or a misshapen value.
    """
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    argv = [word for word in argv if word == "" or word.strip()]  # "\\ " at the end of a pasted command gives a blank word
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        values.update(_read_option_file(cls, argv[0], known, hints))
        argv = argv[1:]
    first = getattr(cls, "FIRST_WORD", None)  # an option that may stand without its name
    if first and argv and not argv[0].startswith("--"):
        values[first] = argv[0]
        argv = argv[1:]
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--"):
            raise UserError(
                f"{word!r} is no option.", where="command line", fix="options start with --, for example --model_type NAME"
            )
        name, equals, inline = word[2:].partition("=")
        name = _own_name(name.replace("-", "_"), known)
        _require_known(cls, name, known)
        position += 1
        words = [inline] if equals else []
        while not equals and position < len(argv) and not _is_flag(argv[position]):
            words.append(argv[position])
            position += 1
        values[name] = _convert(name, hints[name], words)
    return cls(**values)


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2 and word[2].isalpha()


def _require_known(cls: type[Any], name: str, known: dict[str, Any]) -> None:
    if name in known:
        return
    if name in REFUSED:
        raise UserError(f"--{name} has no effect on this backend, so it is refused.", where=f"--{name}", fix=REFUSED[name])
    if name in RENAMED and "vpp" in known:
        raise UserError(f"--{name} has another name here.", where=f"--{name}", fix=RENAMED[name])
    raise UserError(f"unknown option --{name}.", where="command line", fix=f"did you mean: {nearest(name, list(known))}?")


def _read_option_file(cls: type[Any], path: str, known: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the option file: {error}", where=path) from error
    except Exception as error:  # yaml's own error classes; yaml is imported only here
        raise UserError(f"the option file is not valid YAML: {error}", where=path) from error
    if not isinstance(values, dict):
        raise UserError("an option file must hold one mapping from option to value.", where=path)
    values = {_own_name(str(name), known): value for name, value in values.items()}
    for name in values:
        _require_known(cls, name, known)
    return {name: _from_file(name, hints[name], value, path) for name, value in values.items()}


def _from_file(name: str, hint: Any, value: Any, path: str) -> Any:
    """A value of a JSON or YAML file as the option's type; text is read as on the command line (YAML takes 1e-5 for text)."""
    base, is_list = _base_type(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if isinstance(value, str):
        return _convert(name, hint, [value])
    if is_list and isinstance(value, list) and all(isinstance(part, (str, int, float)) for part in value):
        return [str(part) for part in value]
    if base is bool and isinstance(value, bool):
        return value
    if not is_list and base is not bool and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return _scalar(base, str(value))
        except ValueError:
            pass
    wanted = "a list of texts" if is_list else _TYPE_NAMES.get(base, "a text")
    raise UserError(f"--{name} {str(value)[:60]!r} is not {wanted}.", where=f"{path}: {name}")


def _convert(name: str, hint: Any, words: list[str]) -> Any:
    """Words of the command line as a value of the option's type."""
    base, is_list = _base_type(hint)
    if is_list:
        return [part for word in words for part in (split_commas(word) if name in _COMMA_LISTS else [word])]
    if not words:
        if base is bool:
            return True
        raise UserError(f"--{name} needs a value.", where=f"--{name}")
    if len(words) > 1:
        raise UserError(
            f"--{name} takes one value, but got {len(words)}: {' '.join(words)}",
            where=f"--{name}",
            fix="put a value with spaces in quotes",
        )
    try:
        return _scalar(base, words[0])
    except ValueError as error:
        raise UserError(f"--{name} {words[0]!r} is not {_TYPE_NAMES.get(base, 'valid')}.", where=f"--{name}") from error


_COMMA_LISTS = ("dataset", "val_dataset")
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


def _base_type(hint: Any) -> tuple[type, bool]:
    if typing.get_origin(hint) is list:
        return str, True
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(hint) if part is not type(None)), False
    return hint, False


def split_commas(word: str) -> list[str]:
    """The items of a word with commas between them; JSON, and an item that names an existing file, stay whole."""
    if "," not in word or word.lstrip().startswith(("{", "[")) or _names_a_file(word):
        return [word]
    return [part for part in word.split(",") if part]


def _names_a_file(word: str) -> bool:
    """Whether path[:subset/...][#N], with a comma in the path, names a file or folder of this machine."""
    without_count = re.sub(r"#\d+\Z", "", word)
    path, _, subsets = without_count.rpartition(":")
    paths = [word, without_count] + ([path] if "," in path and "," not in subsets else [])
    return any(exists(path.strip()) for path in paths)


def exists(path: str) -> bool:
    """Whether a text names a file or folder of this machine; most texts are no path at all."""
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, the home of nobody: no path
        return False


def _scalar(base: type, word: str) -> Any:
    if base is bool:
        lowered = word.lower()
        if lowered in ("true", "1", "yes"):
            return True
        if lowered in ("false", "0", "no"):
            return False
        raise ValueError(word)
    if base is float and not math.isfinite(float(word)):
        raise ValueError(word)
    return base(word)
