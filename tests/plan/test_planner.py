"""What a planner proposes: the smallest change that fits, layouts that fit by speed, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaswift.config.options import SftArguments
from megaswift.errors import UserError
from megaswift.models.adapters import Lora
from megaswift.run.cards import GIB, card_of, cards, known_as
from megaswift.run.fit import fitted
from megaswift.run.planner import Place, Trial, fewest_gpus, ranked, smallest_change, tried, with_changes
from megaswift.run.source import TrainingSource
from tests import tiny
from tests.plan.shapes import config_of, targets


def trial_of(shape: str, gpus: int, card: str, lora: tuple[str, ...] = (), host: int = 0, **options: Any) -> Trial:
    args = SftArguments(model_type="bench", max_length=4096, sft_type="lora" if lora else "full", **options)
    source = source_of(shape, args, lora)
    return tried(args, source, Place(gpus, card_of(card), host, local=min(gpus, 8)))


def source_of(shape: str, args: SftArguments, lora: tuple[str, ...] = ()) -> TrainingSource:
    adapter = Lora(rank=8, alpha=32, dropout=0.0, targets=targets(shape, lora)) if lora else None
    return TrainingSource(
        args, Path("none"), Path("none"), config_of(shape), "bf16", manifest={}, run_dir=None, first_step=0, adapter=adapter
    )


def words(trial: Trial) -> str | None:
    change = smallest_change(trial)
    if change is None:
        return None
    better = with_changes(trial, change)
    assert better.fits and not better.wrong and (trial.fits or not trial.memory.needed <= trial.place.card.memory)
    return " ".join(one.words for one in change)


@pytest.mark.parametrize(
    ("trial", "change"),
    [
        (lambda: trial_of("7b", 1, "H200", ("all-linear",)), ""),
        (lambda: trial_of("1.5b", 1, "40", recompute_modules="none", batch_size=2), "--batch_size 1"),
        (lambda: trial_of("3b", 1, "A100-80G", batch_size=1, recompute_modules="none"), ""),
        (lambda: trial_of("1.5b", 1, "44", recompute_modules="none", batch_size=2), "--recompute_modules swiglu"),
        (lambda: trial_of("3b", 1, "A100-40G", batch_size=1), "--optimizer_cpu_offload true"),
        (lambda: trial_of("7b", 1, "24", ("all-linear",)), "--recompute_modules auto --gradient_checkpointing true"),
        (lambda: trial_of("7b", 1, "10", ("all-linear",)), "--recompute_modules auto --gradient_checkpointing true --quantization_bit 4"),
        (lambda: trial_of("7b", 1, "H100"), "--optimizer_cpu_offload true"),
        (lambda: trial_of("7b", 1, "A100-40G"), None),
    ],
)  # fmt: skip
def test_the_smallest_change_that_fits(trial: Any, change: str | None) -> None:
    assert words(trial()) == change


def test_smaller_micro_batches_keep_the_rows_of_a_step() -> None:
    trial = trial_of("1.5b", 2, "H100", batch_size=16, gradient_accumulation_steps=2)
    better = with_changes(trial, smallest_change(trial) or ())
    assert better.run.batch.micro_batch_size == 8 and better.run.batch.global_batch_size == 64


def test_nothing_larger_than_needed_is_changed() -> None:
    """Every set of changes with less weight does not fit."""
    trial = trial_of("7b", 1, "12", ("all-linear",))
    change = smallest_change(trial)
    assert change is not None and len(change) == 2
    for one in change:
        assert not with_changes(trial, (one,)).fits


def test_layouts_are_ranked_by_time_and_all_fit() -> None:
    found = ranked(trial_of("7b", 8, "H100"))
    steps = [one.speed.step for one in found]
    assert len(found) > 5 and steps == sorted(steps)
    assert all(one.fits and not one.wrong for one in found)
    assert {one.run.batch.global_batch_size for one in found} == {16}
    first = found[0].run.parallel
    assert (first.tp, first.pp, first.dp) == (1, 1, 8), "data parallelism where the model fits, as measured"


def test_experts_are_spread_where_the_model_is_large() -> None:
    found = ranked(trial_of("moe-48", 8, "H100"))
    assert found and all(one.run.parallel.ep > 1 or one.run.parallel.pp > 1 or one.run.parallel.tp > 1 for one in found)
    assert found[0].run.parallel.ep == 8


def test_what_two_cards_measured_is_ranked_in_that_order() -> None:
    """dp2, pp2, tp2 of the 7B shape at one row of 2,048 a micro batch, as measured."""
    place, config = Place(2, card_of("H200"), local=2), {"batch_size": 1, "gradient_accumulation_steps": 8}
    speeds = []
    for layout in ({}, {"pp": 2}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}):
        args = SftArguments(model_type="bench", max_length=2048, recompute_modules="none", **config, **layout)
        speeds.append(tried(args, source_of("7b", args), place).speed.per_gpu)
    assert speeds == sorted(speeds, reverse=True)


def test_how_many_cards_would_do() -> None:
    assert fewest_gpus(trial_of("7b", 1, "A100-40G")) == 4
    assert fewest_gpus(trial_of("moe-48", 2, "H100")) == 8


def test_cards() -> None:
    assert card_of("h200") is cards()["H200"] and card_of("48").memory == 48 * GIB == card_of("48GiB").memory
    assert not card_of("48").measured
    with pytest.raises(UserError, match="'H300' is not known"):
        card_of("H300")
    for name, ours in (
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
    ):
        assert known_as(name, 5).name == ours and known_as(name, 5).memory == 5
    other = known_as("Some Card 9", 7 * GIB)
    assert other.name == "Some Card 9" and not other.measured
    assert all(card.source and (card.memory or card.name == "CPU") for card in cards().values())


def test_what_cannot_fit_is_refused_with_the_way_out() -> None:
    args = SftArguments(model_type="bench", max_length=4096, sft_type="lora")
    start, place = source_of("7b", args, ("all-linear",)), Place(1, card_of("24"))
    with pytest.raises(UserError) as caught:
        fitted(start, place)
    assert "24 GiB has 24.0" in caught.value.what and "weights 14.2" in caught.value.what
    assert "--gradient_checkpointing true (about" in caught.value.fix and "--fit true takes it" in caught.value.fix
    assert fitted(replace(start, args=args.changed(fit="false")), place).args.gradient_checkpointing is False
    with pytest.raises(UserError, match="no change of options is enough"):
        fitted(source_of("7b", SftArguments(model_type="bench")), Place(1, card_of("A100-40G")))


def test_rows_that_are_short_take_less_than_max_length() -> None:
    """A length that only few models' rows reach refuses nobody: what counts is the longest row that there is."""
    args = SftArguments(model_type="bench", max_length=32768, sft_type="lora")
    start, place = source_of("7b", args, ("all-linear",)), Place(1, card_of("H100"))
    with pytest.raises(UserError, match="the fullest rank needs"):
        fitted(start, place)
    assert fitted(start, place, longest=600) is start
    taken = fitted(replace(start, args=args.changed(fit="true")), place, longest=32768)
    assert taken.args.max_length == 32768 and taken.args.gradient_checkpointing


def test_fit_true_takes_the_change_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    args = SftArguments(model_type="bench", max_length=4096, sft_type="lora", fit="true")
    start, place = source_of("7b", args, ("all-linear",)), Place(1, card_of("24"))
    taken = fitted(start, place)
    assert taken.args.gradient_checkpointing is True and tried(taken.args, taken, place).fits
    assert "--fit true takes --recompute_modules auto --gradient_checkpointing true" in capsys.readouterr().out
    assert fitted(taken, place) is taken, "what fits is left alone"
    fitted(start, place, tells=False)
    assert not capsys.readouterr().out


def test_fit_true_does_not_change_the_base() -> None:
    """4 bits would fit, but are another base: named, never taken."""
    args = SftArguments(model_type="bench", max_length=4096, sft_type="lora", fit="true")
    with pytest.raises(UserError) as caught:
        fitted(source_of("7b", args, ("all-linear",)), Place(1, card_of("12")))
    assert "no change of options is enough" in caught.value.fix


@pytest.mark.parametrize(("total", "fits"), [(1 << 20, False), (1 << 30, True)])
def test_host_memory_of_cpu_runs(total: int, fits: bool) -> None:
    """What all processes hold between two steps must be there; the rest is as it was: nobody is refused for activations."""
    config = tiny.tiny_config("llama")
    args = SftArguments(model_type="tiny", max_length=64)
    start = TrainingSource(args, Path("a"), Path("a"), config, "fp32", manifest={}, run_dir=None, first_step=0)
    place = Place(2, cards()["CPU"], total, local=2)
    if fits:
        assert fitted(start, place) is start
        return
    with pytest.raises(UserError, match="weights, gradients and optimizer alone of 2 processes take"):
        fitted(start, place)
