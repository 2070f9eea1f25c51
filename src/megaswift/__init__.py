"""megaswift: fine-tune a Hugging Face chat model with Megatron-Core on any machine, and get a Hugging Face model back.

from megaswift import ExportArguments, SftArguments, InferArguments, export_main, sft_main, infer_main
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaswift.arguments import DeployArguments, EvalArguments, ExportArguments, InferArguments, SftArguments
    from megaswift.deploy import deploy_main
    from megaswift.errors import MegaswiftError
    from megaswift.eval import eval_main
    from megaswift.export import export_main
    from megaswift.infer import infer_main
    from megaswift.sft import sft_main

__version__ = "0.1.0"
__all__ = [
    "DeployArguments",
    "EvalArguments",
    "ExportArguments",
    "InferArguments",
    "MegaswiftError",
    "SftArguments",
    "deploy_main",
    "eval_main",
    "export_main",
    "infer_main",
    "sft_main",
]

_HOMES = {
    "DeployArguments": "arguments",
    "EvalArguments": "arguments",
    "ExportArguments": "arguments",
    "InferArguments": "arguments",
    "SftArguments": "arguments",
    "MegaswiftError": "errors",
    "deploy_main": "deploy",
    "eval_main": "eval",
    "export_main": "export",
    "infer_main": "infer",
    "sft_main": "sft",
}


def __getattr__(name: str) -> Any:  # imported when asked for: `swift --help` must not wait for torch
    if name in _HOMES:
        return getattr(importlib.import_module(f"megaswift.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'megaswift' has no attribute {name!r}")
