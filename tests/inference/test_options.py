"""Decoding options: defaults of the contract, and refusal of values that cannot be."""

from __future__ import annotations

import pytest

from megaswift.config.options import InferArguments, parse
from megaswift.errors import UserError
from megaswift.inference.options import GenerationOptions


def test_defaults_are_those_of_the_command() -> None:
    assert GenerationOptions.from_args(InferArguments()) == GenerationOptions()


def test_flags_arrive() -> None:
    words = "--max_new_tokens 7 --do_sample false --temperature 0.5 --top_k 3 --top_p 0.9 --repetition_penalty 1.2"
    options = GenerationOptions.from_args(
        parse(
            InferArguments, [*words.split(), "--num_beams", "2", "--seed", "1", "--max_length", "9", "--stop_words", "a b", "c"]
        )
    )
    assert options == GenerationOptions(7, False, 0.5, 3, 0.9, 1.2, 2, ("a b", "c"), 9, "delete", 1)


@pytest.mark.parametrize(("do_sample", "temperature", "samples"), [(True, 0.3, True), (True, 0.0, False), (False, 0.3, False)])
def test_temperature_zero_and_do_sample_false_are_greedy(do_sample: bool, temperature: float, samples: bool) -> None:
    assert GenerationOptions(do_sample=do_sample, temperature=temperature).samples is samples


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("num_beams", 0),
        ("max_length", 0),
        ("stop_words", ("",)),
        ("truncation", "split"),
    ],
)
def test_impossible_values_are_refused_with_the_flag(name: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        GenerationOptions(**{name: value})
    assert name in error.value.text()
