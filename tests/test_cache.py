"""Directories of the cache appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaswift.errors import UserError
from megaswift.store.cache import alone, cache_root, published


def test_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x" and not cache_root().exists()
    monkeypatch.delenv("MEGASWIFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "megaswift"


def test_published(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with published(target) as directory:
        (directory / "file").write_text("1")
        assert not target.exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"] and (target / "file").read_text() == "1"
    with published(target) as directory:  # somebody else was first: theirs stays
        (directory / "file").write_text("2")
    assert (target / "file").read_text() == "1"
    with pytest.raises(ZeroDivisionError), published(tmp_path / "a" / "c"):
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_debris_of_killed_processes_goes(tmp_path: Path) -> None:
    for name in ("x.tmp-1", "y.tmp-2"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "x.tmp-1", (0, 0))
    with published(tmp_path / "z"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["y.tmp-2", "z"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="MEGASWIFT_CACHE"), published(tmp_path / "file" / "data" / "x"):
        pass


def test_one_process_at_a_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second waits, and says so only where it was told to."""
    code = (
        "import sys; from pathlib import Path; from megaswift.store.cache import alone\n"
        "with alone(Path(sys.argv[1]), 'waiting'): print('in', flush=True)"
    )
    target = tmp_path / "a" / "b"
    with alone(target):
        with alone(target.with_name("c")):
            pass
        process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stderr is not None and process.stderr.readline() == b"waiting\n"
        assert process.poll() is None
    assert process.communicate(timeout=60)[0] == b"in\n"
    with alone(target, "waiting"):
        pass
    assert capfd.readouterr() == ("", "") and not target.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="MEGASWIFT_CACHE"), alone(tmp_path / "file" / "x"):
        pass
