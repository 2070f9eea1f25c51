"""Old Megatron checkpoints: `mp_rank_XX[_YYY]/model_optim_rng.pt`, one pickle for each tensor and pipeline part, read without running code.

{directory}/latest_checkpointed_iteration.txt   release, or a number
{directory}/release/mp_rank_00/model_optim_rng.pt          tensor part 0
{directory}/iter_0000100/mp_rank_01_002/model_optim_rng.pt tensor part 1, pipeline stage 2
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.errors import DataError, UserError
from megaswift.models import parameters_of
from megaswift.models.family import OUTPUT_LAYER, sizes_of
from megaswift.models.parameters import Shape, by_key
from megaswift.weights.torch_dist import zipped

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# Names of the plain modules -> those of TransformerEngine's fused ones, which the families have.
_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
    "final_norm.weight": "final_layernorm.weight",
    "final_norm.bias": "final_layernorm.bias",
}


@dataclass(frozen=True)
class Classic:
    """A classic checkpoint: (tensor part, pipeline stage) -> file."""

    directory: Path
    files: dict[tuple[int, int], Path]

    @property
    def tp(self) -> int:
        return 1 + max(tensor for tensor, _ in self.files)

    @property
    def pp(self) -> int:
        return 1 + max(stage for _, stage in self.files)


def find(root: Path, iteration: int | None = None) -> Classic | None:
    """The classic checkpoint in a directory (the one that its tracker names, or the newest), or None.

    Raises DataError where parts of it are missing.
    """
    if not root.is_dir():
        return None
    places = [
        place
        for place in (root, *sorted(root.glob("iter_*"), reverse=True), root / "release")
        if any(place.glob(f"mp_rank_*/{FILE}"))
    ]
    if iteration is not None:
        places = [place for place in places if place.name == f"iter_{iteration:07d}"]
    tracker = root / "latest_checkpointed_iteration.txt"
    if iteration is None and tracker.is_file():
        told = tracker.read_text(encoding="utf-8", errors="replace").strip()
        name = f"iter_{int(told):07d}" if told.isdigit() else told
        places.sort(key=lambda place: place.name != name)
    if not places:
        return None
    files = {}
    for item in places[0].iterdir():
        match = _RANK.fullmatch(item.name)
        if match and (item / FILE).is_file():
            files[int(match.group(1)), int(match.group(2) or 0)] = item / FILE
    found = Classic(places[0], files)
    missing = [f"mp_rank_{t:02d}_{p:03d}" for t in range(found.tp) for p in range(found.pp) if (t, p) not in files]
    if missing:
        raise DataError(
            f"parts of the checkpoint are missing: {', '.join(missing[:5])}.",
            where=str(places[0]),
            fix="copy the whole directory",
        )
    return found


class ClassicReader:
    """Whole tensors of a classic checkpoint under the keys of torch_dist; tensors are views of the files.

    Raises DataError for damaged files and for pickles that name what no checkpoint needs.
    """

    def __init__(self, found: Classic, config: PreTrainedConfig) -> None:
        self.directory, self.tp, self.pp = found.directory, found.tp, found.pp
        self._sizes = sizes_of(config)
        parameters = parameters_of(config)
        self._parameters = by_key(parameters)
        self._places = {parameter.name: (parameter.key, parameter.place) for parameter in parameters}
        # Where the config ties it, the file may hold an output layer all the same.
        self._parameters.setdefault(OUTPUT_LAYER, self._parameters["embedding.word_embeddings.weight"])
        self._parts: dict[str, dict[Shape, list[Tensor]]] = {}
        if self._sizes.layers % self.pp:
            raise DataError(
                f"{self.pp} pipeline stages do not divide the model's {self._sizes.layers} layers.", where=str(self.directory)
            )
        for tensor, stage in sorted(found.files):
            self._add(found.files[tensor, stage], stage)
        self._drop_tied_copies()

    def _add(self, path: Path, stage: int) -> None:
        mapped = zipped.Mapped(path)
        state = zipped.load(mapped, 0, mapped.size, str(path))
        model = state.get("model") if isinstance(state, dict) else None
        if not isinstance(model, dict):
            known = (
                "language_model" if isinstance(state, dict) and "language_model" in str(list(state)[:5]) else "no entry 'model'"
            )
            raise DataError(
                f"the file holds no Megatron-Core model ({known}).",
                where=str(path),
                fix="only checkpoints of Megatron-Core's GPTModel are read",
            )
        if "language_model" in model:
            raise DataError(
                "the checkpoint was made by Megatron-LM's model from before Megatron-Core.",
                where=str(path),
                fix="only checkpoints of Megatron-Core's GPTModel are read",
            )
        self._check_args(state.get("args"), path)
        for name, value in model.items():
            if not isinstance(value, Tensor) or name.endswith("_extra_state") or "rotary" in name:
                continue
            key, place = self._place(name.removeprefix("module."), stage)
            self._parts.setdefault(key, {}).setdefault(place, []).append(value)

    def _check_args(self, args: Any, path: Path) -> None:
        """The arguments that the file was written with must fit the directory's parts."""
        for name, found in (("tensor_model_parallel_size", self.tp), ("pipeline_model_parallel_size", self.pp)):
            told = getattr(args, name, None)
            if isinstance(told, int) and told != found:
                raise DataError(
                    f"the file was written with {name} {told}, but the directory has {found} parts.",
                    where=str(path),
                    fix="copy the whole directory",
                )

    def _place(self, name: str, stage: int) -> tuple[str, Shape]:
        """Key and place of a stage's tensor; one that the model does not have is placed as if layers were stacked."""
        match = _LAYER.match(name)
        if match is None:
            return _fused(name), ()
        layer = int(match.group(1)) + stage * (self._sizes.layers // self.pp)
        rest = name[match.end() :]
        for one in (rest, _fused(rest)):  # a norm before experts is in no fused module
            if f"decoder.layers.{layer}.{one}" in self._places:
                return self._places[f"decoder.layers.{layer}.{one}"]
        return "decoder.layers." + _fused(rest), (layer,)

    def _drop_tied_copies(self) -> None:
        """With several stages the last one keeps a copy of a tied embedding; more than one per tensor part is not another weight."""
        for layers in self._parts.values():
            for place, pieces in layers.items():
                layers[place] = pieces[: self.tp]

    @property
    def keys(self) -> list[str]:
        return list(self._parts)

    def has_own_output(self) -> bool:
        """Whether the output layer is a matrix of its own, different from the embedding."""
        if OUTPUT_LAYER not in self._parts:
            return False
        return not torch.equal(self.read(OUTPUT_LAYER), self.read("embedding.word_embeddings.weight"))

    def drop(self, key: str) -> None:
        """Forget a tensor, for example an output layer that is the embedding again."""
        self._parts.pop(key, None)

    def shape(self, key: str) -> tuple[int, ...]:
        layers = self._entry(key)
        one = tuple(self.read(key, next(iter(layers))).shape)
        return (*(len(set(axis)) for axis in zip(*layers)), *one)

    def dtype(self, key: str, place: Shape = ()) -> torch.dtype:
        """The precision of a tensor or of one layer of it: one that holds the values of all its parts."""
        layers = self._entry(key)
        pieces = layers[place] if place in layers else next(iter(layers.values()))
        return reduce(torch.promote_types, (piece.dtype for piece in pieces))

    def read(self, key: str, place: Shape = (), rows: tuple[int, int] | None = None) -> Tensor:
        """A whole tensor, put together from the parts of all tensor-parallel ranks."""
        layers = self._entry(key)
        if place not in layers:
            raise DataError(
                f"the checkpoint has no {f'layer {place[0]} of ' if place else ''}{key}.",
                where=str(self.directory),
                fix="it was made for another model, or it is incomplete",
            )
        pieces = layers[place]
        if len(pieces) != self.tp:
            raise DataError(
                f"{key} has {len(pieces)} parts, {self.tp} expected.", where=str(self.directory), fix="copy the whole directory"
            )
        whole = self._parameters[key].arrangement.merge(pieces) if key in self._parameters else pieces[0]
        return whole if rows is None else whole[rows[0] : rows[1]]

    def prefetch(self, key: str, place: Shape = ()) -> None:
        """Nothing: the files are read in the order in which they were written."""

    def release(self, key: str, place: Shape = ()) -> None:
        """Nothing: pages of a mapped file go when memory is needed."""

    def _entry(self, key: str) -> dict[Shape, list[Tensor]]:
        if key not in self._parts:
            raise DataError(
                f"the checkpoint has no tensor {key}.",
                where=str(self.directory),
                fix="it was made for another model, or it is incomplete",
            )
        return self._parts[key]


def _fused(name: str) -> str:
    """The name that a plain module's norm has in TransformerEngine's fused ones."""
    for plain, fused in _FUSED.items():
        if name == plain or name.endswith(f".{plain}"):
            return name.removesuffix(plain) + fused
    return name


def check_flags(found: Classic, tp: int | None, pp: int | None) -> None:
    """Raise UserError where --tp or --pp was given and is not what the directory holds."""
    for name, given, has in (("tp", tp, found.tp), ("pp", pp, found.pp)):
        if given is not None and given != has:
            raise UserError(
                f"--{name} {given} does not fit the checkpoint: it has {name} {has}.",
                where=str(found.directory),
                fix=f"leave --{name} out",
            )
