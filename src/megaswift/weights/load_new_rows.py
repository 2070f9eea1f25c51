"""Rows for new tokens: each is the mean of the old ones, in the embedding and in an output layer of its own.

transformers' resize_token_embeddings draws them around that mean, with a billionth of the rows' covariance; the mean itself
is the same on every layout and in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaswift.models import parameters_of
from megaswift.models.parameters import Parameter
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.load_hf import held_parts, is_hf_folder
from megaswift.weights.torch_dist.reader import Reader

_BLOCK = 8192  # rows that are added up at a time


def mean_row(rows: Callable[[int, int], Tensor], count: int) -> Tensor:
    """The mean [hidden] of the first `count` rows, added up in double precision, in the precision of the rows.

    Args:
        rows: first, last -> these rows [n, hidden], the last one not included.
    """
    total: Tensor | None = None
    for first in range(0, count, _BLOCK):
        part = rows(first, min(first + _BLOCK, count))
        summed = part.double().sum(dim=0)
        total, dtype = summed if total is None else total + summed, part.dtype
    assert total is not None
    return (total / count).to(dtype)


def fill_new_rows(model: Any, checkpoint: Path, model_dir: Path, rows_before: int, rows_after: int) -> None:
    """Give the new rows that this rank holds their values, once the old ones are loaded.

    Args:
        model: ChatModel of one pipeline stage, built with `rows_after` rows.
        checkpoint: Hugging Face folder or torch_dist directory that the old rows come from.
        model_dir: directory with config.json.
    """
    config = load_config(model_dir)
    tables = {parameter.key: parameter for parameter in parameters_of(config) if parameter.padded}
    source: Any = HFCheckpoint.open(checkpoint) if is_hf_folder(checkpoint) else Reader(checkpoint)
    for part in held_parts(model):
        table = tables.get(part.key)
        if table is None:
            continue
        start = part.global_offset[part.prepend_axis_num]
        first, last = max(rows_before - start, 0), min(rows_after - start, part.data.shape[0])
        if last <= first:
            continue
        with torch.no_grad():
            part.data[first:last] = mean_row(_rows(source, table), rows_before).to(part.data)


def _rows(source: Any, table: Parameter) -> Callable[[int, int], Tensor]:
    if isinstance(source, HFCheckpoint):
        return lambda first, last: source.tensor(table.hf[0].name)[first:last]
    return lambda first, last: source.read(table.key, rows=(first, last))
