"""Conversion between a Hugging Face folder and a Megatron checkpoint by the family's rules, one tensor at a time.

No model is built and no process group is opened. Memory holds one tensor for each writing thread, whatever the model's
size. Both directions compute the SHA-256 of every Hugging Face tensor, so that the result can be compared with its source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaswift.checkpoint import torch_dist
from megaswift.errors import DataError
from megaswift.families import family_of
from megaswift.families.base import Family, is_tied, sizes_of
from megaswift.families.rules import Rule, Sizes
from megaswift.hf.shards import PlannedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.hf.read import HFCheckpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {value: name for name, value in DTYPES.items()}
_CHUNK_BYTES = 256 << 20  # larger tensors are stored in blocks of rows, so that a rank reads only what it needs
_OPTIMIZER = "optimizer."


def checkpoint_key(rule: Rule) -> str:
    """The rule's name in a torch_dist checkpoint, where layers are stacked."""
    return rule.megatron.replace(".{i}", "")


@dataclass
class Conversion:
    """What a conversion did."""

    files: dict[str, torch_dist.FileDigest] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)  # Hugging Face name -> SHA-256 of its values as written
    parameters: int = 0
    dtype: str = ""


class Model:
    """A model as the rules see it: family, sizes, tied or not."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.family: Family = family_of(config.model_type)
        self.sizes: Sizes = sizes_of(config)
        self.tied = is_tied(config)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every Hugging Face tensor."""
        return self.family.expected(self.sizes, self.tied)

    def layered(self, rule: Rule) -> bool:
        return "{i}" in rule.megatron

    def global_shape(self, rule: Rule) -> tuple[int, ...]:
        shape = rule.megatron_shape(self.sizes)
        return (self.sizes.layers, *shape) if self.layered(rule) else shape

    def read_hf(self, reader: torch_dist.Reader, rule: Rule, layer: int) -> list[Tensor]:
        """The Hugging Face tensors of a rule, from a Megatron checkpoint."""
        value = reader.read(checkpoint_key(rule), layer if self.layered(rule) else None)
        return rule.unpack(value, self.sizes)


def check_source(source: HFCheckpoint, model: Model) -> None:
    """Raise DataError unless the folder holds exactly the tensors of its config (a tied copy of the embedding is allowed)."""
    ignorable = {"lm_head.weight"} if model.tied else set()
    ignorable |= {name for name in source.names if name.endswith(".rotary_emb.inv_freq")}
    source.check_names(model.expected(), ignorable)
    if model.tied and "lm_head.weight" in source.names:
        if not torch.equal(source.tensor("lm_head.weight"), source.tensor("model.embed_tokens.weight")):
            raise DataError(
                "tie_word_embeddings is true, but lm_head.weight is not equal to the embedding.",
                where="lm_head.weight",
                fix="set tie_word_embeddings to false in config.json if the output layer is its own",
            )


def hf_to_megatron(source: HFCheckpoint, config: PreTrainedConfig, directory: Path, dtype: str, threads: int = 2) -> Conversion:
    """Write the weights of a Hugging Face folder as a torch_dist checkpoint into an empty directory.

    Raises DataError for a missing, extra or misshapen tensor, and for NaN or infinite weights.
    """
    model = Model(config)
    check_source(source, model)
    result = Conversion(dtype=dtype)
    chunks: list[torch_dist.Chunk] = []
    for rule, layer in model.family.each(model.sizes, model.tied):
        chunks += _chunks(model, rule, layer, source, DTYPES[dtype], result)
    objects = [name for rule, layer in model.family.each(model.sizes, model.tied) for name in _extra_states(model, rule, layer)]
    common = {"iteration": 0, "checkpoint_version": 3.0, "num_floating_point_operations_so_far": 0}
    result.files = torch_dist.write(directory, chunks, objects, common, threads)
    return result


def _chunks(model: Model, rule: Rule, layer: int, source: HFCheckpoint, dtype: torch.dtype, result: Conversion) -> list[torch_dist.Chunk]:
    names = [name.format(i=layer) for name in rule.hf]
    shape = rule.megatron_shape(model.sizes)
    lead, lead_shape = ((layer,), (1,)) if model.layered(rule) else ((), ())
    result.parameters += torch.Size(shape).numel()

    def produce() -> Tensor:
        parts = [source.tensor(name).to(dtype) for name in names]
        for name, part in zip(names, parts):
            require_finite(name, part)
            result.tensors[name] = digest(part)
        return rule.pack(parts, model.sizes)

    row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
    rows = max(1, _CHUNK_BYTES // row_bytes)
    if len(shape) == 1 or shape[0] <= rows:
        return [torch_dist.Chunk(checkpoint_key(rule), model.global_shape(rule), (*lead, *(0 for _ in shape)), (*lead_shape, *shape), dtype, produce)]
    if len(names) > 1:  # fused parts cannot be cut by rows before they are packed
        return [torch_dist.Chunk(checkpoint_key(rule), model.global_shape(rule), (*lead, 0, 0), (*lead_shape, *shape), dtype, produce)]
    return _row_blocks(model, rule, lead, lead_shape, shape, rows, source, names[0], dtype, result)


def _row_blocks(
    model: Model, rule: Rule, lead: tuple[int, ...], lead_shape: tuple[int, ...], shape: tuple[int, ...], rows: int,
    source: HFCheckpoint, name: str, dtype: torch.dtype, result: Conversion,
) -> list[torch_dist.Chunk]:  # fmt: skip
    """Blocks of rows of a tensor that one rule copies; the digest is taken once, with the first block."""

    def block(start: int, stop: int) -> Callable[[], Tensor]:
        def produce() -> Tensor:
            part = source.tensor(name)[start:stop].to(dtype)
            require_finite(name, part)
            if start == 0:
                result.tensors[name] = digest_blocks(source.tensor(name), dtype, rows)
            return part

        return produce

    return [
        torch_dist.Chunk(
            checkpoint_key(rule), model.global_shape(rule), (*lead, start, 0), (*lead_shape, min(rows, shape[0] - start), shape[1]), dtype, block(start, min(start + rows, shape[0]))
        )
        for start in range(0, shape[0], rows)
    ]


def _extra_states(model: Model, rule: Rule, layer: int) -> list[str]:
    """Names of the empty byte items that Megatron-Core keeps beside each linear layer's weight."""
    if not rule.megatron.endswith(".weight") or len(rule.megatron_shape(model.sizes)) != 2 or rule.megatron.startswith("embedding."):
        return []
    base = checkpoint_key(rule).removesuffix("weight")
    place = f"{layer}_{model.sizes.layers}" if model.layered(rule) else "0_1"
    return [f"{base}_extra_state/shard_{place}"]


def check_megatron(reader: torch_dist.Reader, model: Model) -> None:
    """Raise DataError unless the checkpoint holds exactly the model's tensors, vocabulary padding allowed."""
    wanted = {checkpoint_key(rule): rule for rule in model.family.rules_for(model.tied)}
    found = {key for key in reader.keys if not key.startswith(_OPTIMIZER)}
    missing, extra = sorted(set(wanted) - found), sorted(found - set(wanted))
    if missing or extra:
        raise DataError(
            "the checkpoint does not fit the model's config."
            + (f" Missing: {', '.join(missing[:10])}." if missing else "")
            + (f" Not expected: {', '.join(extra[:10])}." if extra else ""),
            where=str(reader.directory),
            fix="convert it with the config.json that it was made with",
        )
    for key, rule in wanted.items():
        shape, expected = reader.shape(key), model.global_shape(rule)
        padded = rule.hf_shapes(model.sizes)[0][0] == model.sizes.vocab and shape[0] >= expected[0] and shape[1:] == expected[1:]
        if shape != expected and not padded:
            raise DataError(f"{key} has shape {shape}, {expected} expected.", where=str(reader.directory))


def planned_hf_tensors(reader: torch_dist.Reader, config: PreTrainedConfig, dtype: torch.dtype) -> list[PlannedTensor]:
    """Every Hugging Face tensor with the way to get its values, in the order in which the rules give them.

    Parts of one fused tensor are read together and kept only until the last of them was taken.
    """
    model = Model(config)
    check_megatron(reader, model)
    planned = []
    for rule, layer in model.family.each(model.sizes, model.tied):
        shared: dict[int, Tensor] = {}

        def produce(number: int, rule: Rule = rule, layer: int = layer, shared: dict[int, Tensor] = shared) -> Tensor:
            if number not in shared:
                shared.update(enumerate(model.read_hf(reader, rule, layer)))
            value = shared.pop(number).to(dtype).contiguous()
            require_finite(rule.hf[number].format(i=layer), value)
            return value

        for number, (name, shape) in enumerate(zip(rule.hf, rule.hf_shapes(model.sizes))):
            planned.append(PlannedTensor(name.format(i=layer), dtype, shape, lambda number=number, produce=produce: produce(number)))
    return planned


def verify_round_trip(reader: torch_dist.Reader, config: PreTrainedConfig, expected: dict[str, str]) -> int:
    """Read the Megatron checkpoint back as Hugging Face tensors and compare each SHA-256; the number of equal tensors.

    Raises DataError naming the first tensor that differs.
    """
    model = Model(config)
    check_megatron(reader, model)
    for rule, layer in model.family.each(model.sizes, model.tied):
        for name, value in zip(rule.hf, model.read_hf(reader, rule, layer)):
            name = name.format(i=layer)
            if digest(value.contiguous()) != expected.get(name):
                raise DataError("a tensor read back from the Megatron checkpoint is not the one in the source.", where=name, fix="convert again; if it stays, report it")
    return len(expected)


def require_finite(name: str, value: Tensor) -> None:
    """Raise DataError for NaN or infinite values; a plain sum finds them in one pass."""
    if not torch.isfinite(value.sum(dtype=torch.float32)) and not torch.isfinite(value).all():
        raise DataError("the tensor has NaN or infinite values.", where=name, fix="use another checkpoint")


def digest(value: Tensor) -> str:
    """SHA-256 of a tensor's raw bytes in row-major order."""
    return hashlib.sha256(value.contiguous().view(torch.uint8).numpy()).hexdigest()


def digest_blocks(value: Tensor, dtype: torch.dtype, rows: int) -> str:
    """The same as `digest(value.to(dtype))`, with one block of rows in memory."""
    running: Any = hashlib.sha256()
    for start in range(0, value.shape[0], rows):
        running.update(value[start : start + rows].to(dtype).contiguous().view(torch.uint8).numpy())
    return running.hexdigest()
