"""The name under which vLLM finds a model: the same for all, in a directory that is each model's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megaswift.inference.vllm_place import NAME, place_of, under_one_name


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def folder(name: str) -> Path:
    path = Path(name)
    path.mkdir()
    (path / "config.json").write_text(name)
    return path


def test_a_process_that_begins_there_keeps_the_folder_and_this_one_goes_back() -> None:
    here = Path.cwd()
    waits = "import sys, pathlib; sys.stdin.readline(); print(pathlib.Path('model/config.json').read_text())"
    processes = []
    for name in ("one", "two"):
        with under_one_name(folder(name)) as found:
            assert (found, Path(found, "config.json").read_text()) == (NAME, name)
            processes.append(
                subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        assert Path.cwd() == here
    assert [process.communicate("\n")[0].strip() for process in processes] == ["one", "two"]


def test_the_way_back_is_found_after_an_error() -> None:
    here = Path.cwd()
    with pytest.raises(ZeroDivisionError), under_one_name(folder("one")):
        raise ZeroDivisionError
    assert Path.cwd() == here


def test_deleted_folders_are_forgotten(cache: Path) -> None:
    one, two = folder("one"), folder("two")
    first = place_of(one)
    assert first is not None and first == place_of(Path.cwd() / "one")
    (one / "config.json").unlink()
    one.rmdir()
    second = place_of(two)
    assert list((cache / "vllm").iterdir()) == [second]


def test_without_a_cache_the_folder_has_its_own_name(cache: Path) -> None:
    cache.write_text("a file where the cache should be")
    with under_one_name(folder("one")) as found:
        assert found == "one"
