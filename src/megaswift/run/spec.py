"""`Run`: everything that a training run will do, resolved, in one frozen tree. run.json holds it, and ranks read only that.

Options hold what was asked for; `resolve` makes a Run of them, and nothing after it asks an option again. Each component
takes its own part: the process groups and the model take `Parallel`, the optimizer `OptimizerSpec`, checkpoints `Saving`.
No value here means "choose". Two are decided by measurement at the first steps, and say so: `Memory.cuda_graphs` and
`Memory.recompute`.
"""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from megaswift.models.adapters import Lora

T = TypeVar("T")

RUN_FILE = "run.json"
FP8_MULTIPLE = 16  # torch multiplies FP8 matrices whose sides are multiples of this


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """Which model is trained, and where its files are."""

    model_type: str  # the registered name
    directory: str  # config.json and tokenizer
    named: str  # the directory that the user named; with new tokens `directory` is a copy of it that has them
    checkpoint: str  # the weights: a torch_dist directory, or the Hugging Face folder itself
    new_head: bool = False  # the checkpoint has no head of scores: it begins anew, and an output layer there is left out
    rows_before: int | None = None  # of the embedding, where the checkpoint lacks rows for new tokens
    other_dtypes: dict[str, str] = field(default_factory=dict)  # tensors that the source has in another precision than the rest
    carried: dict[str, Any] | None = None  # tensors beside what is trained: digests, and where they lie (weights.carried)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model and its data are spread over processes. Sizes that are not given are 1."""

    device: Literal["cpu", "cuda"] = "cpu"
    world_size: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1  # chunks of layers of each pipeline stage, which take turns
    cp: int = 1
    ep: int = 1  # processes over which a layer's experts are spread, among those that tp, cp and data parallelism use
    etp: int = 1  # and the matrices of each expert
    sequence_parallel: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model and of a row."""
        return self.tp * self.pp * self.cp

    @property
    def fewest(self) -> int:
        """The fewest processes that can hold the model, a row, and every expert."""
        return math.lcm(max(self.model_size, 1), max(self.pp * self.ep * self.etp, 1))

    @property
    def dp(self) -> int:
        """Copies of the model; one where the processes are too few, which `problems` tells."""
        return max(1, self.world_size // self.model_size)

    @property
    def expert_dp(self) -> int:
        """Copies of each expert."""
        return max(1, self.world_size // (self.pp * self.ep * self.etp))

    @property
    def pad_multiple(self) -> int:
        """Sequence lengths are multiples of this."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sequence_parallel else 1)

    @property
    def layout(self) -> dict[str, int]:
        """What a manifest says of it."""
        return {"tp": self.tp, "pp": self.pp, "dp": self.dp}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In which numbers the model computes, and with which kernels."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    fp8: bool = False  # products of the blocks' linear layers
    attention: Literal["fastest", "flash", "plain"] = "fastest"  # fastest: FlashAttention 4, cuDNN or torch's, by the device
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is kept, recomputed or moved to the host."""

    recompute: Literal["none", "swiglu", "mlp", "layers", "swiglu if short"] = "none"
    offloaded_layers: int = 0  # of each stage, from its first on: their activations wait in host memory
    optimizer_on_host: bool = False
    cuda_graphs: Literal["never", "always", "if launching is slow"] = "never"


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How tokens are routed, in models with experts."""

    router_dtype: Literal["fp32", "fp64", "none"] = "fp32"  # of the products; none: the model's
    balance_loss: float = 0.0  # coefficients of the routers' own losses
    z_loss: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a step."""

    micro_batch_size: int  # rows
    global_batch_size: int  # rows
    micro_batches: int  # of one data-parallel rank in one step
    gradient_accumulation_steps: int | None  # None: a run that goes on, whose global batch is no multiple of rows x processes
    of_earlier_run: bool  # whether the global batch is that of the run that goes on, whatever the options say
    max_length: int  # tokens
    packing: bool
    padding_free: bool
    group_by_length: bool
    workers: int  # threads that prepare micro batches


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps and learning rates."""

    train_iters: int
    first_step: int  # steps that an earlier part of the run made
    epochs: float | None  # what the steps follow from; None: they were given
    decay_style: str  # Megatron-Core's name
    warmup_iters: int
    decay_iters: int
    wsd_decay_iters: int
    learning_rate: float
    min_lr: float
    tokens: int | None = None  # what the steps follow from, of text: as many at least


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """AdamW over fp32 master weights."""

    name: str  # Megatron-Core's name
    state_dtype: Literal["fp32", "bf16", "8bit"]  # of its two moments
    weight_decay: float
    max_grad_norm: float  # 0: gradients are not clipped
    beta1: float
    beta2: float
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is trained: all weights but those that are frozen, or an adapter beside all of them."""

    sft_type: Literal["full", "lora"] = "full"
    frozen: tuple[str, ...] = ()  # names of the model's parameters that stay as they are in full training
    adapter: Lora | None = None
    base: dict[str, Any] | None = None  # the weights that the adapter stands beside: `base_record` of weights.base
    adapter_start: str | None = None  # directory of an adapter in PEFT's form that training begins from


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """What is learnt: the tokens of answers or of text, which of two answers is better (`train/preference_losses.py` has the formulas), or classes."""

    kind: Literal["supervised", "text", "dpo", "ipo", "simpo", "orpo", "cpo", "kto", "rm", "seq_cls"] = "supervised"
    form: str = ""  # of a preference loss, by TRL's names; of classes transformers' problem_type
    beta: float = 0.0
    label_smoothing: float = 0.0
    gamma: float = 0.0  # SimPO's margin
    nll_weight: float = 0.0  # of the chosen answer's own loss
    desirable_weight: float = 1.0  # KTO's
    undesirable_weight: float = 1.0
    center: float = 0.0  # of a reward model: weight of the square of the sum of both rewards
    labels: int = 0  # scores of each sequence; 0: it is a language model that is trained

    @property
    def of_tokens(self) -> bool:
        """Whether the loss is that of single tokens."""
        return self.kind in ("supervised", "text")

    @property
    def pairs(self) -> bool:
        """Whether an example is a chosen and a rejected answer."""
        return not self.of_tokens and self.kind not in ("kto", "seq_cls")

    @property
    def looks_ahead(self) -> bool:
        """Whether each step begins with a forward pass over mismatched answers, which the loss needs a figure of."""
        return self.kind == "kto" and self.form == "kto"

    @property
    def answers(self) -> int:
        """Sequences of one example: two of a pair, and of an answer with a mismatched one beside it."""
        return 2 if self.pairs or self.looks_ahead else 1

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with what the model said before training."""
        return self.kind in ("dpo", "ipo", "kto")


@dataclass(frozen=True, kw_only=True)
class DataRef:
    """Tokenized rows. Without `train` they are not known yet."""

    train: str = ""
    val: str | None = None
    train_rows: int = 0
    val_rows: int = 0
    pad_id: int = 0
    end_ids: tuple[int, ...] = ()  # of the tokens that end an answer


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What a run writes, and how often."""

    run_dir: str
    logging_dir: str  # of TensorBoard
    logging_steps: int
    eval_steps: int
    save_steps: int
    total_limit: int | None  # checkpoints that are kept; None: all
    only_model: bool
    hf_copies: bool
    in_background: bool
    checkpoint_bytes: int


@dataclass(frozen=True, kw_only=True)
class Guards:
    """What ends a run, or skips a step."""

    nonfinite: Literal["stop", "skip"]
    skip_spikes: float  # times the median of the gradient norms before; 0: none
    max_skipped_steps: int
    start_timeout_s: float
    step_timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run, resolved."""

    seed: int
    model: ModelRef
    parallel: Parallel
    precision: Precision
    memory: Memory
    routing: Routing = field(default_factory=Routing)
    batch: Batch
    schedule: Schedule
    optimizer: OptimizerSpec
    method: Method
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    data: DataRef
    saving: Saving
    guards: Guards

    def going_on(self, step: int, checkpoint: Path) -> Run:
        """The rest of this run, from a checkpoint after `step`."""
        model, schedule = replace(self.model, checkpoint=str(checkpoint)), replace(self.schedule, first_step=step)
        return replace(self, model=model, schedule=schedule)

    def text(self) -> str:
        """What run.json holds."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        path.write_text(self.text(), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Run:
        return _built(cls, json.loads(path.read_text(encoding="utf-8")))


def _built(cls: type[T], values: dict[str, Any]) -> T:
    """A dataclass, and those inside it, from what `asdict` made of it. Raises TypeError for missing and for unknown names."""
    hints = typing.get_type_hints(cls)
    return cls(**{name: _value(hints.get(name), value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
            return _built(kind, value)
    return tuple(value) if isinstance(value, list) else value
