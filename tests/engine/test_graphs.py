"""CUDA graphs: what goes through one is the same training. On a CPU the same fillings run without being captured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.errors import UserError
from megaswift.megatron.graphs import Graphs, Shape, Static, bucket
from tests.ranks import RankPool
from tests.runs import resolved_run
from tests.training import Trained, long, run_job, tiny_start, train, write_rows

RUNS = {
    "end to end": dict(batch_size=4),
    "packed": dict(batch_size=1, packing=True),
    "padded": dict(batch_size=4, padding_free=False),
}


def test_buckets_add_at_most_an_eighth() -> None:
    for number in range(1, 5000):
        assert number <= bucket(number) <= max(number * 9 / 8, number + 0.5)
    assert bucket(2048) == 2048 and bucket(2049) == 2304
    assert len({bucket(number) for number in range(1024, 2048)}) == 9


def test_the_filling_is_a_sample_of_its_own() -> None:
    seq_lens = [70, 5, 60]
    shape = Shape(torch.zeros(135, 1, 8), seq_lens)
    assert shape.key == (144, 1, 4, 128)
    assert shape.borders(seq_lens).tolist() == [0, 70, 75, 135, 144]
    assert Shape(torch.zeros(140, 1, 8), [140]).borders([140]).tolist() == [0, 140, 144]
    full = Shape(torch.zeros(144, 1, 8), [100, 44])
    assert full.borders([100, 44]).tolist() == [0, 100, 144, 144, 144]
    assert Shape(torch.zeros(130, 3, 8), None).key == (144, 3, None, None)


def uncaptured(path: str) -> tuple[int, int]:
    """The loop of one rank with every micro batch filled up as for a graph; how many there were, and how many shapes."""
    made: list[Static] = []
    counts = [0]

    def capture(self: Graphs, shape: Shape, hidden: torch.Tensor, layout: Any) -> Static:
        made.append(Static(self.decoder, shape, hidden, layout))
        return made[-1]

    def begin(self: Graphs, decoder: Any, mode: str, overlap: bool, has_adapter: bool) -> None:
        assert mode == "if launching is slow" and not overlap
        begin_as_it_is(self, decoder, mode, overlap, has_adapter)
        self.on = True

    def fill(self: Static, *arguments: Any) -> None:
        counts[0] += 1
        fill_as_it_is(self, *arguments)

    begin_as_it_is, fill_as_it_is = Graphs.__init__, Static.fill
    with (
        mock.patch.object(Graphs, "__init__", begin),
        mock.patch.object(Graphs, "_capture", capture),
        mock.patch.object(Static, "fill", fill),
    ):
        run_job(path)
    return counts[0], len(made)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("graphs")
    return tiny_start(root, dtype="float32"), write_rows(root / "rows.jsonl")


def six_steps(pool: RankPool, start: tuple[Path, Path], output: Path, **options: Any) -> Trained:
    release, rows = start
    common = dict(resume_from_checkpoint=str(release), dataset=[str(rows)], gradient_accumulation_steps=2, max_steps=6)
    return train(pool, output, 1, **common, **options)


@pytest.mark.parametrize("form", [pytest.param("end to end", marks=long), "packed", "padded"])
def test_filled_up_rows_train_alike(form: str, start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """Six steps of two micro batches: losses and gradient norms to 1e-6, whether rows go as they are or filled up."""
    plain = six_steps(pool, start, tmp_path / "plain", **RUNS[form])
    with mock.patch("tests.training.run_job", uncaptured):
        filled = six_steps(pool, start, tmp_path / "filled", **RUNS[form])
    assert len(plain.losses) == 6 and plain.losses[-1] < plain.losses[0]
    assert filled.losses == pytest.approx(plain.losses, rel=1e-6)
    assert filled.norms == pytest.approx(plain.norms, rel=1e-5)


KINDS = {
    "experts": dict(),
    "experts, recomputed": dict(gradient_checkpointing=True),
    "experts, adapters": dict(sft_type="lora", lora_rank=4, lora_dropout=0.0, target_modules=["all-linear", "all-experts"]),
    "adapters, dropout, recomputed": dict(sft_type="lora", lora_rank=4, lora_dropout=0.3, gradient_checkpointing=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_adapters_train_alike(kind: str, pool: RankPool, tmp_path: Path) -> None:
    """The same with what routers are told, which leave the filling out, and with the tokens' keys for dropout."""
    name = "qwen3_moe" if "experts" in kind else "llama"
    start = tiny_start(tmp_path / "start", name, dtype="float32"), write_rows(tmp_path / "rows.jsonl")
    common = RUNS["packed"] | KINDS[kind] | ({"moe_aux_loss_coeff": 0.01} if name == "qwen3_moe" else {})
    plain = six_steps(pool, start, tmp_path / "plain", **common)
    with mock.patch("tests.training.run_job", uncaptured):
        filled = six_steps(pool, start, tmp_path / "filled", **common)
    assert len(plain.losses) == 6 and plain.losses[-1] < plain.losses[0]
    assert filled.losses == pytest.approx(plain.losses, rel=1e-6)
    assert filled.norms == pytest.approx(plain.norms, rel=1e-5)
    if name == "qwen3_moe":
        files = [json.loads((run.directory / "experts.json").read_text(encoding="utf-8")) for run in (plain, filled)]
        loads = [[(layer["tokens"], layer["load"]) for layer in file["window"]] for file in files]
        assert loads[0] == loads[1]


def test_the_fillings_really_ran(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    results: list[Any] = []
    run = pool.run

    def noted(*arguments: Any) -> Any:
        results.append(run(*arguments))
        return results[-1]

    with mock.patch("tests.training.run_job", uncaptured), mock.patch.object(pool, "run", noted):
        six_steps(pool, start, tmp_path, **RUNS["packed"])
    ((times, shapes),) = results[-1]
    assert times >= 6 and 1 <= shapes < times


def test_auto_judges_by_what_launching_took() -> None:
    for launched, on in ((0.097, True), (0.02, False)):
        graphs = Graphs.__new__(Graphs)
        graphs.times, graphs.measuring, graphs.problem = [(0.5, 0.9), (launched, 0.1)], True, None
        graphs.advised_only = False
        graphs._decide()
        assert graphs.on is on and not graphs.measuring
        assert f"CUDA graphs: {'on' if on else 'off'}, launching kernels took {1e3 * launched:.0f} of 100 ms" in str(
            graphs.take_note()
        )
        assert graphs.take_note() is None


def test_with_experts_or_adapters_graphs_are_advised() -> None:
    for launched, advice in ((0.097, "launching kernels took 97 of 100 ms of a step: --cuda_graphs true would"), (0.02, None)):
        graphs = Graphs.__new__(Graphs)
        graphs.times, graphs.measuring, graphs.problem, graphs.advised_only = [(launched, 0.1)], True, None, True
        graphs.on, graphs.note = False, None
        graphs._decide()
        note = graphs.take_note()
        assert note is None if advice is None else str(note).startswith(advice)
        assert not (graphs.on or graphs.measuring)


def test_where_graphs_cannot_be_larger_micro_batches_are_advised() -> None:
    for launched, advice in ((0.097, "launching kernels took 97 of 100 ms of a step: fewer micro batches"), (0.02, None)):
        graphs = Graphs.__new__(Graphs)
        graphs.times, graphs.measuring, graphs.on, graphs.note = [(launched, 0.1)], True, False, None
        graphs.problem = "messages between ranks are not captured"
        graphs._decide()
        note = graphs.take_note()
        assert note is None if advice is None else str(note).startswith(advice)
        assert not (graphs.on or graphs.measuring)


@pytest.mark.parametrize("options", [{"tp": 2}, {"deterministic": True}, {"overlap_grad_reduce": True}])
def test_graphs_that_cannot_be_are_refused(options: dict[str, Any], start: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="--cuda_graphs true does not work with --"):
        resolved_run(on_gpu=True, cuda_graphs="true", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_graphs_need_a_gpu(start: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--cuda_graphs true needs an NVIDIA GPU"):
        six_steps(pool, start, tmp_path, cuda_graphs="true")
    assert not any(tmp_path.rglob("plan.json"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("form", [*RUNS, *KINDS])
def test_captured_is_not_captured(form: str, start: tuple[Path, Path], tmp_path: Path) -> None:
    """The command itself, thrice over the rows, so that shapes come back and are captured."""
    release, rows = start
    if "experts" in form:
        release = tiny_start(tmp_path / "start", "qwen3_moe", dtype="float32")
    common = dict(resume_from_checkpoint=release, dataset=rows, gradient_accumulation_steps=2, num_train_epochs=3)
    common |= dict(
        RUNS.get(form) or RUNS["packed"] | KINDS[form],
        dtype="bf16",
        logging_steps=1,
        learning_rate=1e-3,
        add_output_dir_suffix="false",
    )
    losses = {}
    for graphs in ("false", "true"):
        output = tmp_path / graphs
        options = {**common, "cuda_graphs": graphs, "output_dir": output}
        words = [(f"--{name}", *(value if isinstance(value, list) else [value])) for name, value in options.items()]
        command = [sys.executable, "-m", "megaswift", "sft", *(str(word) for option in words for word in option)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in (next(output.rglob("logging.jsonl"))).read_text().splitlines()]
        losses[graphs] = [line["loss"] for line in lines if "loss" in line]
    assert len(losses["true"]) > 6
    assert losses["true"] == pytest.approx(losses["false"], rel=5e-3)
