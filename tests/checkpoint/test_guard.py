"""A checkpoint from a stranger runs no code, reads no file outside of itself, and stops with exit 3."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.errors import DataError
from megaswift.run.spec import Parallel, Precision
from megaswift.weights.torch_dist import writer as torch_dist
from megaswift.weights.torch_dist.guard import load_index, load_object
from megaswift.weights.torch_dist.reader import Reader
from megaswift.weights.torch_dist.writer import INDEX_FILE
from megaswift.weights.torch_dist.zipped import Placeholder
from tests.ranks import RankPool


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class Dotted:
    """Reaches for a function through an allowed class: its name has dots."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


@pytest.fixture
def harmed(tiny_folders: Any, tmp_path: Path) -> Path:
    """A copy of a whole torch_dist directory."""
    import shutil

    return shutil.copytree(tiny_folders("llama")[1], tmp_path / "megatron")


@pytest.mark.parametrize("kind", [Payload, Dotted])
def test_the_index_runs_nothing(kind: type, harmed: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for data in (
        pickle.dumps(kind(marker)),
        pickle.dumps([kind(marker)], protocol=0),
        pickle.dumps({"state_dict_metadata": kind(marker)}),
    ):
        (harmed / INDEX_FILE).write_bytes(data)
        with pytest.raises(DataError, match="not safe to read"):
            Reader(harmed)
    assert not marker.exists()


def test_the_plan_that_megatron_core_leaves_in_an_index_stays_inert(harmed: Path) -> None:
    """Its own saves keep their plan beside the table: nothing of it is built, nor anything else that such a module holds."""
    from torch.distributed.checkpoint.planner import SavePlan

    index = pickle.loads((harmed / INDEX_FILE).read_bytes())
    index.all_local_plans = [SavePlan([])]
    (harmed / INDEX_FILE).write_bytes(pickle.dumps(index))
    assert type(load_index(harmed / INDEX_FILE).all_local_plans[0]) is Placeholder
    assert Reader(harmed).keys
    called = b"\x80\x04\x8c\x24torch.distributed.checkpoint.planner\x8c\x0fio.FileIO.write\x93\x8c\x01x\x85R."
    (harmed / INDEX_FILE).write_bytes(called)
    with pytest.raises(DataError, match="no table of tensors|not safe to read"):
        load_index(harmed / INDEX_FILE)


def test_a_dotted_name_of_an_allowed_module_is_refused(harmed: Path) -> None:
    name = "Metadata.__init__.__globals__"
    data = (
        b"\x80\x04\x8c"
        + bytes([len("torch.distributed.checkpoint.metadata")])
        + b"torch.distributed.checkpoint.metadata\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93."
    )
    (harmed / INDEX_FILE).write_bytes(data)
    with pytest.raises(DataError, match="not safe to read"):
        load_index(harmed / INDEX_FILE)


def test_an_object_in_a_data_file_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    stream = io.BytesIO()
    torch.save([Payload(marker)], stream)
    with pytest.raises(DataError, match="not safe to read"):
        load_object(stream.getvalue(), "here")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "a\\b", "..", "", "a\0b"])
def test_the_index_names_files_of_its_own_directory_only(name: str, harmed: Path) -> None:
    from dataclasses import replace

    index = load_index(harmed / INDEX_FILE)
    key = next(iter(index.storage_data))
    index.storage_data[key] = replace(index.storage_data[key], relative_path=name)
    (harmed / INDEX_FILE).write_bytes(pickle.dumps(index))
    with pytest.raises(DataError, match="not inside the checkpoint"):
        Reader(harmed)


def test_chunks_must_cover_a_tensor(harmed: Path) -> None:
    """A chunk that an index leaves out is no error of any file; memory as it was would stand in its place."""
    index = load_index(harmed / INDEX_FILE)
    key = "decoder.layers.mlp.linear_fc1.weight"  # gate and up of each layer, a chunk each
    chunks = index.state_dict_metadata[key].chunks
    left_out = chunks.pop()
    (harmed / INDEX_FILE).write_bytes(pickle.dumps(index))
    layer, other = left_out.offsets[0], chunks[0].offsets[0]
    assert layer != other and any(chunk.offsets[0] == layer for chunk in chunks)
    reader = Reader(harmed)
    reader.read(key, (other,))
    with pytest.raises(DataError, match="chunks do not cover the tensor"):
        reader.read(key, (layer,))


@pytest.mark.parametrize("count", [1, 3])
def test_an_index_of_half_a_tensor_is_not_written(count: int, tmp_path: Path) -> None:
    """As when the parts of a rank did not arrive, or came twice."""
    half = torch_dist.Chunk("a", (4, 2), (0, 0), (2, 2), torch.float32, lambda: torch.zeros(2, 2))
    with pytest.raises(DataError, match="do not cover it exactly once") as caught:
        torch_dist.write_index(tmp_path, [torch_dist.tensor_table([half]) for _ in range(count)], [{}], {})
    assert caught.value.where == "a" and not list(tmp_path.iterdir())


def _load(directory: str) -> str:
    """What the engine's own load says, in a rank."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.megatron.model import build
    from megaswift.train.checkpoint.load import load_weights
    from megaswift.weights.hf.config import load_config

    with ranks.joined(Parallel(), 42):
        config = load_config(Path(directory).parent / "hf")
        model = build(config, Parallel(), Precision())
        try:
            load_weights(model, Path(directory))
        except DataError as error:
            return error.what
    return "loaded"


@pytest.mark.parametrize("place", [INDEX_FILE, "common.pt", "byte item", "nothing"])
def test_megatrons_own_load_is_guarded(place: str, harmed: Path, tiny_folders: Any, pool: RankPool, tmp_path: Path) -> None:
    """The same payloads through Megatron-Core's load, as training does it."""
    import shutil

    marker = tmp_path / "marker"
    shutil.copytree(tiny_folders("llama")[0], tmp_path / "hf")
    if place == INDEX_FILE:
        (harmed / INDEX_FILE).write_bytes(pickle.dumps(Payload(marker)))
    elif place == "common.pt":
        torch.save({"payload": Payload(marker)}, harmed / "common.pt")
    elif place == "byte item":
        _replace_byte_items(harmed, marker)
    found = pool.run(1, _load, str(harmed))[0]
    assert not marker.exists()
    if place == "nothing":
        assert found == "loaded"
    else:
        assert "not safe to read" in found or "cannot be loaded" in found


def _replace_byte_items(directory: Path, marker: Path) -> None:
    """Point every byte item of the index at a payload."""
    index = load_index(directory / INDEX_FILE)
    stream = io.BytesIO()
    torch.save([Payload(marker)], stream)
    (directory / "payload.distcp").write_bytes(stream.getvalue())
    assert zipfile.is_zipfile(directory / "payload.distcp")
    storage = type(next(iter(index.storage_data.values())))
    for key in list(index.storage_data):
        if not hasattr(index.state_dict_metadata[key.fqn], "chunks"):
            index.storage_data[key] = storage("payload.distcp", 0, len(stream.getvalue()))
    (directory / INDEX_FILE).write_bytes(pickle.dumps(index))
