"""Read back what a conversion wrote, and compare every tensor with its source, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from megaswift.convert.model import MegatronReader, Model, check_megatron, checkpoint_key, digest, raw
from megaswift.convert.precision import Precisions
from megaswift.errors import DataError
from megaswift.families.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.hf.read import HFCheckpoint

_FIX = "convert again; if it stays, report it"


def verify_round_trip(
    reader: MegatronReader, config: PreTrainedConfig, expected: dict[str, str], precisions: Precisions, threads: int = 2
) -> int:
    """Read a Megatron checkpoint back as Hugging Face tensors and compare each SHA-256; the number of equal tensors.

    Args:
        precisions: in which the hashes were taken; what is stored in more must hold such values and no others.

    Raises DataError naming the first tensor that differs.
    """
    model = Model(config)
    check_megatron(reader, model)

    def compare(rule: Rule, layer: int) -> str | None:
        values = model.read_hf(reader, rule, layer)
        wrong = None
        for name, value in zip(model.names(rule, layer), values):
            own = value.to(precisions.of(name))
            if digest(own) != expected.get(name) or raw(own.to(value.dtype)) != raw(value):
                wrong = name
                break
        reader.release(checkpoint_key(rule), model.place(rule, layer))
        return wrong

    _require_none(model, compare, "a tensor read back from the Megatron checkpoint is not the one in the source.", threads)
    return len(model.expected())


def verify_written(
    written: HFCheckpoint, reader: MegatronReader, config: PreTrainedConfig, precisions: Precisions, threads: int = 2
) -> int:
    """Read a Hugging Face folder back, pack it, and compare it with the Megatron checkpoint; the number of equal tensors.

    Raises DataError naming the first tensor that differs.
    """
    model = Model(config)

    def compare(rule: Rule, layer: int) -> str | None:
        names = model.names(rule, layer)
        parts = [written.tensor(name) for name in names]
        wide = precisions.widest(names)
        packed = rule.pack([part.to(wide) for part in parts], model.sizes)
        stored = reader.read(checkpoint_key(rule), model.place(rule, layer))[: packed.shape[0]].to(wide)
        if any(precisions.of(name) != wide for name in names):  # fused parts of several precisions
            mine = [part.to(precisions.of(name)).to(wide) for name, part in zip(names, rule.unpack(stored, model.sizes))]
            stored = rule.pack(mine, model.sizes)
        equal = all(part.dtype == precisions.of(name) for name, part in zip(names, parts)) and raw(packed) == raw(stored)
        for name in names:
            written.release(name)
        reader.release(checkpoint_key(rule), model.place(rule, layer))
        return None if equal else names[0]

    _require_none(model, compare, "a tensor of the Hugging Face folder is not the one in the Megatron checkpoint.", threads)
    return len(model.expected())


def _require_none(model: Model, compare: Callable[[Rule, int], str | None], what: str, threads: int) -> None:
    pairs = list(model.each())
    with ThreadPoolExecutor(threads) as pool:
        wrong = [name for name in pool.map(lambda pair: compare(*pair), pairs) if name is not None]
    if wrong:
        raise DataError(what, where=", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""), fix=_FIX)
