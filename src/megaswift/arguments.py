"""The options of every `swift` command, as dataclasses built from small shared groups, and their parser.

Building them does no work: no file is read, no network, GPU or process group is touched. `parse(SftArguments, argv)`
is what the command line calls; a script builds the same classes directly.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from megaswift.errors import UserError, nearest

T = TypeVar("T", bound="BaseArguments")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its help text and, where the value is one of a few words, those words."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
        """Raise UserError for a value that is none of the option's words."""
        for item in fields(self):
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            if choices and value is not None and value not in choices:
                raise UserError(
                    f"--{item.name} {value!r} is not known.",
                    where=f"--{item.name}",
                    fix=f"use one of: {', '.join(choices)}",
                )

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


@dataclass(kw_only=True)
class ModelArguments(BaseArguments):
    """Which model, and in which precision."""

    model_type: str | None = option(
        None, "Registered name of the model, for example qwen2-7b-instruct or smollm2-135m-instruct."
    )
    model_id_or_path: str | None = option(None, "Local directory or hub id of the model; then model_type is optional.")
    model_revision: str | None = option(None, "Revision (branch, tag or commit) on the hub.")
    dtype: str = option(
        "AUTO",
        "Precision of the weights. AUTO: bf16 on a GPU that has it, fp32 on a CPU; export keeps the source's.",
        ("AUTO", "bf16", "fp16", "fp32"),
    )


@dataclass(kw_only=True)
class LayoutArguments(BaseArguments):
    """How the model is spread over processes."""

    tp: int = option(1, "Tensor parallel size: each matrix is split over this many processes.")
    pp: int = option(1, "Pipeline parallel size: the layers are split over this many stages.")


@dataclass(kw_only=True)
class TemplateArguments(BaseArguments):
    """How a conversation becomes tokens."""

    template_type: str = option("AUTO", "Chat template by name; AUTO is the tokenizer's own, else the model type's.")
    system: str | None = option(
        None, "System prompt for rows that bring none; '' for no system prompt; default: the template's."
    )


@dataclass(kw_only=True)
class DataArguments(TemplateArguments):
    """Which rows are used, and how they are cut."""

    dataset: list[str] = option([], "Training data: [HF::|MS::]name|hub/id|file[:subset/...][#N], several separated by spaces.")
    val_dataset: list[str] = option([], "Validation data, in the same form; then nothing is taken from the training data.")
    dataset_test_ratio: float = option(0.01, "Share of each training dataset that becomes validation data; 0 for none.")
    dataset_seed: int | None = option(None, "Seed of sampling and of the validation split; default: --seed.")
    max_length: int = option(2048, "Longest sample in tokens; -1 for no limit.")
    truncation_strategy: str = option(
        "delete", "What happens to longer rows; each is counted.", ("delete", "truncation_left", "split")
    )
    columns: str | None = option(None, 'Column names to read under other names, as JSON: \'{"prompt_text": "query"}\'.')
    strict: bool = option(False, "Stop at the first bad row; otherwise bad rows are skipped, counted and shown.")
    model_name: list[str] = option([], "Name that self-cognition rows teach: Chinese and English, or one for both.")
    model_author: list[str] = option([], "Author that self-cognition rows teach: Chinese and English, or one for both.")
    custom_dataset_info: str | None = option(None, "More registered datasets: a JSON file, or JSON text.")
    data_cache: bool = option(True, "Keep tokenized rows in the cache and use them again.")


@dataclass(kw_only=True)
class ExportArguments(ModelArguments, LayoutArguments):
    """`swift export`: between a Hugging Face folder and Megatron weights."""

    to_megatron: bool = option(False, "Convert a Hugging Face model to Megatron weights.")
    to_hf: bool = option(False, "Convert Megatron weights to a Hugging Face model.")
    ckpt_dir: str | None = option(None, "Megatron directory to convert: one made by --to_megatron, or a training run.")
    megatron_output_dir: str | None = option(None, "Where Megatron weights go; default: {model_type}-tp{tp}-pp{pp}.")
    hf_output_dir: str | None = option(None, "Where the Hugging Face model goes; default: {ckpt_dir}/{model_type}-hf.")
    iteration: int | None = option(None, "Which checkpoint of a run to convert; default: the newest complete one.")
    overwrite: bool = option(False, "Replace an output directory that exists.")
    verify: bool = option(True, "Check the result against its source, tensor by tensor.")
    max_shard_size: str = option("5GB", "Largest safetensors file, for example 500MB or 5GB.")


@dataclass(kw_only=True)
class SftArguments(ModelArguments, LayoutArguments, DataArguments):
    """`swift sft`: full fine-tuning with Megatron-Core."""

    train_backend: str = option("megatron", "Training engine.", ("megatron",))
    sft_type: str = option("full", "What is trained: all weights.", ("full",))
    resume_from_checkpoint: str | None = option(
        None, "Megatron directory to start from, or a run directory to go on with; default: {model_type}-tp{tp}-pp{pp}."
    )
    sequence_parallel: bool = option(False, "Also split norms and residuals along the sequence; needs tp > 1.")
    output_dir: str = option("output", "Directory of all runs.")
    add_output_dir_suffix: bool = option(
        True, "Put each run in {output_dir}/{model_type}-tp{tp}-pp{pp}/vN-time; false: straight in output_dir."
    )
    overwrite: bool = option(False, "Replace an output directory that holds a run (with --add_output_dir_suffix false).")
    logging_dir: str | None = option(None, "TensorBoard directory; default: runs/ in the run's directory.")
    batch_size: int = option(1, "Rows in one micro batch.")
    gradient_accumulation_steps: int | None = option(
        None, "Global batch = batch_size x this x processes; default: ceil(16 / batch_size / processes)."
    )
    num_train_epochs: float = option(1, "How often each row is seen.")
    max_steps: int = option(-1, "Stop after this many steps; -1: as many as the epochs take.")
    learning_rate: float = option(1e-5, "Largest learning rate.")
    min_lr: float | None = option(None, "Learning rate at the last step; default: a tenth of learning_rate.")
    lr_scheduler_type: str = option(
        "cosine",
        "Decay of the learning rate.",
        ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"),
    )
    warmup_ratio: float = option(0.05, "Share of the steps in which the learning rate rises.")
    warmup_steps: int = option(0, "Steps in which the learning rate rises; above 0 it replaces warmup_ratio.")
    optim: str = option("adamw_torch", "Optimizer.", ("adamw_torch", "adamw_torch_fused"))
    weight_decay: float = option(0.1, "Decoupled weight decay; norms and biases are spared.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0: never.")
    adam_beta1: float = option(0.9, "Adam's decay of the mean of gradients.")
    adam_beta2: float = option(0.95, "Adam's decay of the mean of squared gradients.")
    adam_epsilon: float = option(1e-8, "Adam's addend in the denominator.")
    eval_steps: int = option(200, "Steps between two evaluations on the validation rows; one more comes at the end.")
    save_steps: int | None = option(None, "Steps between two checkpoints; one more comes at the end; default: eval_steps.")
    save_only_model: bool = option(
        False, "Leave optimizer and random states out of checkpoints; the run cannot be resumed then."
    )
    save_total_limit: int | None = option(None, "Checkpoints to keep, the newest ones; default: all.")
    logging_steps: int = option(5, "Steps between two lines of logging.jsonl.")
    dataloader_num_workers: int = option(1, "Threads that prepare micro batches ahead; 0: prepared when needed.")
    use_flash_attn: bool | None = option(
        None, "true: only the flash kernel; false: never; default: the fastest kernel for the device."
    )
    packing: bool = option(False, "Join whole rows up to max_length; attention stays within each row.")
    padding_free: bool = option(True, "Lay the rows of a micro batch end to end; false: pad them to the longest.")
    group_by_length: bool = option(False, "Draw rows of similar length into one global batch.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, about a third more work."
    )
    deterministic: bool = option(False, "Only kernels that give the same bits in each run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_steps is None:
            self.save_steps = self.eval_steps
        if self.min_lr is None:
            self.min_lr = 0.1 * self.learning_rate
        if self.dataset_seed is None:
            self.dataset_seed = self.seed


@dataclass(kw_only=True)
class InferArguments(ModelArguments, DataArguments):
    """`swift infer`: a conversation in the terminal, or answers to a file of questions."""

    ckpt_dir: str | None = option(None, "Hugging Face directory made by `swift export --to_hf`.")
    infer_backend: str = option("AUTO", "What generates: pt is transformers.", ("AUTO", "pt"))
    max_new_tokens: int = option(2048, "Longest answer in tokens.")
    do_sample: bool = option(True, "Draw tokens at random; false: always the likeliest.")
    temperature: float = option(0.3, "Sharpness of the draw; 0 is greedy.")
    top_k: int = option(20, "Draw among this many likeliest tokens; 0: all.")
    top_p: float = option(0.7, "Draw among the likeliest tokens that together reach this probability.")
    repetition_penalty: float = option(1.0, "Above 1, tokens that already appeared become less likely.")
    num_beams: int = option(1, "Beams of beam search; 1: none.")
    stop_words: list[str] = option([], "Texts at which an answer ends.")
    stream: bool = option(True, "Show the answer while it is made.")
    infer_batch_size: int = option(1, "Questions answered at once when a file is read.")
    show_dataset_sample: int = option(10, "Questions taken from val_dataset; -1: all.")
    save_result: bool = option(True, "Write questions and answers to infer_result/.")
    result_dir: str | None = option(None, "Where results go; default: infer_result/ in the model's directory.")
    load_dataset_config: bool = option(False, "Answer the validation rows of the run that made the model.")
    eval_human: bool | None = option(None, "Talk in the terminal; default: true when no dataset is given.")
    max_length: int = option(-1, "Longest prompt in tokens; -1: what the model allows.")


def default_of(item: dataclasses.Field[Any]) -> Any:
    """The default value of a dataclass field."""
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


# Options that ms-swift's users know and that would do nothing here: refused, each with what to use instead.
REFUSED = {
    "deepspeed": "Megatron-Core's distributed optimizer already shards the optimizer state over data-parallel ranks",
    "fsdp": "Megatron-Core's distributed optimizer already shards the optimizer state over data-parallel ranks",
    "lora_rank": "only full-parameter training exists (--sft_type full)",
    "lora_alpha": "only full-parameter training exists (--sft_type full)",
    "lora_target_modules": "only full-parameter training exists (--sft_type full)",
    "lora_dropout_p": "only full-parameter training exists (--sft_type full)",
    "quantization_bit": "training runs in fp32, bf16 or fp16 (--dtype)",
    "neftune_noise_alpha": "noise on embeddings is not part of the Megatron engine",
    "freeze_parameters": "all weights are trained",
    "fp16": "use --dtype fp16",
    "bf16": "use --dtype bf16",
    "device_map": "use --tp and --pp",
    "device_map_config_path": "use --tp and --pp",
    "report_to": "TensorBoard (runs/) and logging.jsonl are always written",
    "evaluation_strategy": "use --eval_steps",
    "save_strategy": "use --save_steps",
    "lr_scheduler_kwargs": "use --min_lr, --warmup_steps and --lr_scheduler_type",
    "use_loss_scale": "every supervised token counts the same",
    "eval_batch_size": "evaluation uses --batch_size",
}


def parse(cls: type[T], argv: list[str]) -> T:
    """Build `cls` from command line words.

    A first word that ends in .json or .yaml is a file of options; flags after it win. Booleans take true or false, a
    bare flag means true. Raises UserError for an unknown flag, a missing or a misshapen value.
    """
    known = {item.name: item for item in fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    argv = [word for word in argv if word == "" or word.strip()]  # "\\ " at the end of a pasted command gives a blank word
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        values.update(_read_option_file(cls, argv[0], known))
        argv = argv[1:]
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--"):
            raise UserError(
                f"{word!r} is no option.", where="command line", fix="options start with --, for example --model_type NAME"
            )
        name, equals, inline = word[2:].partition("=")
        name = name.replace("-", "_")
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


def _require_known(cls: type[BaseArguments], name: str, known: dict[str, Any]) -> None:
    if name in known:
        return
    if name in REFUSED:
        raise UserError(f"--{name} has no effect on this backend, so it is refused.", where=f"--{name}", fix=REFUSED[name])
    raise UserError(f"unknown option --{name}.", where="command line", fix=f"did you mean: {nearest(name, list(known))}?")


def _read_option_file(cls: type[BaseArguments], path: str, known: dict[str, Any]) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the option file: {error}", where=path) from error
    except Exception as error:  # yaml's own error classes; yaml is imported only here
        raise UserError(f"the option file is not valid YAML: {error}", where=path) from error
    if not isinstance(values, dict):
        raise UserError("an option file must hold one mapping from option to value.", where=path)
    for name in values:
        _require_known(cls, name, known)
    return values


def _convert(name: str, hint: Any, words: list[str]) -> Any:
    """Words of the command line as a value of the option's type."""
    base, is_list = _base_type(hint)
    if is_list:
        return [part for word in words for part in (_split_commas(word) if name in _COMMA_LISTS else [word])]
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


def _split_commas(word: str) -> list[str]:
    return [part for part in word.split(",") if part] if "," in word and not word.lstrip().startswith(("{", "[")) else [word]


def _scalar(base: type, word: str) -> Any:
    if base is bool:
        lowered = word.lower()
        if lowered in ("true", "1", "yes"):
            return True
        if lowered in ("false", "0", "no"):
            return False
        raise ValueError(word)
    return base(word)
