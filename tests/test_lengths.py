"""One rule of lengths, whatever RoPE or window a config has: what swift data counts, what sft trains, what infer takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaswift.commands.data import data_main
from megaswift.config.options import SftArguments
from megaswift.errors import UserError
from megaswift.inference.transformers_backend import TransformersBackend
from megaswift.models.lengths import context_length, trained_length
from megaswift.run.source import resolve_source
from tests import tiny

THETA = {"rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **THETA}

# family, what the config says of 64 positions, the most tokens that infer takes and that training holds, what sets the latter
CASES: dict[str, tuple[str, dict[str, Any], int, int, str]] = {
    "default": ("llama", {"rope_parameters": {"rope_type": "default", **THETA}}, 64, 64, "max_position_embeddings"),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}}, 128, 128, "its RoPE scaling"),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA}}, 128, 64, "dynamic RoPE"),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **THETA}}, 256, 256, "its RoPE scaling"),
    "yarn of fewer": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **THETA}},
        128,
        128,
        "its RoPE scaling",
    ),
    "yarn, written after": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA}},
        64,
        64,
        "max_position_embeddings",
    ),
    "llama3": (
        "llama",
        {"rope_parameters": {"original_max_position_embeddings": 8, **LLAMA3}},
        64,
        64,
        "max_position_embeddings",
    ),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0, 1.5],
                "long_factor": [1.0, 4.0],
                **THETA,
            },
            "original_max_position_embeddings": 32,
        },
        64,
        32,
        "longrope",
    ),
    "window that the layers have": ("mistral", {"sliding_window": 24}, 64, 64, "max_position_embeddings"),
    "wide window": ("mistral", {"sliding_window": 4096}, 64, 64, "max_position_embeddings"),
    "no window": ("mistral", {"sliding_window": None}, 64, 64, "max_position_embeddings"),
    "window that they have not": (
        "smollm3",
        {"sliding_window": 24, "use_sliding_window": True, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
        64,
        24,
        "its sliding window",
    ),
    "window in no layer": (
        "qwen2",
        {"sliding_window": 24, "use_sliding_window": True, "layer_types": ["full_attention"] * 4},
        64,
        64,
        "max_position_embeddings",
    ),
    "window switched off": ("qwen2", {"sliding_window": 24, "use_sliding_window": False}, 64, 64, "max_position_embeddings"),
}


@pytest.mark.parametrize("case", CASES)
def test_data_sft_and_infer_have_one_rule(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, fields, context, trained, reason = CASES[case]
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))
    common = {"vocab_size": 300, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 64}
    if name in ("qwen2", "smollm3"):
        common["rope_parameters"] = {"rope_type": "default", **THETA}
    tiny.save_tiny(tmp_path / "hf", name, **common | fields)
    tiny.write_tokenizer(tmp_path / "hf")
    start = resolve_source(SftArguments(model_id_or_path=str(tmp_path / "hf"), model_type="t", max_length=-1))
    assert (context_length(start.config), trained_length(start.config)[0]) == (context, trained)
    assert reason in trained_length(start.config)[1]
    assert start.args.max_length == trained
    assert TransformersBackend.load(tmp_path / "hf").context == context
    with pytest.raises(UserError, match=f"beyond the model's {trained} tokens .*{reason}"):
        resolve_source(SftArguments(model_id_or_path=str(tmp_path / "hf"), model_type="t", max_length=trained + 1))
    rows, words = tmp_path / "rows.jsonl", ["--model_id_or_path", str(tmp_path / "hf"), "--dataset_test_ratio", "0"]
    rows.write_text("".join(json.dumps({"query": "q", "response": "q" * size}) + "\n" for size in (1, trained, context)))
    short = len(tiny_prompt(tmp_path / "hf"))
    fitting = "".join(
        json.dumps({"query": "q", "response": "q" * size}) + "\n" for size in (trained - short, trained - short + 1)
    )
    (tmp_path / "border.jsonl").write_text(fitting)
    assert len(data_main([*words, "--dataset", str(rows), "--max_length", "-1"]).data.train) == 1
    found = data_main([*words, "--dataset", str(tmp_path / "border.jsonl"), "--max_length", "-1"]).data
    assert len(found.train) == 1 and int(found.train.lengths[0]) == trained, "the border itself"


def tiny_prompt(folder: Path) -> list[int]:
    """Tokens of a row of one question beside its answer."""
    from megaswift.data.chat import ChatTemplate
    from megaswift.data.conversation import Conversation, Message
    from megaswift.weights.hf.tokenizer import read_tokenizer

    item = ChatTemplate(read_tokenizer(folder)).encode([Conversation([Message("user", "q"), Message("assistant", "q")])])[0]
    return list(item.ids[1:])  # type: ignore[union-attr]
