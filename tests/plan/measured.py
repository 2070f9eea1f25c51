"""What was measured: largest memory that torch's allocator held (GiB) and tokens/s of each GPU, by setting. Facts, not goals.

docs/performance.md, docs/lora.md and docs/moe.md say how each was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One measurement.

    Attributes:
        options: of `shapes.run_of`.
        gib: `torch.cuda.max_memory_allocated`; None: not told.
        speed: tokens/s of a GPU; None: not told.
        head: bytes of the largest piece of logits, where the benchmark asked for another than the product's.
    """

    name: str
    card: str
    shape: str
    options: dict[str, Any]
    gib: float | None = None
    speed: float | None = None
    head: int | None = None
    of: str = field(default="", repr=False)


_LINEAR, _EXPERTS = ("all-linear",), ("all-linear", "all-experts")
_LAYERS = {"gradient_checkpointing": True}
_KEPT, _SWIGLU = {"recompute_modules": "none"}, {"recompute_modules": "swiglu"}
_GRAPHS = {"cuda_graphs": "true"}
_GB = 1e9 / 2**30


def _lora7(name: str, gib: float, speed: float, bits: int | None = None, **more: Any) -> Measured:
    return Measured(name, "H200", "7b", {"lora": _LINEAR, "bits": bits, "batch_size": 2, **more}, gib, speed)


def _moe48(name: str, lora: tuple[str, ...], gib: float, speed: float, bits: int | None = None, **more: Any) -> Measured:
    return Measured(name, "H200", "moe-48", {"lora": lora, "bits": bits, **_GRAPHS, **more}, gib, speed)


def _several(name: str, gb: float, speed: float | None, **more: Any) -> Measured:
    """A 7B shape with a vocabulary of 152,064 on two cards, rows of 2,048, 16 a step, one a micro batch."""
    options = {"gpus": 2, "max_length": 2048, "gradient_accumulation_steps": 8, **_KEPT, **more}
    return Measured(name, "H200", "7b", options, gb * _GB, speed)


MEASURED = (
    Measured("0.5B x 8", "H100", "0.5b", {"batch_size": 8, **_KEPT}, 40.5, 130173),
    Measured("1.5B x 4", "H100", "1.5b", {"batch_size": 4, **_KEPT}, 59.7, 50600),
    Measured("1.5B x 4, 8 bits", "H100", "1.5b", {"batch_size": 4, "optim": "adamw_8bit", **_KEPT}, 51.1, 51481),
    Measured("3B x 2, 8 bits", "H100", "3b", {"batch_size": 2, "optim": "adamw_8bit", **_KEPT}, 61.1, 25213, head=5 << 28),
    Measured("3B x 2, swiglu", "H100", "3b", {"batch_size": 2, **_SWIGLU}, 72.2, 24592, head=5 << 28),
    Measured("1.5B, 16,384", "H100", "1.5b", {"max_length": 16384, "optim": "adamw_8bit", **_KEPT}, 51.1, 39641),
    Measured("0.5B, 2 x 16,384", "H100", "0.5b", {"batch_size": 2, "max_length": 16384, **_KEPT}, 40.5, 90128),
    Measured("0.5B, 32,768", "H100", "0.5b", {"max_length": 32768, **_KEPT}, 40.5, 63696),
    Measured("1.5B, 32,768, swiglu", "H100", "1.5b", {"max_length": 32768, "optim": "adamw_8bit", **_SWIGLU}, 67.3, 30498),
    Measured("0.5B x 8, 8 bits", "H100", "0.5b", {"batch_size": 8, "optim": "adamw_8bit", **_KEPT}, 37.8, 126123),
    Measured(
        "3B x 2, 8 bits, mlp", "H100", "3b", {"batch_size": 2, "optim": "adamw_8bit", "recompute_modules": "mlp"}, 43.0,
        8192 / 0.3699, head=5 << 28,
    ),
    Measured(
        "3B x 2, 8 bits, optimizer on the host", "H100", "3b",
        {"batch_size": 2, "optim": "adamw_8bit", "optimizer_cpu_offload": True, **_SWIGLU}, 37.7, 8192 / 0.7528, head=5 << 28,
    ),
    Measured(
        "3B x 2, 8 bits, 35 layers on the host", "H100", "3b",
        {"batch_size": 2, "optim": "adamw_8bit", "cpu_offloading_num_layers": 35, **_SWIGLU}, 36.5, None, head=5 << 28,
    ),
    _lora7("7B LoRA", 41.2, 17765),
    _lora7("7B LoRA, layers", 17.5, 13502, **_LAYERS),
    _lora7("7B LoRA, 4 bits", 32.4, 17465, 4),
    _lora7("7B LoRA, 4 bits, layers", 8.8, 13309, 4, **_LAYERS),
    _lora7("7B LoRA, 8 bits", 35.1, 16216, 8),
    _lora7("7B LoRA, 8 bits, layers", 11.5, 12195, 8, **_LAYERS),
    _lora7("7B LoRA, tp2", 24.1, 15169, gpus=2, tp=2),
    _moe48("30B-A3B LoRA of attention", _LINEAR, 78.1, 22067),
    _moe48("30B-A3B LoRA of attention, layers", _LINEAR, 58.6, 15948, **_LAYERS),
    _moe48("30B-A3B LoRA of all", _EXPERTS, 85.2, 16725),
    _moe48("30B-A3B LoRA of all, layers", _EXPERTS, 65.7, 12378, **_LAYERS),
    _moe48("30B-A3B LoRA of attention, 4 bits", _LINEAR, 38.6, 18084, 4),
    _moe48("30B-A3B LoRA of attention, 4 bits, layers, no graphs", _LINEAR, 19.3, 9675, 4, **_LAYERS, cuda_graphs="false"),
    _moe48("30B-A3B LoRA of all, 4 bits, layers", _EXPERTS, 26.4, 10388, 4, **_LAYERS),
    Measured("8 layers of 30B-A3B", "H200", "moe-8", {"batch_size": 2, **_KEPT}, 103.3, 53796),
    Measured("8 layers of 30B-A3B, layers", "H200", "moe-8", {"batch_size": 2, **_LAYERS}, 97.4, 45802),
    Measured("8 layers of 30B-A3B, ep2", "H200", "moe-8", {"batch_size": 2, "gpus": 2, "ep": 2, **_KEPT}, 58.6, 53012),
    Measured("8 layers of 30B-A3B, dp2", "H200", "moe-8", {"batch_size": 2, "gpus": 2, **_KEPT}, 72.0, 51283),
    _several("7B dp2", 101.9, 12188),
    _several("7B dp2, nothing overlapped", 102.1, 11357, overlap_grad_reduce=False),
    _several("7B pp2", 78.1, 11196, pp=2),
    _several("7B tp2", 74.8, 9990, tp=2),
    _several("7B tp2 sp", 73.9, 8870, tp=2, sequence_parallel=True),
    _several("7B cp2", 97.7, 8505, cp=2),
    # Measured after the counts were made.
    Measured("llama", "H200", "llama", {"batch_size": 4}, 59.7, 53652),
    Measured("gemma3_text", "H200", "gemma3_text", {"batch_size": 4}, 65.2, 49652),
    Measured("olmo3", "H200", "olmo3", {"batch_size": 4}, 69.0, 47142),
    Measured("glm4", "H200", "glm4", {"batch_size": 4}, 62.3, 49261),
    Measured("1.5B dpo", "H200", "1.5b", {"batch_size": 8, "max_length": 1024, "rlhf_type": "dpo"}, 59.2, 58133),
    Measured(
        "1.5B dpo, LoRA, SwiGLU kept", "H200", "1.5b", {"lora": _LINEAR, "batch_size": 8, "max_length": 1024, "rlhf_type": "dpo", **_KEPT}, 35.2,
        67935,
    ),
    Measured(
        "1.5B, one of one", "H200", "1.5b", {"batch_size": 2, "gradient_accumulation_steps": 4, **_KEPT}, 46.5 * _GB, 56292
    ),
    Measured(
        "1.5B, one of two", "H200", "1.5b", {"batch_size": 2, "gradient_accumulation_steps": 4, "gpus": 2, **_KEPT}, 37.2 * _GB,
        55084,
    ),
)  # fmt: skip
