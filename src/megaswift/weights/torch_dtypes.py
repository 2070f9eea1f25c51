"""The torch dtypes of `weights/dtypes.py`, by the names that files and options have for them."""

from __future__ import annotations

import torch

from megaswift.weights.dtypes import DTYPES, TRAINED

_ALL: dict[str, torch.dtype] = {item.name: getattr(torch, item.name) for item in DTYPES}
OF_HEADER = {item.header: _ALL[item.name] for item in DTYPES}
OF_STORAGE = {item.storage: _ALL[item.name] for item in DTYPES if item.storage}
OF_FLAG = {item.flag: _ALL[item.name] for item in DTYPES if item.flag}
TORCH_DTYPES = {flag: OF_FLAG[flag] for flag in TRAINED}  # what a model is trained in: the values of --dtype
FLAGS = {dtype: flag for flag, dtype in OF_FLAG.items()}
HEADERS = {dtype: header for header, dtype in OF_HEADER.items()}
