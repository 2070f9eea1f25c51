"""Data options as sft_args.json keeps them: the same rows from any directory, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaswift.config.options import SftArguments
from megaswift.data.kept import kept_data
from megaswift.data.registry import entries
from megaswift.data.resolve import find
from megaswift.data.spec import parse_specs

ROW = '{"query": "a", "response": "b"}\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with rows.jsonl, folder/part/ and info.json; ~ is the directory above."""
    place = tmp_path / "here"
    (place / "folder" / "part").mkdir(parents=True)
    for path in (place / "rows.jsonl", place / "folder" / "part" / "x.jsonl", tmp_path / "home.jsonl"):
        path.write_text(ROW)
    (place / "info.json").write_text(json.dumps({"mine": {"path": "rows.jsonl"}}))
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path))
    return place


def kept(items: list[str], custom: str | None = None) -> dict[str, Any]:
    return kept_data(SftArguments(dataset=items, val_dataset=items[:1], custom_dataset_info=custom))


def test_local_paths_become_absolute_with_what_follows_them(here: Path) -> None:
    items = ["rows.jsonl", "./rows.jsonl#7", "folder:part", "folder:part#3", "~/home.jsonl#2", "rows.jsonl#1,self-cognition#5"]
    values = kept(items)
    assert values["dataset"] == [
        f"{here}/rows.jsonl",
        f"{here}/rows.jsonl#7",
        f"{here}/folder:part",
        f"{here}/folder:part#3",
        f"{here.parent}/home.jsonl#2",
        f"{here}/rows.jsonl#1",
        "self-cognition#5",
    ]
    assert values["val_dataset"] == [f"{here}/rows.jsonl"]
    specs = parse_specs(values["dataset"])
    assert [(spec.subsets, spec.count) for spec in specs] == [(spec.subsets, spec.count) for spec in parse_specs(items)]
    assert kept(values["dataset"])["dataset"] == values["dataset"]


@pytest.mark.parametrize(
    "item", ["self-cognition#500", "swift-mix:sharegpt#5", "HF::owner/name", "MS::rows.jsonl#3", "owner/name:a/b#2"]
)
def test_names_and_hub_ids_stay(here: Path, item: str) -> None:
    assert kept([item])["dataset"] == [item]


def test_a_mark_in_the_name_of_a_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a#b", "a::b", "a:b"):
        (here / name / "sub").mkdir(parents=True)
        (here / name / "rows.jsonl").write_text(ROW)
        monkeypatch.chdir(here / name)
        for item in ("rows.jsonl", "rows.jsonl#4"):
            [one] = parse_specs(kept([item])["dataset"])
            assert one.is_local and Path(one.name).absolute() == here / name / "rows.jsonl", (name, item)
            assert one.count == parse_specs([item])[0].count


def test_a_file_of_datasets_and_json_text(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "info.json",
        '{"mine": {"path": "rows.jsonl"}, "other": {"ms": "owner/name"}}',
        '[{"dataset_name": "mine", "dataset_path": "rows.jsonl"}, {"ms_dataset_id": "owner/name"}]',
    ]
    values = [kept(["mine#2"], text)["custom_dataset_info"] for text in texts]
    [named_by_path] = json.loads(kept(["mine"], '[{"dataset_path": "folder/part"}]')["custom_dataset_info"])
    assert named_by_path == {"dataset_path": f"{here}/folder/part", "dataset_name": "folder/part"}
    monkeypatch.chdir("/")
    assert values[0] == f"{here}/info.json"
    for value in values:
        assert find(parse_specs(["mine#2"])[0], value).path == here / "rows.jsonl"
    assert entries(values[1])["other"].ms == "owner/name"
    assert kept(["mine"], None)["custom_dataset_info"] is None and kept(["mine"], "{")["custom_dataset_info"] == "{"
