"""The reader: zero-copy views of sound files, and one clear error, naming the file, for every unsound one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from hf_files import CONFIG, f32, make_folder, raw_shard, two_shards, write_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megaswift.errors import DataError, ExitCode, MegaswiftError, UserError
from megaswift.weights.hf.folder import incomplete, side_files
from megaswift.weights.hf.header import read_header
from megaswift.weights.hf.read import HFCheckpoint, nonfinite

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SHARD = "model.safetensors"


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {str(dtype).split(".")[1]: (torch.randn(3, 5) * 3).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "f8": torch.randn(4, 4).to(torch.float8_e4m3fn)}
    checkpoint = HFCheckpoint.open(make_folder(tmp_path / "m", {SHARD: tensors}))
    assert set(checkpoint.names) == set(tensors) == set(checkpoint)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(
            checkpoint.tensor(name).view(torch.uint8) if name == "f8" else checkpoint.tensor(name),
            tensor.view(torch.uint8) if name == "f8" else tensor,
        )
    assert torch.equal(checkpoint.slice("float32", 1, 3), tensors["float32"][1:3])
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.largest_bytes == 3 * 5 * 8


def test_two_shards(tmp_path: Path) -> None:
    checkpoint = HFCheckpoint.open(two_shards(tmp_path / "m"))
    assert checkpoint.file_of("c").name == "model-00002-of-00002.safetensors"
    assert checkpoint.tensor("a")[1].tolist() == [3, 4, 5]


def test_tensors_are_views_and_the_file_never_changes(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m", {SHARD: {"a": torch.zeros(1 << 16), "b": torch.ones(1 << 16)}})
    before = (path / SHARD).read_bytes()
    checkpoint = HFCheckpoint.open(path)
    first, again = checkpoint.tensor("a"), checkpoint.tensor("a")
    assert first.data_ptr() == again.data_ptr()
    first[5] = 7.0
    assert (path / SHARD).read_bytes() == before
    checkpoint.prefetch("b")
    checkpoint.release("a")
    checkpoint.release("b")
    assert checkpoint.tensor("b").sum() == 1 << 16


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m", {})
    value = torch.tensor([1.5, -2.0])
    header = json.dumps({"a": f32(0, 8)}).encode()
    raw_shard(path / SHARD, header + b" " * (1 + -len(header) % 4), value.numpy().tobytes())
    checkpoint = HFCheckpoint.open(path)
    assert checkpoint.entry("a").start % 4 == 1
    assert torch.equal(checkpoint.tensor("a"), value)


FOREIGN = {
    "empty": (b"", "is empty (0 bytes)"),
    "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "an HTML page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "a Git LFS pointer"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle file"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip or PyTorch pickle"),
    "gguf": (b"GGUF" + bytes(60), "a GGUF file"),
    "text": (b"hello, this is no model", "does not start with a safetensors header"),
    "short": (b"\x02\0\0", "does not start with a safetensors header"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_are_not_safetensors(tmp_path: Path, kind: str) -> None:
    content, message = FOREIGN[kind]
    path = make_folder(tmp_path / "m", {})
    (path / SHARD).write_bytes(content)
    with pytest.raises(DataError, match=SHARD) as caught:
        HFCheckpoint.open(path)
    assert message in str(caught.value) and str(path / SHARD) in caught.value.where
    assert f"{len(content):,} bytes" in str(caught.value)


HEADERS = {
    "huge header": (({"a": f32(0, 8)}, bytes(8), 10**15), "claims 1,000,000,000,000,000 bytes"),
    "header longer than file": (({"a": f32(0, 8)}, bytes(8), 5000), "claims 5,000 bytes"),
    "not JSON": ((b'{"a": }', bytes(8)), "not JSON"),
    "not UTF-8": ((b'{"\xff": 1}', bytes(8)), "not JSON"),
    "deep JSON": ((b'{"a":' + b"[" * 100_000, b""), "not JSON"),
    "name twice": ((b'{"a":1,"a":2}', b""), "names 'a' twice"),
    "entry without dtype": (({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "must have dtype"),
    "entry is a list": (({"a": [1]}, bytes(8)), "must have dtype"),
    "unknown dtype": (({"a": f32(0, 8) | {"dtype": "F4"}}, bytes(8)), "dtype 'F4'"),
    "negative shape": (({"a": f32(0, 8, [-2])}, bytes(8)), r"shape \[-2\]"),
    "shape of text": (({"a": f32(0, 8, "2")}, bytes(8)), "shape '2'"),
    "shape of booleans": (({"a": f32(0, 4, [True])}, bytes(4)), "shape"),
    "absurd shape": (({"a": f32(0, 8, [2**40, 2**40])}, bytes(8)), "elements"),
    "shape and size differ": (({"a": f32(0, 8, [3])}, bytes(8)), "needs 12 bytes, its data_offsets span 8"),
    "offsets backwards": (({"a": f32(8, 0, [2])}, bytes(8)), "data_offsets"),
    "three offsets": (({"a": f32(0, 8) | {"data_offsets": [0, 4, 8]}}, bytes(8)), "data_offsets"),
    "overlap": (({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12)), "'b' overlaps with 'a'"),
    "gap": (({"a": f32(0, 8), "b": f32(12, 20)}, bytes(20)), "'b' leaves a gap after 'a'"),
    "gap at start": (({"a": f32(4, 12)}, bytes(12)), "leaves a gap after the header"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_damaged_headers(tmp_path: Path, kind: str) -> None:
    arguments, message = HEADERS[kind]
    path = make_folder(tmp_path / "m", {})
    raw_shard(path / SHARD, *arguments)
    with pytest.raises(DataError, match=message) as caught:
        HFCheckpoint.open(path)
    assert caught.value.where == str(path / SHARD) and caught.value.exit_code == ExitCode.DATA


@pytest.mark.parametrize("header_bytes", [0x0280, 0x0480, 0x8B1F])
def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path, header_bytes: int) -> None:
    text = json.dumps({"a": f32(0, 8)}).encode()
    raw_shard(tmp_path / SHARD, text + b" " * (header_bytes - len(text)), bytes(8))
    assert [entry.name for entry in read_header(tmp_path / SHARD)] == ["a"]


def test_truncated_and_trailing_name_both_sizes(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m")
    whole = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(whole[:-3])
    with pytest.raises(DataError, match=rf"truncated: expected {len(whole):,} bytes, found {len(whole) - 3:,}"):
        HFCheckpoint.open(path)
    (path / SHARD).write_bytes(whole + b"12")
    with pytest.raises(DataError, match=rf"behind its last tensor: expected {len(whole):,} bytes, found {len(whole) + 2:,}"):
        HFCheckpoint.open(path)


def test_missing_shard(tmp_path: Path) -> None:
    path = two_shards(tmp_path / "m")
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DataError, match=r"model-00002-of-00002\.safetensors is missing"):
        HFCheckpoint.open(path)
    assert "model-00002-of-00002.safetensors" in incomplete(path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    path = two_shards(tmp_path / "m")
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    write_index(path, {"a": first, "c": first, "d": second})
    with pytest.raises(DataError) as caught:
        HFCheckpoint.open(path)
    text = str(caught.value)
    assert "1 named by the index but in no file:\n    d (in model-00002" in text
    assert "1 in a file but not in the index:\n    b (in model-00001" in text
    assert f"c (index: {first}, found in {second})" in text


def test_one_name_in_two_shards(tmp_path: Path) -> None:
    path = two_shards(tmp_path / "m")
    save_file({"c": torch.zeros(2, 2), "a": torch.zeros(1)}, path / "model-00002-of-00002.safetensors")
    with pytest.raises(DataError, match="'a' is in two files: model-00001"):
        HFCheckpoint.open(path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a\\x.safetensors",
        "x\0.safetensors",
        "sub/x.safetensors",
        "x.bin",
        "",
        3,
        ".x.safetensors",
        "C:x.safetensors",
    ],
)
def test_index_names_that_leave_the_directory(tmp_path: Path, name: object) -> None:
    path = make_folder(tmp_path / "m")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    write_index(path, {"a": name})
    with pytest.raises(DataError, match="files of this directory") as caught:
        HFCheckpoint.open(path)
    assert caught.value.where.endswith("index.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "<html>", "[" * 100_000])
def test_broken_index(tmp_path: Path, content: str) -> None:
    path = make_folder(tmp_path / "m")
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(DataError, match=r"index\.json"):
        HFCheckpoint.open(path)


def test_links_may_stay_inside_or_lead_into_the_blobs_of_a_hub_cache(tmp_path: Path) -> None:
    cache = tmp_path / "models--o--n"
    snapshot = make_folder(cache / "snapshots" / "abc")
    (cache / "blobs").mkdir()
    for name in (SHARD, "config.json"):
        (snapshot / name).rename(cache / "blobs" / name[::-1])
        (snapshot / name).symlink_to(f"../../blobs/{name[::-1]}")
    assert HFCheckpoint.open(snapshot).tensor("b").sum() == 4
    assert [file.name for file in side_files(snapshot)] == ["config.json"]

    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(make_folder(tmp_path / "other") / SHARD)
    with pytest.raises(DataError, match="link out of the model directory"):
        HFCheckpoint.open(snapshot)


def test_side_file_that_leads_out_is_refused(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m")
    (tmp_path / "secret").write_text("key")
    (path / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"vocab\.json is a link out"):
        side_files(path)


def test_side_files_are_everything_but_weights_code_and_by_products(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m")
    kept = ["LICENSE", "added_tokens.json", "chat_template.jinja", "configuration.json", "generation_config.json", "merges.txt"]
    kept += ["special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"]
    dropped = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "modeling_x.py",
        "training_args.bin",
        "README.md",
        ".gitattributes",
    ]
    dropped += ["consolidated.00.pth", "sft_args.json", "manifest.json", "model.gguf", "model.safetensors.index.json.tmp"]
    for name in kept + dropped:
        (path / name).write_text("x")
    (path / "original").mkdir()
    assert [file.name for file in side_files(path)] == sorted([*kept, "config.json"])


@pytest.mark.parametrize("content", ["", "[1]", "null", "{", "<html>", '"x"'])
def test_config_that_is_no_object(tmp_path: Path, content: str) -> None:
    path = make_folder(tmp_path / "m")
    (path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        HFCheckpoint.open(path)


@pytest.mark.parametrize(
    "field",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 0},
        {"vocab_size": -1},
        {"hidden_size": "8"},
        {"num_attention_heads": True},
        {"vocab_size": 1e9},
    ],
)
def test_config_with_absurd_sizes(tmp_path: Path, field: dict) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        HFCheckpoint.open(make_folder(tmp_path / "m", config=CONFIG | field))


def test_config_missing(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m")
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing") as caught:
        HFCheckpoint.open(path)
    assert caught.value.exit_code == ExitCode.USER


def test_auto_map_runs_no_code(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m", config=CONFIG | {"auto_map": {"AutoConfig": "evil.Config"}})
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    HFCheckpoint.open(path)
    assert not (tmp_path / "ran").exists()


def test_pickles_are_not_read(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "m", {})

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DataError, match="pickles"):
        HFCheckpoint.open(path)
    assert not (tmp_path / "ran").exists()


def test_which_files_are_the_model(tmp_path: Path) -> None:
    path = two_shards(tmp_path / "m")
    save_file({"z": torch.zeros(1)}, path / "consolidated.safetensors")  # what mistral repositories carry beside the model
    assert "z" not in HFCheckpoint.open(path).names
    save_file({"z": torch.zeros(1)}, path / "model.safetensors")
    with pytest.raises(DataError, match=r"1 weight files are not in .*model\.safetensors"):
        HFCheckpoint.open(path)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(DataError, match=r"index\.json is missing: 2 weight files"):
        HFCheckpoint.open(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DataError, match=r"index\.json is missing: 1 weight files"):
        HFCheckpoint.open(path)


def test_check_names_lists_every_difference(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(4),
        "q": torch.zeros(2, dtype=torch.int8),
        "layers.0.rotary_emb.inv_freq": torch.zeros(2),
    }
    checkpoint = HFCheckpoint.open(make_folder(tmp_path / "m", {SHARD: tensors}))
    checkpoint.check_names({"a": (2, 3), "b": (4,)}, ignorable=["q", "layers.*.inv_freq"])
    with pytest.raises(DataError) as caught:
        checkpoint.check_names(
            {"a": (3, 2), "q": (2,)} | {f"m{number}": (1,) for number in range(12)}, ignorable=["*.inv_freq"]
        )
    text = str(caught.value)
    assert "12 missing:\n    m0 [1]" in text and "... and 2 more" in text and "m11" not in text
    assert "1 that this model does not have:\n    b" in text
    assert "a: expected [3, 2], found [2, 3]" in text
    assert "q: I8" in text and "inv_freq" not in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nonfinite_is_found_anywhere(dtype: torch.dtype, value: str) -> None:
    tensor = torch.randn(67, 33).to(dtype)
    assert not nonfinite(tensor)
    for place in (0, 1000, tensor.numel() - 1):
        bad = tensor.clone()
        bad.view(-1)[place] = float(value)
        assert nonfinite(bad) and nonfinite(bad.t()[:, :])


def test_nonfinite_of_a_checkpoint(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor([1.0, float("nan")]),
        "b": torch.ones(3),
        "c": torch.zeros(0),
        "d": torch.ones(2, dtype=torch.int8),
    }
    checkpoint = HFCheckpoint.open(make_folder(tmp_path / "m", {SHARD: tensors}))
    assert checkpoint.nonfinite() == ["a"] and checkpoint.nonfinite(["b", "c"]) == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, 400),
    value=st.integers(0, 255),
    cut=st.integers(0, 60),
    where=st.sampled_from(["shard", "index", "config"]),
)
def test_any_damage_gives_our_error_or_a_whole_model(tmp_path: Path, position: int, value: int, cut: int, where: str) -> None:
    path = tmp_path / "fuzz"
    if not path.exists():
        two_shards(path)
    name = {"shard": "model-00001-of-00002.safetensors", "index": "model.safetensors.index.json", "config": "config.json"}[
        where
    ]
    whole = (path / name).read_bytes()
    damaged = bytearray(whole)
    damaged[position % len(damaged)] = value
    (path / name).write_bytes(damaged[: len(damaged) - cut])
    try:
        checkpoint = HFCheckpoint.open(path)
        assert all(checkpoint.tensor(tensor).shape == checkpoint.shape(tensor) for tensor in checkpoint)
    except MegaswiftError:
        pass
    finally:
        (path / name).write_bytes(whole)
