"""A Hugging Face folder read as the Megatron weights that would be made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaswift.models import parameters_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig

    from megaswift.weights.hf.read import HFCheckpoint


class FolderReader:
    """A Hugging Face folder read as the Megatron weights that would be made of it, tensor by tensor."""

    def __init__(self, config: PreTrainedConfig, source: HFCheckpoint) -> None:
        self.source, self.directory = source, source.path
        self.parameters = {(parameter.key, parameter.place): parameter for parameter in parameters_of(config)}

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for key, _ in self.parameters))

    def shape(self, key: str) -> tuple[int, ...]:
        return next(parameter.global_shape for (name, _), parameter in self.parameters.items() if name == key)

    def dtype(self, key: str, place: tuple[int, ...] = ()) -> torch.dtype:
        found = next(p for (name, at), p in self.parameters.items() if name == key and at[: len(place)] == place)
        return self.source.dtype(found.hf[0].name)

    def read(self, key: str, place: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        parameter = self.parameters[key, place]
        value = parameter.arrangement.pack([self.source.part(part) for part in parameter.hf])
        return value if rows is None else value[rows[0] : rows[1]]

    def prefetch(self, key: str, place: tuple[int, ...] = ()) -> None:
        for part in self.parameters[key, place].hf:
            self.source.prefetch(part.name)

    def release(self, key: str, place: tuple[int, ...] = ()) -> None:
        for part in self.parameters[key, place].hf:
            self.source.release(part.name)
