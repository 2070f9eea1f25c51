"""Pickles from strangers: what a file may name is a list, whatever protocol spells it; nothing else is called, imported or changed."""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.errors import DataError
from megaswift.weights.hf import pickled
from megaswift.weights.hf.pickled import read_pickle
from megaswift.weights.torch_dist import zipped
from megaswift.weights.torch_dist.guard import load_index


def text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()


def named(module: str, name: str, protocol: int) -> bytes:
    """The opcodes by which a protocol names something."""
    if protocol >= 4:
        return text(module) + text(name) + pickle.STACK_GLOBAL
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def call(module: str, name: str, arguments: tuple[Any, ...], protocol: int) -> bytes:
    """A pickle that calls something by name."""
    spell = {
        str: text,
        dict: lambda value: pickle.EMPTY_DICT,
        bool: lambda value: pickle.NEWTRUE,
        int: lambda value: pickle.BININT + struct.pack("<i", value),
    }
    words = b"".join(spell[type(value)](value) for value in arguments)
    start = pickle.PROTO + bytes([protocol]) if protocol >= 2 else b""
    return start + named(module, name, protocol) + pickle.MARK + words + pickle.TUPLE + pickle.REDUCE + pickle.STOP


def instance(module: str, name: str, argument: str) -> bytes:
    """The same by the oldest opcode, which names and calls at once."""
    return pickle.MARK + text(argument) + pickle.INST + f"{module}\n{name}\n".encode() + pickle.STOP


def archive(data: bytes, **records: bytes) -> bytes:
    """What torch.save would have made around it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in {"data.pkl": data, **records}.items():
            file.writestr(f"archive/{name}", content)
    return stream.getvalue()


def read_zipped(path: Path) -> Any:
    return zipped.load(zipped.Mapped(path), 0, path.stat().st_size, "here")


TORCH = [
    ("torch", "os.system", "touch {}"),
    ("torch.serialization", "os.system", "touch {}"),
    ("torch.hub", "os.system", "touch {}"),
    ("torch", "from_file", "{}"),
    ("torch._C", "PyTorchFileWriter", "{}"),
    ("torch._utils", "sys.modules.__class__", "{}"),
    ("torch", "FloatTensor", "{}"),
    ("torch", "nn.Linear", "{}"),
    ("torch", "load", "{}"),
]


@pytest.mark.parametrize("protocol", range(6))
def test_torch_means_storages_and_two_functions_only(protocol: int, tmp_path: Path) -> None:
    """Through both readers of torch.save's archives; what stands in plain pickles really runs, or it would prove nothing."""
    marker, file = tmp_path / "marker", tmp_path / "pytorch_model.bin"
    ran = []
    for module, name, argument in TORCH:
        arguments = (argument.format(marker), *((True, 8) if name == "from_file" else ()))
        data = call(module, name, arguments, protocol)
        for content in (data, *([instance(module, name, arguments[0])] if protocol == 0 else [])):
            file.write_bytes(archive(content, version=b"3"))
            for read in (read_pickle, read_zipped):
                with pytest.raises(DataError, match=rf"it names {module}\.{name}"):
                    read(file)
                assert not marker.exists(), (module, name)
        if name in ("from_file", "PyTorchFileWriter") or (name == "os.system" and protocol >= 4):
            pickle.loads(data)
            ran.append(marker.exists())
            marker.unlink(missing_ok=True)
    assert len(ran) == (5 if protocol >= 4 else 2) and all(ran)


def test_extension_codes_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code stands for what other code of the process has registered, and skips the question for its name once looked up."""
    import copyreg

    monkeypatch.setitem(copyreg._inverted_registry, 200, ("os", "system"))
    monkeypatch.setitem(copyreg._extension_cache, 200, os.system)
    marker, file = tmp_path / "marker", tmp_path / "pytorch_model.bin"
    data = b"\x80\x02\x82\xc8" + text(f"touch {marker}") + b"\x85R."
    file.write_bytes(archive(data))
    (tmp_path / ".metadata").write_bytes(data)
    for read, place in ((read_pickle, file), (read_zipped, file), (load_index, tmp_path / ".metadata")):
        with pytest.raises(DataError, match="extension"):
            read(place)
    assert not marker.exists()


INERT = [
    ("numpy.testing", "runstring", ("open('{}', 'w')", {})),
    ("numpy.testing._private.utils", "os.system", ("touch {}",)),
    ("megatron.core.config_logger", "os.system", ("touch {}",)),
    ("torch.distributed.run", "os.system", ("touch {}",)),
    ("_io", "FileIO", ("{}", "w")),
    ("_io", "open", ("{}", "w")),
    ("_codecs", "encode", ("{}", "utf-8")),
    ("swift.evil", "run", ("{}",)),
    ("transformer_engine.evil", "run", ("{}",)),
]


def test_every_prefix_has_its_payload() -> None:
    assert all(any(f"{module}.".startswith(prefix) for module, _, _ in INERT) for prefix in zipped._INERT)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(("module", "name", "arguments"), INERT, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_let_through_as_inert_is_neither_called_nor_imported(
    module: str, name: str, arguments: tuple[Any, ...], protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, file = tmp_path / "marker", tmp_path / "model_optim_rng.pt"
    for package in ("swift", "transformer_engine"):  # a name alone would import it
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
        (tmp_path / package / "evil.py").write_text("def run(path):\n    open(path, 'w')\n")
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = tuple(value.format(str(marker)) if isinstance(value, str) else value for value in arguments)
    data = call(module, name, words, protocol)
    file.write_bytes(archive(data))
    assert type(read_zipped(file)) is zipped.Placeholder
    built = data[:-1] + pickle.EMPTY_DICT + text("__class__") + text("x") + pickle.SETITEM + pickle.BUILD + pickle.STOP
    file.write_bytes(archive(built))
    assert type(read_zipped(file)) is zipped.Placeholder
    assert not marker.exists() and not (tmp_path / "imported").exists()
    if module.startswith("_io") or name == "runstring" or (protocol == 4 and module == "torch.distributed.run"):
        pickle.loads(data)
        assert marker.exists(), "the payload is none"


def state_of(name: bytes) -> bytes:
    """A pickle that sets an attribute of what it names."""
    return b"\x80\x02" + name + b"N}" + text("planted") + b"K\x01s\x86b."


def test_no_class_or_function_of_the_process_is_changed(tmp_path: Path) -> None:
    """A pickle may set attributes of whatever stands on its stack, and that may be a class by its name."""
    from torch.distributed.checkpoint.metadata import Metadata

    index, file = tmp_path / ".metadata", tmp_path / "x.bin"
    cases = [
        (load_index, index, "pathlib", "PosixPath", pathlib.PosixPath),
        (load_index, index, "torch.distributed.checkpoint.metadata", "Metadata", Metadata),
        (load_index, index, "torch.serialization", "_get_layout", torch.serialization._get_layout),
        (read_zipped, file, "argparse", "Namespace", argparse.Namespace),
        (read_zipped, file, "torch._utils", "_rebuild_tensor_v2", zipped._rebuild),
        (read_pickle, file, "torch._utils", "_rebuild_tensor_v2", pickled._tensor),
    ]
    for read, place, module, name, target in cases:
        data = state_of(named(module, name, 2))
        place.write_bytes(data if place is index else archive(data))
        with pytest.raises(DataError, match="which is not its own"):
            read(place)
        assert not hasattr(target, "planted")
    data = state_of(named("argparse", "Namespace", 2) + b")R").replace(
        b"N}" + text("planted") + b"K\x01s\x86b", b"}" + text("tp") + b"K\x02sb"
    )
    file.write_bytes(archive(data))
    assert read_zipped(file).tp == 2, "an instance has its state"


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def entry_of(data: bytes, name: str) -> int:
    """Where the directory of an archive has its entry of a record."""
    place = data.find(b"PK\x01\x02")
    while not data[place + 46 :].startswith(name.encode()):
        place = data.find(b"PK\x01\x02", place + 1)
        assert place > 0
    return place


def patched(data: bytes, place: int, *numbers: int) -> bytes:
    return data[:place] + struct.pack(f"<{len(numbers)}I", *numbers) + data[place + 4 * len(numbers) :]


def test_a_record_stays_in_its_archive(tmp_path: Path) -> None:
    """Two archives in one file, as data files of a checkpoint have them: neither reads what the other holds."""
    secret = torch.full((2048,), 7.0)
    pickled_many = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(1024)))).read("archive/data.pkl")
    plain = archive(pickled_many, **{"data/0": bytes(256)})
    second = saved(secret)

    longer = patched(plain, entry_of(plain, "archive/data/0") + 20, 4096, 4096)
    (tmp_path / "a.distcp").write_bytes(longer + second)
    with pytest.raises(DataError, match="reaches beyond the archive"):
        zipped.load(zipped.Mapped(tmp_path / "a.distcp"), 0, len(longer), "here")

    first = archive(b"N.", **{"data/0": b"\x07" * 4096})
    before = archive(pickled_many, **{"data/0": bytes(4096)})
    end = before.rfind(b"PK\x05\x06")
    (offset,) = struct.unpack_from("<I", before, end + 16)
    moved = patched(before, end + 16, offset + len(first))  # the archive says that it begins where the first one does
    place = entry_of(moved, "archive/data.pkl")
    moved = patched(moved, place + 42, len(first))
    theirs = entry_of(first, "archive/data/0")
    moved = patched(moved, entry_of(moved, "archive/data/0") + 42, *struct.unpack_from("<I", first, theirs + 42))
    (tmp_path / "b.distcp").write_bytes(first + moved)
    with pytest.raises(DataError, match="outside of the archive|damaged or not safe"):
        zipped.load(zipped.Mapped(tmp_path / "b.distcp"), len(first), len(moved), "here")


def test_no_tensor_is_larger_than_what_is_stored(tmp_path: Path) -> None:
    """A stride of 0 makes any size out of one value: what reads it would fill the memory."""
    (tmp_path / "x.bin").write_bytes(saved({"a": torch.ones(1).expand(10**12)}))
    for read in (read_zipped, read_pickle):
        with pytest.raises(DataError, match="larger than its storage|beyond its storage"):
            read(tmp_path / "x.bin")
