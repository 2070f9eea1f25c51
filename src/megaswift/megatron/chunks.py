"""The parts of a model that one process holds: one stage of a pipeline, or several chunks that take turns (--vpp).

Virtual stages are numbered in the order of the computation; chunk c of pipeline rank r is virtual stage c * pp + r.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megaswift.megatron.model import ChatModel


class Chunks(torch.nn.ModuleList):
    """Several ChatModels of one process, first to last; what saves, loads and counts weights takes it as one model.

    Names of parameters begin with the chunk's number; keys in a checkpoint do not: they count layers over the whole model.
    """

    @property
    def config(self) -> TransformerConfig:
        """The one that all chunks share."""
        first: Any = self[0]
        return first.config

    def sharded_state_dict(self, prefix: str = "", **options: Any) -> dict[str, Any]:
        """Megatron-Core's sharded state dict of all chunks; `load_state_dict` takes the same names."""
        whole: dict[str, Any] = {}
        for number, chunk in enumerate(chunks_of(self)):
            part = chunk.sharded_state_dict(prefix="", **options)
            whole |= {f"{prefix}{number}.{name}": item for name, item in part.items()}
        return whole


def chunks_of(model: ChatModel | Chunks) -> list[ChatModel]:
    """The chunks of a process, first to last: mostly one."""
    return list(model) if isinstance(model, Chunks) else [model]  # type: ignore[arg-type]
