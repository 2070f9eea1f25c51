"""What the programs that serve adapters would refuse of one: their rules, so that nothing is made which they misread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megaswift.models.adapters import PREFIX

# Modules that vLLM 0.26 to 0.32 gives adapters in decoders of our families, by the end of their names; it refuses any other.
_VLLM_MODULES = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
_VLLM_EXPERTS = (frozenset(("gate_proj", "up_proj", "down_proj")), frozenset(("w1", "w2", "w3")))  # of each routed expert
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


def vllm_refuses(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why vLLM would not load an adapter; "" where it does.

    Args:
        config: adapter_config.json.
        shapes: of the tensors in adapter_model.safetensors.
    """
    if config.get("modules_to_save"):
        return "it loads no modules_to_save"
    if config.get("use_dora"):
        return "it loads no DoRA"
    if config.get("bias", "none") != "none":
        return "it loads no biases"
    rank = int(config["r"])
    if rank > _VLLM_RANKS[-1]:
        return f"its largest rank is {_VLLM_RANKS[-1]}, this one is {rank}"
    experts: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        parts = name.removeprefix(PREFIX).split(".")
        if not name.startswith(PREFIX) or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            return f"it does not know the name {name}"
        if len(parts) > 4 and parts[-5] == "experts" and parts[-4].isdigit():
            experts.setdefault(".".join(parts[:-3]), set()).add(parts[-3])
        elif parts[-3] not in _VLLM_MODULES:
            return f"it has no adapters for {parts[-3]}"
        if len(shape) != 2 or shape[0 if parts[-2] == "lora_A" else 1] != rank:
            return f"{name} has the shape {list(shape)}, and r is {rank}"
    some = next((name for name, found in experts.items() if found not in _VLLM_EXPERTS), None)
    return "" if some is None else f"it wants adapters of all three matrices of an expert, and {some} has others"


def vllm_rank(config: Mapping[str, Any]) -> int:
    """The least --max-lora-rank with which vLLM loads an adapter."""
    return next(rank for rank in _VLLM_RANKS if rank >= int(config["r"]))
