"""A full disk: refused before a byte is written, or what was written is taken away; earlier checkpoints stay as they were."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments
from megaswift.errors import DataError, UserError
from megaswift.run.spec import Run
from megaswift.train.checkpoint import save
from tests.faults.harness import FaultRun
from tests.runs import changed
from tests.tiny import save_tiny


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 6 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def trust_the_disk() -> None:
    """As if the space had been there when it was measured, and somebody else took it."""
    save.require_space = lambda directory, needed, what: None


def full_after(rank: int, count: int) -> None:
    """Every file of a rank takes `count` bytes."""
    from megaswift.store.files import HashedFile

    trust_the_disk()
    plain = HashedFile.write

    def write(self: Any, data: Any) -> int:
        if int(os.environ["RANK"]) == rank and self.position + len(memoryview(data).cast("B")) > count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, data)

    HashedFile.write = write  # type: ignore[method-assign]


def test_too_little_space_is_refused_before_a_byte_is_written(base: Run, small_disk: Path) -> None:
    case = FaultRun(base, small_disk)
    ended = case.run()
    assert ended.codes == [3, 3], ended.output
    assert "one checkpoint needs 0.00 GB, 0.00 GB are free." in ended.reports[0]["what"]
    assert sorted(path.name for path in case.run_dir.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    assert case.newest() == 2


def test_a_disk_that_fills_up_while_saving(base: Run, small_disk: Path, tmp_path: Path, straight: FaultRun) -> None:
    case = FaultRun(changed(base, save_steps=1), small_disk)
    used = shutil.disk_usage(small_disk)
    (small_disk / "ballast").write_bytes(os.urandom(max(used.free - 900_000, 0)))
    ended = case.run(prepare=trust_the_disk)
    assert ended.codes == [3, 3], ended.output
    assert ended.reports[0]["what"] == ended.reports[1]["what"]
    assert "the disk is full" in ended.reports[0]["what"]
    assert case.newest() == 2
    assert not list(case.run_dir.glob("*tmp*")), "what was written partly is taken away"
    (small_disk / "ballast").unlink()
    shutil.rmtree(case.run_dir / "iter_0000001")
    again = case.resume()
    if again.codes != [3, 3]:  # 6 MB hold what is needed, or the space is measured too small: both are an answer
        assert case.losses() == straight.losses()


@pytest.mark.parametrize(("rank", "count"), [(0, 0), (1, 1000), (1, 300_000), (0, 700_000)])
def test_an_error_after_some_bytes(rank: int, count: int, base: Run, straight: FaultRun, tmp_path: Path) -> None:
    case = FaultRun(base, tmp_path)
    ended = case.run(prepare=partial(full_after, rank, count))
    assert ended.codes == [3, 3], ended.output
    assert ended.reports[0]["what"] == ended.reports[1]["what"]
    assert f"rank {rank}: the disk is full" in ended.reports[0]["what"]
    assert f"__{rank}_0.distcp" in ended.reports[0]["what"]
    assert not list(case.run_dir.glob("*tmp*"))
    assert case.newest() == 2
    assert case.resume().codes == [0, 0]
    assert case.losses() == straight.losses()


def test_needed_and_free_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one checkpoint needs \d+\.\d\d GB, \d+\.\d\d GB are free\."):
        save.require_space(tmp_path, 10**18, "one checkpoint")


def test_a_directory_that_cannot_be_written(
    start: tuple[Path, Path], small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real read-only file system, and a file in the place of a directory: exit 2 before any rank starts."""
    from megaswift.cli import main

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = ["sft", "--resume_from_checkpoint", str(start[0]), "--dataset", str(start[1]), "--output_dir"]
    assert main([*words, str(small_disk / "output")]) == 2
    assert "error: the run's directory cannot be written: Read-only file system." in capsys.readouterr().err
    assert main([*words, str(start[1])]) == 2
    assert "error: the run's directory cannot be written: Not a directory." in capsys.readouterr().err
    for more in ([], ["--resume", "true"], ["--add_output_dir_suffix", "false"]):
        assert main([*words, f"{small_disk}/{'x' * 300}", *more]) == 2
        assert "error: the run's directory cannot be written: File name too long." in capsys.readouterr().err


def test_a_full_disk_under_the_cache_of_rows(
    small_disk: Path,
    start: tuple[Path, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real full disk: one error, nothing left, and no words of Python's own from files that it closes late."""
    from megaswift.cli import main

    monkeypatch.setenv("MEGASWIFT_CACHE", str(small_disk / "cache"))
    (small_disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 20_000))
    rows = "".join(f'{{"query": "q {number}", "response": "a {number}"}}\n' for number in range(400))
    (tmp_path / "rows.jsonl").write_text(rows)
    assert main(["data", "--resume_from_checkpoint", str(start[0]), "--dataset", str(tmp_path / "rows.jsonl")]) == 2
    told = capfd.readouterr().err
    assert told.startswith("error: the disk of the cache is full") and "Exception ignored" not in told
    assert not list((small_disk / "cache" / "data").iterdir())


def test_a_full_disk_where_nobody_looks_for_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a command, and in a rank."""
    from megaswift import cli
    from megaswift.commands import verify
    from megaswift.launch.agent import report_from_rank

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x")

    monkeypatch.setattr(verify, "verify_main", full)
    assert cli.main(["verify", "--directory", "x"]) == 2
    monkeypatch.setattr("megaswift.launch.agent._die_with_launcher", full)
    assert report_from_rank(lambda: None) == 2
    told = capsys.readouterr().err
    assert told.count("error: the disk is full: No space left on device.\n  where: /data/x") == 2 and "Traceback" not in told


def test_a_disk_that_fills_up_while_converting_to_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is the disk's, not torch's about a position in a file; nothing is left."""
    save_tiny(tmp_path / "hf", "llama")
    real, written = os.write, [0]

    def failing(handle: int, data: memoryview) -> int:
        written[0] += len(data)
        if written[0] > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data)

    monkeypatch.setattr(os, "write", failing)
    monkeypatch.setattr("megaswift.store.files.SLOT", 4096)  # as a large model: the disk fills up in the middle of a tensor
    words = dict(model_type="tiny", model_id_or_path=str(tmp_path / "hf"), megatron_output_dir=str(tmp_path / "out" / "m"))
    with pytest.raises(UserError, match="the disk is full"):
        export_main(ExportArguments(to_megatron=True, verify=False, **words))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes of a file system."""
    (disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(disk).free - left))


@pytest.mark.parametrize("left", [0, 4096, 12_288])
def test_a_disk_without_space_for_the_files_of_a_run(
    left: int, small_disk: Path, start: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock, its options, its plan: one error each, and neither a directory nor a file of the run is left."""
    from megaswift.cli import main

    monkeypatch.setattr(save, "require_space", lambda *_: None)  # as if the space had been there when it was measured
    fill(small_disk, left)
    words = ["sft", "--resume_from_checkpoint", str(start[0]), "--dataset", str(start[1]), "--output_dir"]
    assert main([*words, str(small_disk / "deep" / "output")]) == 2
    told = capsys.readouterr().err
    assert "error: the run's directory cannot be written: No space left on device." in told and told.count("error:") == 1
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.mark.parametrize("name", ["sft_args.json", "plan.json", "run.json", "config.json"])
def test_each_file_of_a_run_is_one_error(
    name: str, start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full takes no byte."""
    import io

    from megaswift.cli import main

    real, replace = io.open, os.replace

    def opened(file: Any, *words: Any, **options: Any) -> Any:
        full = Path(str(file)).name == name and "w" in str(words or options)
        return real("/dev/full" if full else file, *words, **options)

    def copied(source: Any, target: Any) -> None:
        with opened(target, "wb") as file:
            file.write(Path(source).read_bytes())

    def replaced(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr("io.open", opened)
    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr("os.replace", replaced)
    monkeypatch.setattr("shutil.copyfile", copied)
    words = ["sft", "--resume_from_checkpoint", str(start[0]), "--dataset", str(start[1]), "--output_dir"]
    assert main([*words, str(tmp_path / "output")]) == 2
    told = capsys.readouterr().err
    assert "error: the run's directory cannot be written: No space left on device." in told
    assert not (tmp_path / "output").exists()


def test_the_lock_of_a_run_that_lives_is_not_taken_away(tmp_path: Path) -> None:
    """Another process that comes, and goes with its error, at the same time."""
    from megaswift.store.lock import LOCK, in_use, locked

    run = tmp_path / "a" / "run"
    with locked(run):
        with pytest.raises(UserError, match="in use by process"), locked(run):
            pass
        assert in_use(run)
    with pytest.raises(KeyError), locked(tmp_path / "b" / "run"):
        raise KeyError
    assert not (tmp_path / "b").exists() and (run / LOCK).is_file(), "what was there before stays"
    with pytest.raises(KeyError), locked(run):
        raise KeyError
    assert (run / LOCK).is_file()


def test_a_disk_that_takes_no_more_answers(small_disk: Path) -> None:
    """The first row, and a later one: one error, no file without a row, and what was written whole is read again."""
    from megaswift.inference.results import ResultWriter

    fill(small_disk, 0)
    writer = ResultWriter(small_disk / "infer_result")
    with pytest.raises(UserError, match="cannot write results: .*No space left"):
        writer.write({"query": "q", "response": "a" * 10_000})
    writer.close()
    assert not list((small_disk / "infer_result").iterdir())
    (small_disk / "ballast").unlink()
    fill(small_disk, 8192)
    writer = ResultWriter(small_disk / "infer_result")
    writer.write({"query": "q", "response": "a"})
    with pytest.raises(UserError, match="cannot write results: .*No space left"):
        writer.write({"query": "r", "response": "a" * 100_000})
    writer.close()
    (small_disk / "ballast").unlink()
    assert [row["query"] for row in ResultWriter(small_disk / "infer_result", go_on=True).take_up(["q", "r"])] == ["q"]


@pytest.mark.parametrize("measured", [True, False])
def test_a_disk_that_cannot_hold_the_packaged_model(
    measured: bool, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen before a byte is written, or in the middle of a file: nothing is left, and the way out is the cache's own."""
    import torch

    from megaswift import cli
    from megaswift.commands import verify
    from megaswift.hub import packaged
    from megaswift.weights.hf.shards import PlannedTensor

    tensors = [PlannedTensor(f"x{number}", torch.float32, (400_000,), lambda: torch.zeros(400_000)) for number in range(6)]
    parts = {"_open": None, "_metadata": {}, "_tensors": tensors, "side_contents": {"config.json": b"{}"}}
    for name, value in parts.items():
        monkeypatch.setattr(packaged, name, lambda *_, value=value: value)
    if not measured:
        usage = shutil.disk_usage(small_disk)._replace(free=10**12)
        monkeypatch.setattr(shutil, "disk_usage", lambda *_: usage)
    place = small_disk / "models" / "smollm2-135m-instruct"
    monkeypatch.setattr(verify, "verify_main", lambda _: packaged.make(small_disk, place))
    assert cli.main(["verify", "--directory", "x"]) == 2
    told = capsys.readouterr().err
    assert ("not enough disk space" if measured else "the disk is full") in told and "MEGASWIFT_CACHE" in told
    assert [path.name for path in place.parent.iterdir()] == [f".{place.name}.lock"]
