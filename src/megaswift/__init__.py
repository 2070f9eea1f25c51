"""megaswift: fine-tune a Hugging Face chat model with Megatron-Core on any machine, and get a Hugging Face model back.

from megaswift import ExportArguments, SftArguments, InferArguments, export_main, sft_main, infer_main
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaswift.commands.deploy import deploy_main
    from megaswift.commands.eval import eval_main
    from megaswift.commands.export import export_main
    from megaswift.commands.infer import infer_main
    from megaswift.commands.pt import pt_main
    from megaswift.commands.rlhf import rlhf_main
    from megaswift.commands.sft import sft_main
    from megaswift.config.options import (
        DeployArguments,
        EvalArguments,
        ExportArguments,
        InferArguments,
        PtArguments,
        RlhfArguments,
        SftArguments,
    )
    from megaswift.errors import MegaswiftError

__version__ = "0.1.0"
__all__ = [
    "DeployArguments",
    "EvalArguments",
    "ExportArguments",
    "InferArguments",
    "MegaswiftError",
    "PtArguments",
    "RlhfArguments",
    "SftArguments",
    "deploy_main",
    "eval_main",
    "export_main",
    "infer_main",
    "pt_main",
    "rlhf_main",
    "sft_main",
]

_HOMES = {
    "DeployArguments": "config.options",
    "EvalArguments": "config.options",
    "ExportArguments": "config.options",
    "InferArguments": "config.options",
    "PtArguments": "config.options",
    "RlhfArguments": "config.options",
    "SftArguments": "config.options",
    "MegaswiftError": "errors",
    "deploy_main": "commands.deploy",
    "eval_main": "commands.eval",
    "export_main": "commands.export",
    "infer_main": "commands.infer",
    "pt_main": "commands.pt",
    "rlhf_main": "commands.rlhf",
    "sft_main": "commands.sft",
}


def __getattr__(name: str) -> Any:  # imported when asked for: `swift --help` must not wait for torch
    if name in _HOMES:
        return getattr(importlib.import_module(f"megaswift.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'megaswift' has no attribute {name!r}")
