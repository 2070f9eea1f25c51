"""Where `swift export` may write: never over what it reads, never over a run; `~` is home; a by-product does not travel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megaswift.commands.export import export_main
from megaswift.commands.verify import verify_main
from megaswift.config.options import ExportArguments, VerifyArguments
from megaswift.errors import UserError
from megaswift.weights.hf.folder import side_files


def to_megatron(folder: Path, target: Path, **more: Any) -> Path:
    options = {"model_type": "tiny", "model_id_or_path": str(folder), "megatron_output_dir": str(target), "verify": False}
    return export_main(ExportArguments(to_megatron=True, **options | more))


def to_hf(root: Path, target: Path | None = None, **more: Any) -> Path:
    place = {"hf_output_dir": str(target)} if target is not None else {}
    return export_main(ExportArguments(to_hf=True, ckpt_dir=str(root), verify=False, **place | more))


def tree(root: Path) -> dict[str, bytes | None]:
    """Every file and directory, with contents."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Any) -> Path:
    """hf/, and start/ made from it."""
    root = tmp_path_factory.mktemp("targets")
    folder, _ = tiny_folders("llama")
    shutil.copytree(folder, root / "hf")
    to_megatron(root / "hf", root / "start")
    return root


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """hf/, start/ and run/, which is start/ as a run that has saved two checkpoints."""
    work = shutil.copytree(made, tmp_path / "work")
    shutil.copytree(work / "start", work / "run")
    (work / "run" / "release").rename(work / "run" / "iter_0000010")
    shutil.copytree(work / "run" / "iter_0000010", work / "run" / "iter_0000005")
    (work / "run" / "latest_checkpointed_iteration.txt").write_text("10")
    (work / "run" / "plan.json").write_text("{}")
    return work


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("start", "start", "is the directory that is converted"),
        ("start", "start/../start/.", "is the directory that is converted"),
        ("start", ".", "holds the directory that is converted"),
        ("start", "start/release", "a place of checkpoints"),
        ("start", "start/release/hf", "a place of checkpoints"),
        ("run", "run/iter_0000010", "a place of checkpoints"),
        ("run", "run/iter_0000005", "a place of checkpoints"),
        ("run", "run/iter_0000020/deep/hf", "a place of checkpoints"),
        ("link", "start", "is the directory that is converted"),
        ("start", "link", "is the directory that is converted"),
        ("start", "link/release", "a place of checkpoints"),
        ("run", "above/run", "is the directory that is converted"),
    ],
)
def test_to_hf_never_writes_over_its_source(work: Path, source: str, target: str, message: str, overwrite: bool) -> None:
    (work / "link").symlink_to(work / "start")
    (work.parent / "above").symlink_to(work)
    place = work.parent / target if target.startswith("above") else Path(os.path.join(work, target))
    shutil.copy(work / "start" / "export_args.json", work)  # so that it looks like something that export made
    before = tree(work)
    with pytest.raises(UserError, match=message) as caught:
        to_hf(work / source, place, overwrite=overwrite)
    assert caught.value.fix == "name another one"
    assert tree(work) == before


@pytest.mark.parametrize(("source", "target"), [("start/tiny-hf", "start/tiny-hf"), ("start/tiny-hf", "start")])
def test_to_megatron_never_writes_over_its_source(work: Path, source: str, target: str) -> None:
    to_hf(work / "start")
    before = tree(work)
    with pytest.raises(UserError, match="the directory that is converted"):
        to_megatron(work / source, work / target, overwrite=True)
    assert tree(work) == before


def test_a_model_without_a_manifest_is_its_own_place_too(work: Path) -> None:
    with pytest.raises(UserError, match="is the directory that is converted"):
        to_megatron(work / "hf", work / "hf", overwrite=True)


def test_the_default_place_inside_the_source_stays(work: Path) -> None:
    for root in (work / "start", work / "run"):
        first = to_hf(root)
        assert first == root / "tiny-hf"
        (first / "note.txt").write_text("old")
        assert to_hf(root, overwrite=True) == first and not (first / "note.txt").exists()
    copy = to_hf(work / "run", work / "run" / "iter_0000010-hf")
    assert to_hf(work / "run", copy, overwrite=True) == copy
    assert to_megatron(work / "run" / "tiny-hf", work / "run" / "tiny-hf" / "again").is_dir()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("run", "is a training run"),
        ("run/iter_0000010", "is a checkpoint"),
        ("start/release", "is a checkpoint"),
        ("holder", "holds a training run"),
    ],
)
@pytest.mark.parametrize("missing", ["plan.json", "iter_0000010", None])
def test_a_run_is_never_replaced(work: Path, tmp_path: Path, target: str, message: str, missing: str | None) -> None:
    """Neither half of what tells a run may be missing for it to count."""
    other = to_megatron(work / "hf", tmp_path / "other")
    shutil.copytree(work / "start", work / "holder")
    shutil.copytree(work / "run", work / "holder" / "output" / "v0")
    for run in (work / "run", work / "holder" / "output" / "v0"):
        if missing == "plan.json":
            (run / missing).unlink()
        elif missing and not target.endswith(missing):
            shutil.rmtree(run / missing)
            shutil.rmtree(run / "iter_0000005")
    before = tree(work)
    for attempt in (
        lambda: to_hf(other, work / target, overwrite=True),
        lambda: to_megatron(work / "hf", work / target, overwrite=True),
    ):
        with pytest.raises(UserError, match=message):
            attempt()
    assert tree(work) == before


def test_what_export_made_is_still_replaced(work: Path) -> None:
    neighbour = work / "start.new"  # somebody else's, whatever its name
    neighbour.mkdir()
    (neighbour / "mine").write_text("1")
    (work / "start" / "old").write_text("1")
    assert to_megatron(work / "hf", work / "start", overwrite=True) == work / "start"
    assert not (work / "start" / "old").exists() and (neighbour / "mine").exists()
    to_hf(work / "start", work / "real")
    (work / "name").symlink_to(work / "real")
    to_hf(work / "start", work / "name", overwrite=True)
    assert not (work / "name").is_symlink() and (work / "real").is_dir()
    assert sorted(path.name for path in work.iterdir()) == ["hf", "name", "real", "run", "start", "start.new"]


def test_home_is_written_out_wherever_a_place_is_named(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell writes `~` out only where it begins a word."""
    monkeypatch.setenv("HOME", str(work))
    monkeypatch.chdir(tmp_path)
    words = ["--to_megatron", "true", "--model_type", "tiny", "--verify", "false"]
    assert export_main([*words, "--model_id_or_path=~/hf", "--megatron_output_dir=~/made"]) == work / "made"
    (tmp_path / "o.yaml").write_text("to_hf: true\nckpt_dir: ~/made\nhf_output_dir: ~/back\nverify: false\n")
    assert export_main(["o.yaml"]) == work / "back"
    assert verify_main(["--directory=~/back"])[0] == work / "back"
    with pytest.raises(UserError) as caught:
        export_main([*words, "--model_id_or_path=~/hf", "--sign=~/absent.pem"])
    assert str(work / "absent.pem") in caught.value.where
    assert not (tmp_path / "~").exists()


BY_PRODUCTS = [
    "manifest.json.sig",
    "run.json",
    "hang-rank0.txt",
    "hang-rank12.txt",
    "nonfinite_step_7.json",
    "spike_step_12.json",
]


def test_by_products_do_not_travel(work: Path) -> None:
    for name in BY_PRODUCTS:
        (work / "hf" / name).write_text("{}")
    assert not {path.name for path in side_files(work / "hf")} & set(BY_PRODUCTS)
    root = to_megatron(work / "hf", work / "m")
    (root / "hang-rank0.txt").write_text("")
    names = {path.name for path in (*root.iterdir(), *to_hf(root).iterdir())}
    assert names & set(BY_PRODUCTS) == {"hang-rank0.txt"}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="keys are made by openssl")
def test_a_signature_stays_where_it_belongs(work: Path) -> None:
    pytest.importorskip("cryptography")
    key = work / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True, capture_output=True)
    signed = to_hf(work / "start", work / "signed", sign=str(key))
    assert (signed / "manifest.json.sig").is_file()
    root = to_megatron(signed, work / "again")
    back = to_hf(root, work / "back")
    for place in (signed, root, back):
        verify_main(VerifyArguments(directory=str(place), deep=True))
    assert "manifest.json.sig" not in json.loads((root / "release" / "manifest.json").read_text())["beside"]
