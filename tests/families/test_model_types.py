"""The registry of models: names, ids, templates, and recognising a directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megaswift.errors import UserError
from megaswift.models import families
from megaswift.models.registry import MODEL_TYPES, by_hub_id, model_type, repository_name, type_for_directory


@pytest.mark.parametrize(
    ("name", "ms_id", "hf_id", "template", "family"),
    [
        ("qwen2-7b-instruct", "qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B-Instruct", "qwen", "qwen2"),
        ("qwen1half-0_5b-chat", "qwen/Qwen1.5-0.5B-Chat", "Qwen/Qwen1.5-0.5B-Chat", "qwen", "qwen2"),
        ("qwen2-math-72b-instruct", "qwen/Qwen2-Math-72B-Instruct", "Qwen/Qwen2-Math-72B-Instruct", "qwen", "qwen2"),
        ("qwen2_5-1_5b-instruct", "qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "qwen2_5", "qwen2"),
        (
            "qwen2_5-coder-32b-instruct",
            "qwen/Qwen2.5-Coder-32B-Instruct",
            "Qwen/Qwen2.5-Coder-32B-Instruct",
            "qwen2_5",
            "qwen2",
        ),
        ("qwen3-8b", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "qwen3", "qwen3"),
        ("yi-1_5-9b-chat", "01ai/Yi-1.5-9B-Chat", "01-ai/Yi-1.5-9B-Chat", "chatml", "llama"),
        (
            "deepseek-coder-1_3b",
            "deepseek-ai/deepseek-coder-1.3b-base",
            "deepseek-ai/deepseek-coder-1.3b-base",
            "default-generation",
            "llama",
        ),
        (
            "llama3_1-8b-instruct",
            "LLM-Research/Meta-Llama-3.1-8B-Instruct",
            "meta-llama/Meta-Llama-3.1-8B-Instruct",
            "llama3",
            "llama",
        ),
        ("llama3_2-1b-instruct", "LLM-Research/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", "llama3_2", "llama"),
        (
            "mistral-7b-instruct-v3",
            "LLM-Research/Mistral-7B-Instruct-v0.3",
            "mistralai/Mistral-7B-Instruct-v0.3",
            "llama",
            "mistral",
        ),
        (
            "mistral-7b-instruct-v0.3",
            "LLM-Research/Mistral-7B-Instruct-v0.3",
            "mistralai/Mistral-7B-Instruct-v0.3",
            "llama",
            "mistral",
        ),
        (
            "smollm2-135m-instruct",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "smollm2",
            "llama",
        ),
        ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B", "qwen3", "qwen3_moe"),
        (
            "mixtral-8x7b-instruct",
            "AI-ModelScope/Mixtral-8x7B-Instruct-v0.1",
            "mistralai/Mixtral-8x7B-Instruct-v0.1",
            "llama",
            "mixtral",
        ),
        ("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B", "chatml", "smollm3"),
        ("ernie4_5-0_3b", "PaddlePaddle/ERNIE-4.5-0.3B-PT", "baidu/ERNIE-4.5-0.3B-PT", "default-generation", "ernie4_5"),
    ],
)
def test_entries(name: str, ms_id: str, hf_id: str, template: str, family: str) -> None:
    entry = model_type(name)
    assert (entry.name, entry.ms_id, entry.hf_id, entry.template, entry.family) == (name, ms_id, hf_id, template, family)


def test_every_entry_is_well_formed_and_of_a_known_family() -> None:
    assert len({(entry.ms_id, entry.hf_id) for entry in MODEL_TYPES.values()}) >= 300
    known = families()
    for name, entry in MODEL_TYPES.items():
        assert name == entry.name == name.lower() and entry.family in known
        assert entry.ms_id.count("/") == entry.hf_id.count("/") == 1
        assert (
            entry.template == "default-generation"
            or "math" in name
            or any(part in name for part in ("chat", "instruct", "qwen3", "smollm3", "alpaca", "codestral", "kimi-dev"))
        )


def test_default_systems() -> None:
    assert model_type("qwen2-7b-instruct").default_system == "You are a helpful assistant."
    assert (
        model_type("qwen2_5-3b-instruct").default_system
        == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    )
    assert model_type("smollm2-360m-instruct").default_system.startswith("You are a helpful AI assistant named SmolLM")
    for name in ("qwen3-8b", "llama3_1-8b-instruct", "qwen2-7b"):
        assert model_type(name).default_system is None


def test_an_unknown_name_brings_the_nearest() -> None:
    with pytest.raises(UserError, match="'qwen2-7b-instrukt' is not registered") as caught:
        model_type("qwen2-7b-instrukt")
    assert "qwen2-7b-instruct" in caught.value.fix and "--model_id_or_path" in caught.value.fix


def test_by_hub_id() -> None:
    assert by_hub_id("Qwen/Qwen2-7B-Instruct").name == by_hub_id("qwen/qwen2-7b-instruct").name == "qwen2-7b-instruct"
    assert by_hub_id("mistralai/Mistral-7B-Instruct-v0.3").name == "mistral-7b-instruct-v3"
    assert by_hub_id("someone/else") is None


def _directory(path: Path, **config: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("qwen2_5-3b", "qwen2_5-3b"),
        ("qwen2_5-3b-hf", "qwen2_5-3b"),
        ("Qwen2.5-3B", "qwen2_5-3b"),
        ("Qwen2___5-3B", "qwen2_5-3b"),
        ("models--Qwen--Qwen2.5-3B/snapshots/1234", "qwen2_5-3b"),
        ("Qwen--Qwen2.5-3B/snapshots/master", "qwen2_5-3b"),
        ("my-model", None),
    ],
)
def test_a_directory_is_recognised_by_its_place(tmp_path: Path, place: str, found: str | None) -> None:
    assert type_for_directory(_directory(tmp_path / place, model_type="qwen2")) == found
    assert type_for_directory(_directory(tmp_path / "other" / place, model_type="llama")) is None


def test_a_directory_is_recognised_by_what_it_says(tmp_path: Path) -> None:
    path = _directory(tmp_path / "x", model_type="qwen3", _name_or_path="Qwen/Qwen3-8B")
    assert type_for_directory(path) == "qwen3-8b"
    (path / "export_args.json").write_text('{"model_type": "my-own"}')
    assert type_for_directory(path) == "my-own"
    (path / "sft_args.json").write_text('{"model_type": "newer"}')
    assert type_for_directory(path) == "newer"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": 3}', '{"_name_or_path": 3}'])
def test_recognising_never_fails(tmp_path: Path, content: str) -> None:
    for name in ("sft_args.json", "config.json"):
        (tmp_path / name).write_text(content)
    assert type_for_directory(tmp_path) is None and type_for_directory(tmp_path / "nothing") is None
    assert repository_name("/") == "" and repository_name("/a/my--model") == "my--model"


def test_the_table_is_light() -> None:
    code = "import sys, megaswift.models.registry; print(any(name in sys.modules for name in ('torch', 'numpy')))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "False"
