"""Tiny random Hugging Face models of every family, in which no weight is zero or one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from megaswift.models import describe, families
from megaswift.models.head import auto_class, auto_config
from megaswift.models.whole import whole_of
from megaswift.weights.hf.config import load_config

ROUTERS = (".gate.weight", ".router.weight", ".gate.wg.weight")  # as transformers names them once loaded
EVERY = tuple(sorted({family.name for family in families().values()}))
# These are walked at all layouts by default; between them they have every way of storing weights. The others bring layers of
# other kinds: by default they get tests/families/test_every_family.py, and all that these get by `make test-families`.
_CORE = (
    "dots1", "ernie4_5", "granitemoe", "llama", "mistral", "mixtral", "olmoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
OTHERS = tuple(name for name in EVERY if name not in _CORE)
FAMILIES = OTHERS if "MEGASWIFT_FAMILIES" in os.environ else _CORE


def tiny_config(name: str, **changes: Any) -> Any:
    """The tiny config of a family, with changes."""
    return describe.tiny_config(next(family for family in families().values() if family.name == name), **changes)


def dense_families() -> list[str]:
    """Families without experts: adapters of the others are refused."""
    made = {family.name: family for family in families().values()}
    return [name for name in EVERY if all(kind.experts is None for kind in made[name].layers(tiny_config(name)))]


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model with random weights everywhere: biases and norms too, so that nothing hides behind zeros and ones."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    family, config = next(family for family in families().values() if family.name == name), tiny_config(name, **changes)
    make: Any = AutoModelForCausalLM if family.whole is None else AutoModelForImageTextToText
    model = make.from_config(whole_of(config) or config, dtype=torch.float32, attn_implementation="eager")
    least = -0.5 if family.kind(config, 0).norm.startswith("zero_centred") else 0.5
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if parameter.ndim == 1:
                low = least if "norm" in place and place.endswith("weight") else 0.5 if name in _CORE else -0.5
                parameter.copy_(torch.rand_like(parameter) + low)
            else:  # routers are decided: no two experts are nearly as good for a token
                parameter.copy_(torch.randn_like(parameter) * (0.5 if place.endswith(ROUTERS) else 0.08))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(torch.rand_like(buffer) * 0.2)
    return model.eval()


def save_tiny(directory: Path, name: str, seed: int = 0, **changes: Any) -> Any:
    """Write a tiny model as a Hugging Face folder and return the model."""
    model = tiny_model(name, seed, **changes)
    model.save_pretrained(directory)
    return model


def loaded(folder: Path, **options: Any) -> Any:
    """transformers' model of a folder, in fp32 and with plain attention: of text, of pictures and text, or of scores."""
    config = options.pop("config", None) or load_config(folder)
    made: Any = auto_class(config)
    return made.from_pretrained(folder, config=auto_config(config), dtype=torch.float32, attn_implementation="eager", **options)


def to_megatron(hf: Path, target: Path) -> Path:
    """Convert a Hugging Face folder into a bare torch_dist directory."""
    from megaswift.weights.convert import Precisions, hf_to_megatron
    from megaswift.weights.hf.read import HFCheckpoint

    target.mkdir(parents=True)
    hf_to_megatron(HFCheckpoint.open(hf), load_config(hf), target, Precisions(torch.float32))
    return target


def write_tokenizer(directory: Path, vocab_size: int = 300) -> None:
    """A byte-level tokenizer with a ChatML template, for whole-command tests on tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["who are you", "I am an assistant"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    fast.save_pretrained(directory)


def add_tokens(directory: Path, *tokens: str, special: bool = False) -> None:
    """Tokens added to a folder's tokenizer alone, as users do who forget to resize the model."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    first = 1 + max([*content["model"]["vocab"].values(), *(item["id"] for item in content["added_tokens"])])
    content["added_tokens"] += [{"id": first + k, "content": token, **entry} for k, token in enumerate(tokens)]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
