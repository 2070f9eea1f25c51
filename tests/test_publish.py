"""The one way in which files and directories appear whole, and the one lock under it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megaswift.errors import UserError
from megaswift.store import lock
from megaswift.store.publish import appearing, publish, put, remove_abandoned, temporary_beside, workspace


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def filled(target: Path, text: str, hidden: bool = True) -> Path:
    temporary = temporary_beside(target, hidden=hidden)
    temporary.mkdir()
    (temporary / "file").write_text(text)
    return temporary


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_appears_whole_in_place_of_another(durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, order = tmp_path / "file", []
    real_sync, real_replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        order.append("directory" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        real_sync(handle)

    def replaced(source: Any, target: Any) -> None:
        order.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    put(file, "äö")
    with appearing(file, durable=durable) as temporary:
        temporary.write_text("whole")
        assert file.read_text(encoding="utf-8") == "äö" and temporary.parent == tmp_path
    assert file.read_text() == "whole" and names(tmp_path) == ["file"]
    assert order == ["file", "replace", "directory"] + (["file", "replace", "directory"] if durable else ["replace"])
    with pytest.raises(ZeroDivisionError), appearing(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "whole" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("hidden", [True, False])
def test_what_becomes_of_a_taken_name(hidden: bool, tmp_path: Path) -> None:
    target = tmp_path / "name"
    publish(filled(target, "1", hidden), target)
    temporary = filled(target, "2", hidden)
    with pytest.raises(UserError, match="exists already"):
        publish(temporary, target)
    publish(temporary, target, taken="keep")
    assert (target / "file").read_text() == "1" and names(tmp_path) == sorted([temporary.name, "name"])
    publish(temporary, target, taken="replace")
    assert (target / "file").read_text() == "2" and names(tmp_path) == ["name"]


def test_what_could_not_be_replaced_is_there_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "name"
    publish(filled(target, "1"), target)
    real = os.rename

    def renamed(source: Any, place: Any) -> None:
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "input/output error")
        real(source, place)

    monkeypatch.setattr(os, "rename", renamed)
    with pytest.raises(OSError, match="input/output"):
        publish(filled(target, "2"), target, taken="replace")
    assert (target / "file").read_text() == "1" and not list(tmp_path.glob("*.old-*"))


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, order = tmp_path / "name", []
    real_sync, real_rename = os.fsync, os.rename

    def synced(handle: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda *places: (order.append("rename"), real_rename(*places)))
    temporary = filled(target, "1")
    publish(temporary, target)
    assert order == ["file", temporary.name, "rename", tmp_path.name]
    order.clear()
    temporary = filled(tmp_path / "other", "1")
    publish(temporary, tmp_path / "other", synced=True)
    assert order == [temporary.name, "rename", tmp_path.name]


def test_what_earlier_versions_left_goes_or_is_taken_over(tmp_path: Path) -> None:
    target = tmp_path / "name"
    for left in ("..name.new.tmp-0a1b2c3d", ".name.tmp-0a1b2c3d", ".name.new", ".other.tmp-0a1b2c3d"):
        (tmp_path / left / ".done").mkdir(parents=True)
        (tmp_path / left / ".done" / "plan").write_text("one" if left.startswith("..") else "two")
        os.utime(tmp_path / left, (0, 0))
    with workspace(target, 10, plan="one", resume=True) as work:
        assert work.path.name == "..name.new.tmp-0a1b2c3d"
        assert names(tmp_path) == sorted([work.path.name, ".name.new", ".other.tmp-0a1b2c3d"])
        publish(work.path, target)
    with workspace(target, 10) as work:  # what was to take a name's place goes while the name is there
        assert names(tmp_path) == sorted([work.path.name, ".other.tmp-0a1b2c3d", "name"])
        publish(work.path, target, taken="replace")


def test_a_living_process_keeps_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no locks, only what may go by its age goes."""
    place = tmp_path / "x.tmp-1"
    place.mkdir()
    os.utime(place, (0, 0))
    handle = os.open(place, os.O_RDONLY)
    assert lock.hold(handle) is True
    assert remove_abandoned([place], 10, by_age=True) == [] and place.exists()
    os.close(handle)

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", no_locks)
        assert remove_abandoned([place], 10) == [] and place.exists()
        assert remove_abandoned([place], 10, by_age=True) == [place] and not place.exists()


def test_a_lock_is_held_once_or_shared(tmp_path: Path) -> None:
    def opened() -> int:
        return os.open(tmp_path, os.O_RDONLY)

    first, second, third = opened(), opened(), opened()
    assert lock.hold(first, shared=True) and lock.hold(second, shared=True)
    assert lock.hold(third) is False
    os.close(first)
    os.close(second)
    assert lock.hold(third) is True
    fourth = opened()
    assert lock.hold(fourth, shared=True) is False
    for handle in (third, fourth):
        os.close(handle)
