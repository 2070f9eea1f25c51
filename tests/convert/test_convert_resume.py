"""Interrupted conversions: what is complete is kept, what is not is never accepted, and the result is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from megaswift.errors import DataError, UserError
from megaswift.store import paths as layout
from megaswift.store import publish
from megaswift.store.files import sha256_of
from megaswift.weights.torch_dist import writer as torch_dist
from megaswift.weights.torch_dist.reader import Reader

SLOW = """
import sys, time
import torch
torch.set_num_threads(1)
from megaswift.store import files
from megaswift.weights.torch_dist import writer
from megaswift.commands.export import export_main

write = files.HashedFile.write
def slowly(self, data, also=None):
    time.sleep({pause})
    return write(self, data, also)
files.HashedFile.write = slowly
writer.FILE_BYTES = 40_000
print("started", flush=True)
export_main(sys.argv[1:])
"""


def start(words: list[str], pause: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(pause=pause), *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


def kill_when(process: subprocess.Popen[str], fault_point: Any) -> None:
    deadline = time.monotonic() + 120
    while not fault_point() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()


def records(place: Path, pattern: str) -> list[Path]:
    return [path for path in place.glob(f".*.tmp-*/.done/{pattern}") if not path.name.startswith(".")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "hf"
    tiny.save_tiny(folder, "llama", hidden_size=128, vocab_size=300)
    return folder


def not_accepted(place: Path, target: Path) -> None:
    """Neither export, sft nor infer takes what a killed conversion left."""
    assert not target.exists()
    for item in place.glob(".*.tmp-*"):
        assert not (item / "manifest.json").exists() and not (item / layout.RELEASE / "manifest.json").exists()
        with pytest.raises((DataError, UserError)):
            layout.find_checkpoint(item)


def test_killed_conversions_go_on_in_both_directions(model: Path, tmp_path: Path) -> None:
    there = [
        "--to_megatron",
        "true",
        "--model_type",
        "t",
        "--model_id_or_path",
        str(model),
        "--megatron_output_dir",
        str(tmp_path / "m"),
        "--verify",
        "false",
    ]
    process = start(there, 0.03)
    kill_when(process, lambda: len(records(tmp_path, "*.distcp.json")) >= 3)
    not_accepted(tmp_path, tmp_path / "m")
    (left,) = tmp_path.glob(".m.tmp-*")
    kept = {path.name.removesuffix(".json"): path for path in records(tmp_path, "*.distcp.json")}
    times = {name: (left / "release" / name).stat().st_mtime_ns for name in kept}
    damaged = sorted(kept)[0]
    data = bytearray((left / "release" / damaged).read_bytes())
    data[-1] ^= 1
    (left / "release" / damaged).write_bytes(data)

    process = start([*there, "--resume", "true"], 0)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"resumed: {len(kept) - 1} files" in said
    for name in kept:
        assert ((tmp_path / "m" / "release" / name).stat().st_mtime_ns == times[name]) == (name != damaged)
    assert not list(tmp_path.glob(".m.tmp-*")) and not (tmp_path / "m" / ".done").exists()
    manifest = json.loads((tmp_path / "m" / "release" / "manifest.json").read_text())
    assert all(sha256_of(tmp_path / "m" / "release" / name) == entry["sha256"] for name, entry in manifest["files"].items())

    back = [
        "--to_hf",
        "true",
        "--ckpt_dir",
        str(tmp_path / "m"),
        "--hf_output_dir",
        str(tmp_path / "h"),
        "--max_shard_size",
        "60KB",
        "--verify",
        "false",
    ]
    process = start(back, 0.03)
    kill_when(process, lambda: len(records(tmp_path, "*.safetensors.json")) >= 3)
    not_accepted(tmp_path, tmp_path / "h")
    process = start([*back, "--resume", "true"], 0)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resumed: " in said
    from megaswift.weights.hf.read import HFCheckpoint

    first, last = HFCheckpoint.open(model), HFCheckpoint.open(tmp_path / "h")
    assert set(first.names) == set(last.names) and all(
        torch.equal(first.tensor(name), last.tensor(name)) for name in first.names
    )


@pytest.mark.parametrize("after", [0.05, 0.4, 0.9, 1.6])
def test_killed_at_any_point_leaves_nothing_acceptable(model: Path, tmp_path: Path, after: float) -> None:
    words = [
        "--to_megatron",
        "true",
        "--model_type",
        "t",
        "--model_id_or_path",
        str(model),
        "--megatron_output_dir",
        str(tmp_path / "m"),
        "--verify",
        "false",
    ]
    process = start(words, 0.02)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (tmp_path / "m").exists():  # it was complete by then
        assert layout.find_checkpoint(tmp_path / "m")
    else:
        not_accepted(tmp_path, tmp_path / "m")


def test_another_plan_does_not_take_over(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), publish.workspace(tmp_path / "m", 10, plan="one", resume=True) as work:
        (work.path / "x").write_text("x")
        raise KeyboardInterrupt
    assert len(list(tmp_path.glob(".m.tmp-*"))) == 1
    with publish.workspace(tmp_path / "m", 10, plan="two", resume=True) as work:
        assert not (work.path / "x").exists()
    with publish.workspace(tmp_path / "m", 10, plan="one", resume=True) as work:
        assert (work.path / "x").exists()
        with publish.workspace(tmp_path / "m", 10, plan="one", resume=True) as other:
            assert other.path != work.path  # a living process keeps its own


def test_a_full_disk_is_seen_first_both_ways(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from megaswift.commands.export import export_main
    from megaswift.config.options import ExportArguments

    good = export_main(
        ExportArguments(
            model_type="t", model_id_or_path=str(model), to_megatron=True, megatron_output_dir=str(tmp_path / "m"), verify=False
        )
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    for options in (
        {
            "model_type": "t",
            "model_id_or_path": str(model),
            "to_megatron": True,
            "megatron_output_dir": str(tmp_path / "n" / "m"),
        },
        {"ckpt_dir": str(good), "to_hf": True, "hf_output_dir": str(tmp_path / "n" / "h")},
    ):
        with pytest.raises(UserError, match="not enough disk space: .* bytes needed, 5,000 free"):
            export_main(ExportArguments(**options, verify=False))
    assert not (tmp_path / "n").exists()


def test_memory_and_blocks_of_large_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors above the block size are written in blocks of rows, and read back whole, in part and by layer."""
    from megaswift.weights.convert import Precisions, hf_to_megatron, to_megatron, verify_round_trip
    from megaswift.weights.hf.config import load_config
    from megaswift.weights.hf.read import HFCheckpoint

    tiny.save_tiny(tmp_path / "hf", "qwen2", vocab_size=131, tie_word_embeddings=False)
    (tmp_path / "m").mkdir()
    monkeypatch.setattr(to_megatron, "_CHUNK_BYTES", 5000)
    monkeypatch.setattr(torch_dist, "FILE_BYTES", 20_000)
    source, config = HFCheckpoint.open(tmp_path / "hf"), load_config(tmp_path / "hf")
    done = hf_to_megatron(source, config, tmp_path / "m", Precisions(torch.float32))
    reader = Reader(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.distcp"))) > 5
    assert verify_round_trip(reader, config, done.tensors, Precisions(torch.float32)) == len(source.names)
    whole = source.tensor("lm_head.weight")
    assert torch.equal(reader.read("output_layer.weight", rows=(17, 101)), whole[17:101])
    fused = reader.read("decoder.layers.mlp.linear_fc1.weight", (2,))
    assert torch.equal(fused[96:], source.tensor("model.layers.2.mlp.up_proj.weight"))
    assert torch.equal(reader.read("decoder.layers.mlp.linear_fc1.weight", (2,), rows=(90, 100)), fused[90:100])
