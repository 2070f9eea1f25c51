"""The proof of one conversion: run it, refuse what fails, and put the result where the manifest and people find it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError
from megaswift.proof.page import page

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.weights.convert.model import MegatronReader
    from megaswift.weights.convert.precision import Precisions
    from megaswift.weights.hf.read import HFCheckpoint

PAGE = "conversion.html"


def prove(
    config: PreTrainedConfig,
    source: HFCheckpoint,
    reader: MegatronReader,
    precisions: Precisions,
    model_dir: Path,
    round_trip: int,
) -> dict[str, Any]:
    """Config audit and logits of a Megatron checkpoint against transformers on the Hugging Face folder.

    Args:
        precisions: of the Megatron weights.
        model_dir: where the tokenizer is.
        round_trip: tensors that were found equal, bit for bit.

    Returns the numbers for the manifest. Raises DataError naming the field, or the first diverging layer and module.
    """
    from megaswift.proof.audit import neutral_fields, require_equal
    from megaswift.proof.parity import compare

    parity = compare(config, source, reader, precisions, model_dir)
    failed = f"the Megatron form does not compute what transformers computes: {parity.failed}." if parity.failed else ""
    try:
        require_equal(parity.config, str(model_dir / "config.json"))
    except DataError as error:
        if not failed:
            raise
        raise DataError(f"{error.what}\n  {failed}", where=parity.where, fix=error.fix) from error
    if failed:
        raise DataError(
            failed, where=parity.where, fix="nothing was made; report it with this config.json (--verify false skips the proof)"
        )
    return {
        "round_trip_tensors": round_trip,
        "logits": parity.to_dict(),
        "config": [asdict(finding) for finding in parity.config],
        "neutral_fields": neutral_fields(config),
    }


def write_page(directory: Path, title: str, facts: list[tuple[str, str]], proof: dict[str, Any]) -> None:
    """Write conversion.html."""
    (directory / PAGE).write_text(page(title, facts, proof), encoding="utf-8")


def summary(proof: dict[str, Any]) -> dict[str, Any]:
    """What the manifest keeps of a proof: numbers without the list of all layers; what was rounded stands beside it."""
    counts: dict[str, Any] = {name: proof[name] for name in ("round_trip_tensors", "carried_tensors") if name in proof}
    if "logits" not in proof:
        return counts
    logits = {name: value for name, value in proof["logits"].items() if name not in ("layers", "failed", "where")}
    logits["worst_state"] = max(proof["logits"]["layers"])
    audited = {item["field"]: item["config"] for item in proof["config"]}
    return {**counts, "logits": logits, "config": audited}
