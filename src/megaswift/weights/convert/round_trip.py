"""Read back what a conversion wrote, and compare every tensor with its source, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from megaswift.errors import DataError
from megaswift.models import parameters_of
from megaswift.models.parameters import Parameter, hf_shapes
from megaswift.weights.convert.model import MegatronReader, check_megatron, digest, raw, read_hf
from megaswift.weights.convert.precision import Precisions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.weights.hf.read import HFCheckpoint

_FIX = "convert again; if it stays, report it"


def verify_round_trip(
    reader: MegatronReader, config: PreTrainedConfig, expected: dict[str, str], precisions: Precisions, threads: int = 2
) -> int:
    """Read a Megatron checkpoint back as Hugging Face tensors and compare each SHA-256; the number of equal tensors.

    Args:
        precisions: in which the hashes were taken; what is stored in more must hold such values and no others.

    Raises DataError naming the first tensor that differs.
    """
    parameters = parameters_of(config)
    check_megatron(reader, parameters)

    def compare(parameter: Parameter) -> str | None:
        wrong = None
        for part, value in zip(parameter.hf, read_hf(reader, parameter)):
            own = value.to(precisions.of(part.name))
            if digest(own) != expected.get(part.label) or raw(own.to(value.dtype)) != raw(value):
                wrong = part.label
                break
        reader.release(parameter.key, parameter.place)
        return wrong

    _require_none(parameters, compare, "a tensor read back from the Megatron checkpoint is not the one in the source.", threads)
    return len(hf_shapes(parameters))


def verify_written(
    written: HFCheckpoint, reader: MegatronReader, config: PreTrainedConfig, precisions: Precisions, threads: int = 2
) -> int:
    """Read a Hugging Face folder back, pack it, and compare it with the Megatron checkpoint; the number of equal tensors.

    Raises DataError naming the first tensor that differs.
    """
    parameters = parameters_of(config)

    def compare(parameter: Parameter) -> str | None:
        arrangement, names = parameter.arrangement, [part.name for part in parameter.hf]
        parts = [written.part(part) for part in parameter.hf]
        wide = precisions.widest(names)
        packed = arrangement.pack([part.to(wide) for part in parts])
        stored = reader.read(parameter.key, parameter.place)[: packed.shape[0]].to(wide)
        if any(precisions.of(name) != wide for name in names):  # fused parts of several precisions
            mine = [part.to(precisions.of(name)).to(wide) for name, part in zip(names, arrangement.unpack(stored))]
            stored = arrangement.pack(mine)
        equal = all(part.dtype == precisions.of(name) for name, part in zip(names, parts)) and raw(packed) == raw(stored)
        for name in names:
            written.release(name)
        reader.release(parameter.key, parameter.place)
        return None if equal else parameter.hf[0].label

    _require_none(
        parameters, compare, "a tensor of the Hugging Face folder is not the one in the Megatron checkpoint.", threads
    )
    return len(hf_shapes(parameters))


def _require_none(parameters: list[Parameter], compare: Callable[[Parameter], str | None], what: str, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        wrong = [name for name in pool.map(compare, parameters) if name is not None]
    if wrong:
        raise DataError(what, where=", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""), fix=_FIX)
