"""A step over joined documents is that of transformers and torch's AdamW at every layout, with and without attention across borders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.config.options import SftArguments
from megaswift.data.text_rows import TextRows, open_rows
from megaswift.parity.compare import UPDATES, relative, worst
from megaswift.parity.reference import Reference
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.config import load_config
from megaswift.weights.torch_dist.reader import Reader
from tests.engine.test_packed import LAYOUTS
from tests.pretrain.texts import expected, job, write_texts
from tests.ranks import RankPool
from tests.steps import EPSILON, LIMITS, RATE, take
from tests.training import tiny_start

ROWS = 12
# 61 tokens are no multiple of what sequence and context parallelism divide: rows are filled up.
FORMS: dict[str, dict[str, Any]] = {
    "separate": {"batch": 1, "max_length": 61},
    "separate, two rows": {"batch": 2, "max_length": 64},
    "across": {"batch": 1, "max_length": 64, "reset_attention_mask": False},
    "across, padded": {"batch": 3, "max_length": 61, "reset_attention_mask": False, "padding_free": False},
}
SOME = ("tp1 pp1 dp1", "dp2", "pp2", "tp2, sequence parallel", "cp2")
LONG = "MEGASWIFT_LONG" in os.environ
NAMES = tuple(LAYOUTS) if LONG else SOME
PART = ("separate", "across, padded")  # of the forms, on several processes in the default suite


class PlainText(Reference):
    """transformers' model on whole rows, each with a mask of its own: causal, and where documents are separate within them alone."""

    def run(self, rows: Any, ids_of_step: list[np.ndarray], keep: bool = True) -> Any:
        assert isinstance(rows, TextRows)
        self.rows, self.ids = rows, ids_of_step
        return super().run(rows, ids_of_step, keep)

    def _gradients(self, samples: Any) -> tuple[float, dict[str, Tensor]]:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in self.ids[self.step]:
            ids, labels, document = (torch.from_numpy(one) for one in expected(self.rows, int(row)))
            size, places = len(ids), torch.arange(len(ids))
            seen = places[:, None] >= places[None]
            positions = places
            if self.rows.plan.separate:
                seen &= document[:, None] == document[None]
                starts = torch.cat([torch.ones(1, dtype=torch.bool), document[1:] != document[:-1]])
                positions = places - torch.where(starts, places, 0).cummax(0).values
            mask = torch.zeros(size, size).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
            made = self.model(input_ids=ids[None], attention_mask=mask, position_ids=positions[None], use_cache=False)
            total = total + F.cross_entropy(made.logits[0].double(), labels, reduction="sum")
            count += int((labels != -100).sum())
        (total / count).backward()
        gradients = {name: parameter.grad for name, parameter in self.names.items()}
        self._forget_gradients()
        return float(total.detach()) / count, {name: value for name, value in gradients.items() if value is not None}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_start(tmp_path_factory.mktemp("start"))


def test_a_step_is_that_of_transformers(start: Path, pool: RankPool, tmp_path: Path) -> None:
    """Loss, norm, every gradient and every weight after it."""
    items = [f"{write_texts(tmp_path / 'a.jsonl', 80)}:0.75", f"{write_texts(tmp_path / 'b.txt', 40, 1)}:0.25"]
    config, wanted = load_config(start.parent / "hf"), {}
    for name in NAMES:
        world, *layout = LAYOUTS[name]
        jobs = []
        for form, options in FORMS.items():
            words = {"learning_rate": RATE, "adam_epsilon": EPSILON, **options}
            if ROWS % (words["batch"] * world) or (world > 1 and not LONG and form not in PART):
                continue
            run = job(start, items, world, *layout, rows=ROWS, **words)
            path, target = tmp_path / f"{name} {form}.json", tmp_path / f"{name} {form}"
            run.write(path)
            jobs.append((str(path), str(target)))
            if form not in wanted:
                rows = open_rows(run.data.train)
                plain = PlainText(start.parent / "hf", SftArguments(learning_rate=RATE, adam_epsilon=EPSILON), "fp32", 1, 1)
                assert run.schedule.warmup_iters == 1
                wanted[form] = next(plain.run(rows, [np.arange(ROWS)]))
        assert len(jobs) >= 2
        results = pool.run(world, take, jobs)
        assert all(one == results[0] for one in results), "the ranks agree"
        for (_, target), found in zip(jobs, results[0]):
            form = Path(target).name.removeprefix(f"{name} ")
            judge(Path(target), config, found, wanted[form])
    assert abs(wanted["separate, two rows"].loss - wanted["across"].loss) > 1e-3, "the same rows, and not the same thing twice"


def judge(target: Path, config: Any, found: dict[str, float], wanted: Any) -> None:
    def same(what: str, difference: float, tensor: str = "") -> None:
        print(f"{target.name:50} {what:10} {difference:.1e} {tensor}")
        assert difference < LIMITS[what], f"{target.name}: {what} {difference:.1e} {tensor}"

    same("loss", relative(found["loss"], wanted.loss))
    same("norm", relative(found["norm"], wanted.grad_norm))
    for what, values, floor in (("gradient", wanted.gradients, 0.0), ("weight", wanted.weights, UPDATES * RATE)):
        saved = Reader(target / f"{what}s" / "iter_0000001")
        own = {one.name: one.produce() for one in planned_hf_tensors(saved, config, Precisions(torch.float32))}
        assert own.keys() == values.keys()
        same(what, *worst(((tensor, own[tensor], value) for tensor, value in values.items()), floor=floor))
