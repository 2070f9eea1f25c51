"""Weights of a Hugging Face folder straight into a sharded model: each rank reads only the parts that it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaswift.errors import DataError
from megaswift.families import family_of
from megaswift.families.base import is_tied, sizes_of
from megaswift.families.rules import FusedQKV, GateUp, Rule, Sizes
from megaswift.hf.config import load_config
from megaswift.hf.folder import incomplete
from megaswift.hf.names import check_source
from megaswift.hf.read import HFCheckpoint, nonfinite


def is_hf_folder(path: Path) -> bool:
    """Whether a directory is a whole Hugging Face model folder."""
    return path.is_dir() and not incomplete(path)


def load_hf_weights(model: Any, folder: Path) -> None:
    """Fill a model (of this rank's layout) from a Hugging Face folder; no converted copy is needed.

    Args:
        model: ChatModel of one pipeline stage; values are cast to its precision.

    Raises DataError unless the folder holds exactly the tensors of its config, and for NaN or infinite weights.
    """
    source = HFCheckpoint.open(folder)
    config = load_config(folder)
    check_source(source, config)
    family, sizes = family_of(config.model_type), sizes_of(config)
    rules = {rule.megatron.replace(".{i}", ""): rule for rule in family.rules_for(is_tied(config))}
    unknown = []
    for part in held_parts(model):
        rule = rules.get(part.key)
        if rule is None:
            unknown.append(part.key)
            continue
        _fill(part, rule, source, sizes)
    if unknown:
        raise DataError(
            f"the model has weights that the folder does not: {', '.join(sorted(set(unknown))[:5])}.", where=str(folder)
        )


def held_parts(model: Any) -> list[Any]:
    """Megatron-Core's description of what this rank holds: names, places in the whole tensors, and the memory itself."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict(prefix="", metadata=None)
    apply_factories(state)
    return [item for item in nested_values(state) if isinstance(item, ShardedTensor)]


def _fill(part: Any, rule: Rule, source: HFCheckpoint, sizes: Sizes) -> None:
    """Copy one part of a tensor from the mapped files."""
    lead = part.prepend_axis_num
    layer = part.global_offset[0] if lead else 0
    offset, shape = part.global_offset[lead:], tuple(part.local_shape)
    names = [name.format(i=layer) for name in rule.hf]
    whole = rule.megatron_shape(sizes)
    stop = tuple(min(start + size, limit) for start, size, limit in zip(offset, shape, whole))  # the vocabulary may be padded
    if any(last <= first for first, last in zip(offset, stop)):
        return
    value = _rows(rule, source, names, sizes, offset[0], stop[0])
    value = value[(slice(None), *(slice(first, last) for first, last in zip(offset[1:], stop[1:])))]
    if nonfinite(value.contiguous()):
        raise DataError(
            f"tensor {names[0]}{' or one fused with it' if names[1:] else ''} has NaN or infinite values.",
            where=f"{source.path}: {', '.join(names)}",
            fix="use another model",
        )
    with torch.no_grad():
        part.data[tuple(slice(0, last - first) for first, last in zip(offset, stop))].copy_(value)
    del value
    for name in names:
        source.release(name)


def _rows(rule: Rule, source: HFCheckpoint, names: list[str], sizes: Sizes, first: int, last: int) -> Tensor:
    """Rows of a rule's Megatron tensor, from the rows of the Hugging Face tensors that they are made of."""
    if isinstance(rule, FusedQKV) and first % sizes.group == 0 and last % sizes.group == 0:
        low, high = first // sizes.group, last // sizes.group  # whole key/value groups
        per_group = [shape[0] // sizes.kv_heads for shape in rule.hf_shapes(sizes)]
        parts = [source.slice(name, low * rows, high * rows) for name, rows in zip(names, per_group)]
        some = replace(sizes, kv_heads=high - low, heads=sizes.heads // sizes.kv_heads * (high - low))
        return rule.pack(parts, some)
    if len(names) == 1:
        return source.slice(names[0], first, last)
    if isinstance(rule, GateUp):  # one above the other
        return torch.cat(
            [
                source.slice(name, max(first - k * sizes.ffn, 0), last - k * sizes.ffn)
                for k, name in enumerate(names)
                if first < (k + 1) * sizes.ffn and last > k * sizes.ffn
            ]
        )
    return rule.pack([source.tensor(name) for name in names], sizes)[first:last]
