"""The writer: what is written can be read by everybody, appears whole or not at all, and is hashed on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from hf_files import CONFIG, make_folder
from safetensors import safe_open
from safetensors.torch import load_file

from megaswift.errors import DataError, UserError
from megaswift.weights.hf import write
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.hf.shards import plan_shards, write_shard
from megaswift.weights.hf.write import PlannedTensor, dtype_override, remove_leftovers, write_checkpoint


def planned(tensors: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(name, value.dtype, tuple(value.shape), lambda value=value: value) for name, value in tensors.items()]


def sample() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embed": torch.randn(50, 8),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7, 3).bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(6, 4).t(),
        "long": torch.arange(9),
        "norm é": torch.ones(8),
    }


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("limit", [10**9, 400, 1])
def test_round_trip_in_one_and_in_many_shards(tmp_path: Path, limit: int) -> None:
    tensors = sample()
    source = make_folder(tmp_path / "source")
    (source / "tokenizer.json").write_bytes(b'{"odd":   "spacing"}')
    out = tmp_path / "new" / "out"
    result = write_checkpoint(out, planned(tensors), HFCheckpoint.open(source).side_files(), max_shard_size=limit)

    weights = sorted(out.glob("*.safetensors"))
    assert (len(weights) == 1) == (limit == 10**9) and (limit != 1 or len(weights) == len(tensors))
    loaded = {name: value for file in weights for name, value in load_file(file).items()}
    checkpoint = HFCheckpoint.open(out)
    assert loaded.keys() == tensors.keys() == set(checkpoint.names)
    for name, value in tensors.items():
        assert (
            loaded[name].dtype == value.dtype
            and torch.equal(loaded[name], value)
            and torch.equal(checkpoint.tensor(name), value)
        )
        assert result.tensors[name] == sha(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        assert checkpoint.entry(name).start % value.element_size() == 0
    for file in weights:
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    assert set(result.files) == {file.name for file in out.iterdir()}
    assert all(record.sha256 == sha((out / name).read_bytes()) for name, record in result.files.items())
    assert (
        result.bytes
        == sum(file.stat().st_size for file in out.iterdir())
        == sum(record.size for record in result.files.values())
    )
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert [item.name for item in out.parent.iterdir()] == ["out"]


def test_names_and_index_follow_the_habit_of_the_hub(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(100) for name in "abcde"}
    write_checkpoint(tmp_path / "out", planned(tensors), max_shard_size=800)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"] == {
        name: f"model-0000{1 + number // 2}-of-00003.safetensors" for number, name in enumerate("abcde")
    }


def test_plan_depends_on_sizes_alone() -> None:
    first, again = (plan_shards(planned(sample()), 400) for _ in range(2))
    assert [(shard.file, shard.header, shard.nbytes) for shard in first] == [
        (shard.file, shard.header, shard.nbytes) for shard in again
    ]


def test_one_shard_can_be_written_alone(tmp_path: Path) -> None:
    shard = plan_shards(planned(sample()), 400)[1]
    result = write_shard(shard, tmp_path / shard.file)
    assert (tmp_path / shard.file).stat().st_size == shard.nbytes == result.record.size
    assert set(load_file(tmp_path / shard.file)) == set(result.tensors) == {tensor.name for tensor in shard.tensors}


def test_config_overrides_change_only_their_fields(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", config=CONFIG | {"name": "模型", "dtype": "float32"})
    overrides = dtype_override(json.loads((source / "config.json").read_text()), torch.bfloat16)
    assert overrides == {"dtype": "bfloat16"} and dtype_override({}, torch.float16) == {"torch_dtype": "float16"}
    write_checkpoint(tmp_path / "out", planned(sample()), [source / "config.json"], overrides)
    text = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(text) == CONFIG | {"name": "模型", "dtype": "bfloat16"} and "模型" in text


def test_extra_files_and_what_the_caller_adds_before_it_is_published(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def add(result: write.WriteResult) -> None:
        assert result.path != out and not out.exists() and (result.path / "model.safetensors").exists()
        (result.path / "manifest.json").write_text(json.dumps(result.tensors))

    result = write_checkpoint(out, planned(sample()), extra_files={"config.json": b"{}"}, before_publish=add)
    assert result.path == out and set(json.loads((out / "manifest.json").read_text())) == set(sample())


def test_hooks_of_a_tensor_and_progress(tmp_path: Path) -> None:
    calls: list[str] = []

    def tensor(name: str) -> PlannedTensor:
        def note(what: str, value: torch.Tensor | None = None):
            return lambda: (calls.append(f"{what} {name}"), value)[1]

        return PlannedTensor(name, torch.float32, (4,), note("make", torch.ones(4)), note("prepare"), note("release"))

    done: list[int] = []
    result = write_checkpoint(tmp_path / "out", [tensor("a"), tensor("b")], progress=done.append)
    assert calls == ["prepare b", "make a", "release a", "make b", "release b"] and sum(done) == result.bytes


def test_an_existing_directory_is_never_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_checkpoint(out, planned(sample()))
    out.rmdir()
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        write_checkpoint(out, planned(sample()))
    out.unlink()

    def meddle(result: write.WriteResult) -> None:
        make_folder(out)

    with pytest.raises(UserError, match="exists already"):
        write_checkpoint(out, planned(sample()), before_publish=meddle)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out"] and HFCheckpoint.open(out).names


FAULTS = {
    "produce raises": (lambda: 1 / 0, ZeroDivisionError),
    "wrong shape": (lambda: torch.zeros(3), ValueError),
    "wrong dtype": (lambda: torch.zeros(4).half(), ValueError),
    "interrupted": (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_left_after_a_failure(tmp_path: Path, fault: str, threads: int) -> None:
    produce, error = FAULTS[fault]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background with Ctrl-C ignored
    tensors = planned({f"t{number}": torch.zeros(4) for number in range(9)})
    tensors.insert(4, PlannedTensor("bad", torch.float32, (4,), produce))
    before = threading.active_count()
    with pytest.raises((error, ValueError) if fault == "interrupted" else error):
        write_checkpoint(tmp_path / "deep" / "er" / "out", tensors, max_shard_size=16, threads=threads)
    assert list(tmp_path.iterdir()) == [] and threading.active_count() == before


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(UserError, match=r"not enough disk space: 4,\d\d\d bytes needed, 5,000 free"):
        write_checkpoint(tmp_path / "out", planned({"a": torch.zeros(1024)}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "the disk is full: "), (errno.EIO, "cannot write ")])
def test_a_disk_that_fails_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    real, written = os.write, [0]

    def failing(handle: int, data: memoryview) -> int:
        written[0] += len(data)
        if written[0] > 2000:
            raise OSError(code, os.strerror(code))
        return real(handle, data)

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(UserError, match=message):
        write_checkpoint(tmp_path / "out", planned({f"t{number}": torch.zeros(200) for number in range(9)}), max_shard_size=800)
    assert list(tmp_path.iterdir()) == []


def test_the_audit_sees_what_the_disk_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        write, "write_shard", lambda shard, path, **_: write_shard(plan_shards(planned({"x": torch.zeros(2)}), 99)[0], path)
    )
    with pytest.raises(DataError, match="not as planned, for example 'a'"):
        write_checkpoint(tmp_path / "out", planned({"a": torch.zeros(2)}))
    assert list(tmp_path.iterdir()) == []


def _write_slowly(out: Path) -> None:
    def produce() -> torch.Tensor:
        (out.parent / "started").touch()
        time.sleep(60)
        return torch.zeros(4)

    write_checkpoint(out, [PlannedTensor("a", torch.float32, (4,), produce)])


def test_what_a_killed_process_left_is_removed_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(out,))
    process.start()
    while not (tmp_path / "started").exists():
        assert process.is_alive(), "it ended before it wrote anything"
        time.sleep(0.01)
    (leftover,) = tmp_path.glob(".out.tmp-*")
    os.utime(leftover, (0, 0))
    assert remove_leftovers(out) == []
    process.kill()
    process.join()
    assert leftover.exists() and not out.exists()
    os.utime(leftover, (0, 0))
    assert remove_leftovers(out) == [leftover] and not leftover.exists()
    write_checkpoint(out, planned(sample()), extra_files={"config.json": b"{}"})
    assert HFCheckpoint.open(out).names


@pytest.mark.parametrize("name", ["a/b", "../b", "x.safetensors"])
def test_bad_names_of_extra_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="side file"):
        write_checkpoint(tmp_path / "out", planned(sample()), extra_files={name: b""})
    with pytest.raises(ValueError, match="planned twice"):
        write_checkpoint(tmp_path / "out", planned(sample()) * 2)
    with pytest.raises(ValueError, match="no tensors"):
        write_checkpoint(tmp_path / "out", [])


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "source")
    source = HFCheckpoint.open(tmp_path / "source")
    copies = [
        PlannedTensor(name, source.dtype(name), source.shape(name), lambda name=name: source.tensor(name)) for name in source
    ]
    write_checkpoint(tmp_path / "out", copies, source.side_files(), max_shard_size=5000)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (
        not report["missing_keys"] and not report["unexpected_keys"] and len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    )
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
