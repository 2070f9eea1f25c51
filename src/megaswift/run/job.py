"""What a rank needs to know of its run: `swift sft` writes it as job.json, every rank reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaswift.run.plan import Plan


@dataclass(frozen=True)
class Job:
    """What a rank needs to know; `swift sft` writes it, every rank reads it."""

    plan: Plan
    options: dict[str, Any]  # of SftArguments
    checkpoint: str  # torch_dist directory that training starts from
    model_dir: str  # directory with config.json
    train_data: str
    val_data: str | None
    pad_id: int
    first_step: int = 0  # steps that an earlier run already made
    other_dtypes: dict[str, str] = field(default_factory=dict)  # tensors that the source has in another precision than the rest
    rows_before: int | None = None  # of the embedding, where the checkpoint lacks rows for new tokens
    adapter: dict[str, Any] | None = None  # what is trained where it is not the model itself: a record of models.adapters.Lora
    base: dict[str, Any] | None = None  # the weights that an adapter stands beside: `base_record` of weights.base
    frozen: list[str] = field(default_factory=list)  # parameters of the model that stay as they are
    adapter_start: str | None = None  # directory of an adapter in PEFT's form that training goes on from

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "plan": Plan(**values["plan"])})
