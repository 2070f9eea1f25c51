"""Bytes that nobody would write: manifests, indexes, logs, rows and option files end in success or in one of our errors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaswift.errors import MegaswiftError
from megaswift.run.resume import newest_whole
from megaswift.store.manifest import MANIFEST, check_hashes, quick_check
from megaswift.store.paths import find_checkpoint
from megaswift.store.retention import clean, delete_beyond
from megaswift.train.log import forget_after
from megaswift.weights.torch_dist.guard import load_index, load_object
from megaswift.weights.torch_dist.reader import Reader
from megaswift.weights.torch_dist.writer import INDEX_FILE
from tests.checkpoint.test_choice import checkpoint
from tests.faults.conftest import ALL

MANY = settings(
    max_examples=400 if ALL else 40, deadline=2000, derandomize=not ALL, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["files", "size", "sha256", "optimizer", "eval_loss", "resume", "../x", "a"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


def changed(data: bytes) -> Any:
    """The bytes with some of them replaced, cut, or put in."""
    places = st.integers(0, max(len(data) - 1, 0))
    flips = st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)

    def apply(edits: tuple[list[tuple[int, int]], int, bytes, int]) -> bytes:
        result = bytearray(data)
        for place, value in edits[0]:
            result[place] = value
        result[edits[3] : edits[3]] = edits[2]
        return bytes(result[: edits[1]])

    return st.tuples(flips, st.integers(0, len(data) + 8), st.binary(max_size=8), places).map(apply)


def survives(function: Any, *arguments: Any) -> None:
    """It returns, or raises one of our errors."""
    try:
        function(*arguments)
    except MegaswiftError as error:
        assert error.what


@MANY
@given(content=json_values)
def test_manifests(content: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    path = checkpoint(tmp_path / "run", 1)
    checkpoint(tmp_path / "run", 2)
    before = set(tmp_path.rglob("*"))
    (path / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    for function in (quick_check, check_hashes):
        survives(function, path)
    survives(newest_whole, tmp_path / "run", True)
    survives(find_checkpoint, tmp_path / "run", 1)
    survives(delete_beyond, tmp_path / "run", 9, 2)
    assert set(tmp_path.rglob("*")) == before


@MANY
@given(data=st.data())
def test_manifest_bytes(data: st.DataObject, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    path = checkpoint(tmp_path / "run", 1) / MANIFEST
    path.write_bytes(data.draw(changed(path.read_bytes())))
    survives(newest_whole, tmp_path / "run", True)
    survives(find_checkpoint, tmp_path / "run")


@pytest.fixture(scope="module")
def torch_dist(tiny_folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_folders("llama")[1], tmp_path_factory.mktemp("fuzz") / "megatron"))


@MANY
@given(data=st.data())
def test_checkpoint_indexes(data: st.DataObject, torch_dist: Path) -> None:
    """Changed bytes of the pickle: none is taken for something that it may not name."""
    path = torch_dist / INDEX_FILE
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(changed(whole)))
        survives(load_index, path)
        survives(_read_all, torch_dist)
    finally:
        path.write_bytes(whole)


def _read_all(directory: Path) -> None:
    reader = Reader(directory)
    for key in reader.keys[:4]:
        reader.read(key)


@MANY
@given(content=st.binary(max_size=200) | json_values.map(pickle.dumps))
def test_objects_in_data_files(content: bytes) -> None:
    survives(load_object, content, "here")


@MANY
@given(content=st.text(max_size=200) | st.lists(json_values.map(json.dumps), max_size=5).map("\n".join), step=st.integers(0, 9))
def test_logs_that_a_crash_cut(content: str, step: int, tmp_path: Path) -> None:
    path = tmp_path / "logging.jsonl"
    path.write_text(content, encoding="utf-8", errors="replace")
    forget_after(path, step)
    for line in path.read_text(encoding="utf-8").splitlines():
        assert json.loads(line)


@MANY
@given(name=st.text(alphabet="iter_0123456789.tmp-abcdef trash/\\", min_size=1, max_size=24))
def test_cleaning_never_leaves_the_run(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    outside = tmp_path / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "kept").touch()
    if "/" not in name and name.strip(". "):
        link = run / f"trash-{name}"
        if not link.is_symlink() and not link.exists():
            os.symlink(outside, link)
    clean(run)
    assert (outside / "kept").exists()
