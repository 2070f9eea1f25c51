"""sft_args.json and export_args.json: written whole, read strictly, and never stronger than a flag."""

from __future__ import annotations

import json

import pytest

from megaswift.config.files import (
    EXPORT_ARGS,
    MODEL_OPTIONS,
    SFT_ARGS,
    args_file_in,
    fill_from_file,
    kept_places,
    read_args_file,
    with_home,
    write_args_file,
)
from megaswift.config.options import ExportArguments, InferArguments, SftArguments, parse
from megaswift.errors import DataError


def test_each_command_has_its_file_and_sft_wins(tmp_path) -> None:
    assert read_args_file(tmp_path) == {}
    assert args_file_in(tmp_path) is None
    assert write_args_file(tmp_path, ExportArguments(tp=2)).name == EXPORT_ARGS
    assert read_args_file(tmp_path)["tp"] == 2
    assert write_args_file(tmp_path, SftArguments(tp=4)).name == SFT_ARGS
    assert read_args_file(tmp_path)["tp"] == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == [EXPORT_ARGS, SFT_ARGS]


def test_extra_entries_win_and_text_stays_readable(tmp_path) -> None:
    args = SftArguments(model_name=["小黄", "Xiao Huang"])
    path = write_args_file(tmp_path, args, {"model_type": "qwen2-7b-instruct", "version": "1"})
    assert "小黄" in path.read_text(encoding="utf-8")
    assert read_args_file(tmp_path)["model_type"] == "qwen2-7b-instruct"
    assert read_args_file(tmp_path)["version"] == "1"


def test_tokens_are_never_written(tmp_path) -> None:
    secrets = {"hub_token": "a", "HF_TOKEN": "b", "token": "c", "api_key": "d", "password": "e"}
    path = write_args_file(tmp_path, secrets | {"max_new_tokens": 5}, secrets, name="x.json")
    assert json.loads(path.read_text()) == {"max_new_tokens": 5}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ufffe"])
def test_a_file_that_is_no_object(tmp_path, text: str) -> None:
    (tmp_path / SFT_ARGS).write_text(text, encoding="utf-16" if text == "\ufffe" else "utf-8")
    with pytest.raises(DataError) as error:
        read_args_file(tmp_path)
    assert SFT_ARGS in error.value.where


def test_a_flag_wins_over_the_file_even_with_its_default_value() -> None:
    file = {"model_type": "from-file", "system": "from file", "dtype": "bf16", "template_type": "qwen", "max_length": 77}
    args = fill_from_file(parse(InferArguments, ["--dtype", "AUTO", "--system", ""]), file, MODEL_OPTIONS)
    assert (args.model_type, args.system, args.dtype, args.template_type) == ("from-file", "", "AUTO", "qwen")
    assert args.max_length == -1
    assert args.explicit() == {"dtype", "system"}


def test_null_in_the_file_changes_nothing_and_the_original_is_kept() -> None:
    args = InferArguments()
    filled = fill_from_file(args, {"system": None, "template_type": "chatml"}, MODEL_OPTIONS)
    assert (filled.system, filled.template_type, args.template_type) == (None, "chatml", "AUTO")


@pytest.mark.parametrize(("name", "value"), [("tp", "two"), ("tp", True), ("model_type", 3), ("dtype", "int4")])
def test_values_of_another_kind_are_refused(name: str, value: object) -> None:
    with pytest.raises(DataError, match=str(value)):
        fill_from_file(ExportArguments(), {name: value}, (name,))


def test_lists_and_numbers() -> None:
    values = {"dataset": ["a", "b"], "dataset_test_ratio": 0, "strict": True}
    args = fill_from_file(InferArguments(), values, tuple(values))
    assert (args.dataset, args.dataset_test_ratio, args.strict) == (["a", "b"], 0, True)
    with pytest.raises(DataError):
        fill_from_file(InferArguments(), {"dataset": "a"}, ("dataset",))


def test_places_are_absolute_and_a_hub_id_is_no_place(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    args = SftArguments(model_id_or_path="hf", resume_from_checkpoint="start", output_dir="/out", logging_dir="tb")
    assert kept_places(args) == {
        "model_id_or_path": f"{tmp_path}/hf",
        "resume_from_checkpoint": f"{tmp_path}/start",
        "output_dir": "/out",
        "logging_dir": f"{tmp_path}/tb",
    }
    assert "model_id_or_path" not in kept_places(SftArguments(model_id_or_path="owner/name"))


def test_home_is_written_out_and_nothing_counts_as_given(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    args = with_home(
        ExportArguments(ckpt_dir="~/run", hf_output_dir="~", model_id_or_path="owner/~name", sign="~nobody-here/k")
    )
    assert (args.ckpt_dir, args.hf_output_dir) == (f"{tmp_path}/run", str(tmp_path))
    assert (args.model_id_or_path, args.sign, args.megatron_output_dir) == ("owner/~name", "~nobody-here/k", None)
    assert args.explicit() == {"ckpt_dir", "hf_output_dir", "model_id_or_path", "sign"}
