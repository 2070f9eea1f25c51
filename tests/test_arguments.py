"""Parsing: types, files, unknown and refused options; and the list of all options, frozen."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from megaswift.cli import main
from megaswift.config.files import write_args_file
from megaswift.config.options import (
    REFUSED,
    DeployArguments,
    DoctorArguments,
    EvalArguments,
    ExpertsArguments,
    ExportArguments,
    FamiliesArguments,
    InferArguments,
    InspectArguments,
    ParityArguments,
    PlanArguments,
    PtArguments,
    RlhfArguments,
    SftArguments,
    VerifyArguments,
    allowed,
    parse,
)
from megaswift.config.parse import size_of
from megaswift.errors import UserError
from megaswift.run.table import megatron_arguments
from tests.runs import resolved_run

GOLDEN = Path(__file__).parent / "golden" / "options.json"


def test_words_become_values() -> None:
    words = ["--dataset", "a#1", "b,c", "--model_name", "小黄", "Xiao Huang", "--learning_rate", "2e-4", "--pp=2", "--packing"]
    args = parse(SftArguments, [*words, "--padding_free", "false", "--use_flash_attn", "true", " "])
    assert args.dataset == ["a#1", "b", "c"]
    assert args.model_name == ["小黄", "Xiao Huang"]
    assert (args.learning_rate, args.pp, args.packing, args.padding_free, args.use_flash_attn) == (2e-4, 2, True, False, True)
    assert args.min_lr is args.save_steps is args.dataset_seed is None  # wishes only: what becomes of them stands in the plan
    assert {"dataset", "pp", "packing"} <= args.explicit()
    assert "min_lr" not in args.explicit()
    for word, value in {"True": True, "1": True, "yes": True, "False": False, "0": False, "no": False}.items():
        assert parse(SftArguments, ["--packing", word]).packing is value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "did you mean: learning_rate"),
        (["--tp", "two"], "is not a whole number"),
        (["--learning_rate", "nan"], "is not a number"),
        (["--weight_decay", "inf"], "is not a number"),
        (["--packing", "maybe"], "is not true or false"),
        (["--tp"], "needs a value"),
        (["--tp", "1", "2"], "takes one value"),
        (["dataset", "x"], "is no option"),
        (["--lr_scheduler_type", "step"], "use one of: cosine"),
        (["--deepspeed", "zero3"], "distributed optimizer"),
    ],
)
def test_bad_words(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(SftArguments, words)
    assert message in caught.value.text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size", "0"], "--batch_size 0 is not 1 or more."),
        (["--warmup_ratio", "1"], "--warmup_ratio 1 is not 0 or more, below 1."),
        (["--step_timeout", "0"], "--step_timeout 0 is not above 0."),
        (["--save_total_limit", "0"], "--save_total_limit 0 is not 1 or more."),
        (["--pp", "-1"], "--pp -1 is not 1 or more."),
        (["--dataset_test_ratio", "1"], "--dataset_test_ratio 1 is not 0 or more, below 1."),
        (["--max_length", "0"], "--max_length 0 is not -1, or 2 or more."),
        (["--max_length", "-2"], "--max_length -2 is not -1, or 2 or more."),
        (["--max_steps", "-2"], "--max_steps -2 is not -1 or more."),
    ],
)
def test_numbers_have_ranges(words: list[str], message: str, tmp_path: Path) -> None:
    """On the command line, in a file of options, and in a script."""
    assert_refused(SftArguments, words, message, tmp_path)


@pytest.mark.parametrize(
    ("cls", "words", "message"),
    [
        (InferArguments, ["--max_length", "0"], "--max_length 0 is not -1, or 1 or more."),
        (InferArguments, ["--num_beams", "0"], "--num_beams 0 is not 1 or more."),
        (InferArguments, ["--show_dataset_sample", "-2"], "--show_dataset_sample -2 is not -1, or 0 or more."),
        (DeployArguments, ["--port", "1234567"], "--port 1234567 is not 0 or more, at most 65535."),
        (DeployArguments, ["--temperature", "-0.5"], "--temperature -0.5 is not 0 or more."),
        (EvalArguments, ["--top_p", "0"], "--top_p 0 is not above 0, at most 1."),
        (EvalArguments, ["--gpu_memory_utilization", "1.5"], "--gpu_memory_utilization 1.5 is not above 0, at most 1."),
        (EvalArguments, ["--eval_few_shot", "-1"], "--eval_few_shot -1 is not 0 or more."),
        (ExportArguments, ["--iteration", "-1"], "--iteration -1 is not 0 or more."),
    ],
)
def test_numbers_of_the_other_commands_have_ranges(cls: type[Any], words: list[str], message: str, tmp_path: Path) -> None:
    assert_refused(cls, words, message, tmp_path)


def assert_refused(cls: type[Any], words: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    value = float(words[1])
    path.write_text(json.dumps({words[0][2:]: int(value) if value.is_integer() else value}))
    for read in (lambda: parse(cls, words), lambda: parse(cls, [str(path)]), lambda: cls(**json.loads(path.read_text()))):
        with pytest.raises(UserError) as caught:
            read()
        assert caught.value.what == message and caught.value.where == words[0]


def test_numbers_at_the_border_of_their_range() -> None:
    for value in (-1, 2):
        assert SftArguments(max_length=value).max_length == value
    assert DeployArguments(port=65535, gpu_memory_utilization=1, top_p=1, top_k=0).port == 65535
    assert InferArguments(show_dataset_sample=-1, max_length=1).show_dataset_sample == -1


@pytest.mark.parametrize(
    "cls", [ExportArguments, SftArguments, InferArguments, EvalArguments, DeployArguments, ParityArguments]
)
def test_every_number_declares_its_range(cls: type[Any]) -> None:
    """A seed's is that of numpy."""
    hints = typing.get_type_hints(cls)
    numbers = {item for item in dataclasses.fields(cls) if hints[item.name] in (int, float, int | None, float | None)}
    bare = [item.name for item in numbers if not (allowed(item) or item.metadata["choices"] or item.name.endswith("seed"))]
    assert len(numbers) > 3 and not bare


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 500 * 10**6), (".5MB", 500_000), ("2GiB", 2**31), ("7", 7), ("1.5KB", 1500), ("0.1", 1)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_of(text, "max_shard_size") == size
    assert (ExportArguments(max_shard_size=text).max_shard_size, DeployArguments(max_body_size=text).max_body_size) == (
        text,
        text,
    )


@pytest.mark.parametrize("text", ["big", "", "0", "-1GB", "1.2.3GB", "5 PB", "GB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    for cls, name in ((ExportArguments, "max_shard_size"), (DeployArguments, "max_body_size")):
        with pytest.raises(UserError, match="is no size") as caught:
            parse(cls, [f"--{name}", text])
        assert caught.value.where == f"--{name}" and "500MB" in caught.value.fix


def test_options_of_a_run_are_wishes(tmp_path: Path) -> None:
    """Used again with another rate, a file of options does not bring the old one's default for the last rate, nor for saving."""
    file = write_args_file(tmp_path, SftArguments(learning_rate=1e-4, eval_steps=50))
    again = parse(SftArguments, [str(file), "--learning_rate", "1e-6", "--eval_steps", "7"])
    made = megatron_arguments(
        resolved_run(**{name: getattr(again, name) for name in again.explicit() - {"model_type", "max_length", "dtype"}})
    )
    assert (made["min_lr"], made["save_interval"]) == (pytest.approx(1e-7), 7)


def test_help_is_grouped_and_tells_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--help"]) == 0
    text = capsys.readouterr().out
    for item in dataclasses.fields(SftArguments):
        assert text.count(f"\n  --{item.name}\n") + text.count(f"\n  --{item.name}  ") == 1, item.name
    assert "--batch_size  default 1; rows; 1 or more; Megatron: micro_batch_size" in text
    assert (
        text.index("Optimizer and learning rate.") < text.index("--learning_rate") < text.index("Evaluation and checkpoints.")
    )
    assert main(["deploy", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--port  default 8000; 0 or more, at most 65535\n" in text and "--top_p  default 0.7; above 0, at most 1\n" in text
    assert main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--examples" in text and "--dataset" in text and "--learning_rate" not in text and "they change nothing" in text


def test_a_comma_in_the_name_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "rows.jsonl"):
        Path(name).write_text("{}")
    Path("some,folder").mkdir()
    Path("folder").mkdir()
    whole = ["a,b.jsonl", "./a,b.jsonl#7", "some,folder:x/y#3", "some,folder", f"{tmp_path}/a,b.jsonl"]
    assert parse(SftArguments, ["--dataset", *whole]).dataset == whole
    words = ["rows.jsonl,b.jsonl", "folder:x,rows.jsonl", "some,folder:x,rows.jsonl", "a,c.jsonl"]
    apart = ["rows.jsonl", "b.jsonl", "folder:x", "rows.jsonl", "some", "folder:x", "rows.jsonl", "a", "c.jsonl"]
    assert parse(SftArguments, ["--val_dataset", *words]).val_dataset == apart
    Path("run.yaml").write_text("dataset: a,b.jsonl#2\n")
    assert parse(SftArguments, ["run.yaml"]).dataset == ["a,b.jsonl#2"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_options_say_what_to_use(name: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(SftArguments, [f"--{name}", "1"])
    assert name in caught.value.what
    assert caught.value.fix


def test_option_files(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"tp": 2, "dataset": ["x"]}), encoding="utf-8")
    (tmp_path / "run.yaml").write_text("tp: 2\ndataset: [x]\n", encoding="utf-8")
    for file in ("run.json", "run.yaml"):
        args = parse(SftArguments, [str(tmp_path / file), "--tp", "4"])
        assert (args.tp, args.dataset) == (4, ["x"])
    (tmp_path / "bad.json").write_text('{"tpp": 2}', encoding="utf-8")
    with pytest.raises(UserError, match="unknown option"):
        parse(SftArguments, [str(tmp_path / "bad.json")])
    with pytest.raises(UserError, match="cannot read"):
        parse(SftArguments, [str(tmp_path / "absent.json")])


def test_the_list_of_options_is_frozen() -> None:
    """A new option changes tests/golden/options.json in the same commit, and the docs."""
    found = {
        cls.__name__: sorted(item.name for item in dataclasses.fields(cls))
        for cls in (
            ExportArguments,
            SftArguments,
            PtArguments,
            RlhfArguments,
            InferArguments,
            VerifyArguments,
            FamiliesArguments,
            EvalArguments,
            DeployArguments,
            InspectArguments,
            ParityArguments,
            ExpertsArguments,
            PlanArguments,
            DoctorArguments,
        )
    }
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "cls",
    [
        ExportArguments,
        SftArguments,
        PtArguments,
        RlhfArguments,
        InferArguments,
        VerifyArguments,
        EvalArguments,
        DeployArguments,
        InspectArguments,
        ExpertsArguments,
        ParityArguments,
    ],
)
def test_every_option_has_a_help_sentence(cls: type) -> None:
    for item in dataclasses.fields(cls):
        assert item.metadata["help"].endswith("."), item.name


@pytest.mark.parametrize("cls", [SftArguments, InferArguments, EvalArguments, InspectArguments])
@pytest.mark.parametrize("value", [-1, 2**32])
def test_seeds_that_numpy_does_not_take(cls: type, value: int) -> None:
    with pytest.raises(UserError, match="no seed") as caught:
        parse(cls, ["--seed", str(value)])
    assert caught.value.where == "--seed"
    assert "from 0 to 4294967295" in caught.value.fix
    with pytest.raises(UserError, match="--dataset_seed"):
        SftArguments(dataset_seed=value)
    assert SftArguments(seed=0).dataset_seed is None  # the seed, wherever it is used
