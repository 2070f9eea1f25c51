"""Answers on a GPU."""

from __future__ import annotations

import pytest
import torch

from megaswift.inference.options import GenerationOptions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

CONVERSATIONS = [[{"role": "user", "content": text}] for text in ("who are you", "你是谁", "a" * 50)]


def load(path, dtype: str):
    from megaswift.inference.transformers_backend import TransformersBackend

    return TransformersBackend.load(path, dtype=dtype)


def test_auto_is_bf16_on_the_gpu_and_streams_what_it_answers(model_dir) -> None:
    backend = load(model_dir, "AUTO")
    assert backend.description == "cuda:0, bfloat16"
    options = GenerationOptions(max_new_tokens=40, temperature=0.9)
    for conversation in CONVERSATIONS:
        stream = backend.stream(conversation, options)
        assert "".join(stream) == backend.generate([conversation], options)[0].text == stream.answer.text


def test_fp32_answers_like_the_cpu(model_dir, monkeypatch) -> None:
    options = GenerationOptions(max_new_tokens=40, temperature=0, repetition_penalty=1.1, stop_words=("zz",))
    on_gpu = load(model_dir, "fp32").generate(CONVERSATIONS, options, batch_size=3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = load(model_dir, "fp32")
    assert on_cpu.description == "cpu, float32"
    assert on_gpu == on_cpu.generate(CONVERSATIONS, options)
