"""What must not leave and what must not get in: tokens, paths from files, objects in the data cache, ports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaswift.cli import main
from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments, InferArguments, SftArguments
from megaswift.data.store import TokenRows
from megaswift.errors import DataError, MegaswiftError, UserError
from megaswift.inference.model_ref import choose
from megaswift.run.source import resolve_source
from tests.checkpoint.test_guard import Payload
from tests.faults.conftest import ALL
from tests.faults.live import LOOPBACK, Live, listening
from tests.training import tiny_start, write_rows

TOKEN = "hf_PLANTEDsecretPLANTEDsecret0123456789"
PLACES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "MEGASWIFT_API_KEY", "WANDB_API_KEY")


def holders(root: Path) -> list[str]:
    """Files that hold the token, in any place, packed ones included."""
    return [
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and not path.is_symlink() and TOKEN.encode() in path.read_bytes()
    ]  # fmt: skip


@pytest.mark.skipif(not ALL, reason="a part of make faults")
def test_a_token_of_the_environment_is_written_nowhere(tmp_path: Path) -> None:
    """Conversion, training on two processes, export, answers and evaluation with tokens in the environment."""
    from tests.evaluation.eval_files import ARC, write_lines

    tiny_start(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 20)
    write_lines(tmp_path / "arc_challenge.jsonl", ARC[:2])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MEGASWIFT_CACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path / "home"),
    }
    environment |= dict.fromkeys(PLACES, TOKEN) | {"HF_HUB_OFFLINE": "1", "NPROC_PER_NODE": "2"}
    run = "out/tiny-chat-tp1-pp1"
    for words in (
        ["export", "--to_megatron", "true", "--model_type", "tiny-chat", "--model_id_or_path", "hf", "--megatron_output_dir", "m"],
        ["sft", "--resume_from_checkpoint", "m", "--dataset", "rows.jsonl", "--max_steps", "1", "--output_dir", "out"],
        ["export", "--to_hf", "true", "--ckpt_dir", run, "--hf_output_dir", "tuned"],
        ["infer", "--ckpt_dir", "tuned", "--val_dataset", "rows.jsonl", "--show_dataset_sample", "2", "--max_new_tokens", "2"],
        ["eval", "--ckpt_dir", "tuned", "--eval_data_dir", ".", "--eval_dataset", "arc", "--max_new_tokens", "2"],
        ["verify", "tuned", "--deep", "true"],
    ):  # fmt: skip
        words = [str(next((tmp_path / run).iterdir())) if word == run else word for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "megaswift", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
    assert holders(tmp_path) == []
    assert len(list(tmp_path.rglob("*_args.json"))) >= 3


@pytest.mark.parametrize("verb", ["export", "sft", "infer", "eval", "deploy"])
@pytest.mark.parametrize("flag", ["--hub_token", "--hf_token", "--token", "--api_key"])
def test_a_token_as_a_flag_is_not_repeated(verb: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """No command has such an option (deploy's key apart, which goes nowhere): the error names the flag, never its value."""
    monkeypatch.chdir(tmp_path)
    words = [verb, flag, TOKEN, "--model_type", "absent", "--model_id_or_path", str(tmp_path / "absent")]
    assert main(words) == 2
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "a/b", "..", ".hidden", "a\\b", "a\0b", "a b", ""])
def test_a_model_type_from_a_file_leads_nowhere_else(name: str, start: tuple[Path, Path], tmp_path: Path) -> None:
    """It names directories that are made, replaced and deleted."""
    root = Path(shutil.copytree(start[0], tmp_path / "inner" / "m"))
    file = root / "export_args.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": name}))
    before = set(tmp_path.rglob("*"))
    for attempt in (
        lambda: export_main(ExportArguments(to_hf=True, ckpt_dir=str(root), verify=False)),
        lambda: choose(InferArguments(ckpt_dir=str(root))).locate(),
        lambda: resolve_source(SftArguments(resume_from_checkpoint=str(root))),
    ):
        with pytest.raises(MegaswiftError) as caught:
            attempt()
        assert "cannot be part of a directory name" in caught.value.what or (not name and "model_type" in caught.value.what)
    if name:
        with pytest.raises(UserError, match="cannot be part of a directory name"):
            export_main(ExportArguments(to_hf=True, ckpt_dir=str(root), model_type=name))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/../../secret"])
def test_a_manifest_names_files_of_its_own_directory(name: str, start: tuple[Path, Path], tmp_path: Path) -> None:
    """A file outside, named with its true size and hash, does not stand in for one inside."""
    from megaswift.store.manifest import check_hashes, quick_check, sha256_of

    root = Path(shutil.copytree(start[0], tmp_path / "m"))
    (tmp_path / "m" / "secret").write_text("secret")
    file = root / "release" / "manifest.json"
    values = json.loads(file.read_text())
    values["files"][name] = {"size": 6, "sha256": sha256_of(tmp_path / "m" / "secret")}
    file.write_text(json.dumps(values))
    assert quick_check(root / "release") is not None
    with pytest.raises(DataError):
        check_hashes(root / "release")
    with pytest.raises(DataError):
        resolve_source(SftArguments(resume_from_checkpoint=str(root)))


@pytest.mark.parametrize("file", ["offsets.npy", "order.npy", "bounds.npy", "index.json", "ids.bin"])
def test_the_data_cache_holds_no_objects(file: str, start: tuple[Path, Path], tmp_path: Path) -> None:
    """An array of Python objects, which numpy keeps as a pickle, is refused; nothing runs."""
    from megaswift.data.store import RowWriter

    writer = RowWriter(tmp_path / "rows")
    writer.add(np.arange(6, dtype=np.int32), np.ones(6, bool), [2, 4])
    writer.finish(np.arange(2), None)
    assert len(TokenRows.open(tmp_path / "rows")) == 2
    marker = tmp_path / "marker"
    np.save(tmp_path / "evil.npy", np.array([Payload(marker)] * 3, dtype=object), allow_pickle=True)
    shutil.copy(tmp_path / "evil.npy", tmp_path / "rows" / file)
    with pytest.raises(DataError, match="the tokenized data cannot be read") as caught:
        TokenRows.open(tmp_path / "rows")
    assert caught.value.exit_code == 3
    assert not marker.exists()


def test_one_process_listens_on_the_loopback_address_only(live: Callable[..., Live]) -> None:
    run = live("--pp", "1", processes=1)
    run.wait_for_steps()
    assert set(listening([run.process.pid])) <= LOOPBACK


def test_the_server_listens_on_the_loopback_address_only(start: tuple[Path, Path]) -> None:
    """The socket of swift deploy as it is made, and what is refused before one is made."""
    from megaswift.commands.deploy import _listen, check
    from megaswift.config.options import DeployArguments

    defaults = DeployArguments(ckpt_dir=str(start[0]))
    listener = _listen(defaults.host, 0)
    try:
        assert set(listening([os.getpid()])) <= LOOPBACK
        assert listener.getsockname()[0] == "127.0.0.1"
    finally:
        listener.close()
    with pytest.raises(UserError, match="lets other machines in"):
        check(DeployArguments(ckpt_dir=str(start[0]), host="0.0.0.0"), None)


def test_the_server_of_vllm_gets_the_same_address_and_no_key_in_its_words(
    start: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megaswift.commands import deploy
    from megaswift.config.options import DeployArguments
    from megaswift.inference.gate import GATE_VARIABLE, KEY_VARIABLE

    words: list[str] = []

    def execv(program: str, given: list[str]) -> None:
        words.extend(given)
        raise SystemExit  # a process that has become another does not come back

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr("megaswift.inference.backends.pick_backend", lambda _: "vllm")
    monkeypatch.setattr("megaswift.inference.vllm_server.packages_distributions", lambda: {"vllm": ["torch"]})
    for name in (KEY_VARIABLE, GATE_VARIABLE):
        monkeypatch.setenv(name, "")  # so that what is set here goes with the test
    monkeypatch.chdir(Path.cwd())  # the server begins in a directory of its own; the tests after this one do not
    with pytest.raises(SystemExit):
        deploy.deploy_main(DeployArguments(ckpt_dir=str(start[0]), api_key=TOKEN, port=0, max_body_size="3KB"))
    assert Path(words[words.index("--model") + 1], "config.json").is_file()
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--allowed-origins") + 1] == "[]"
    assert not [word for word in words if TOKEN in word]
    assert os.environ[KEY_VARIABLE] == TOKEN
    rules = json.loads(os.environ[GATE_VARIABLE])
    assert (rules["body_bytes"], rules["hosts"]) == (3000, ["localhost", "127.0.0.1", "[::1]"])
    assert TOKEN not in os.environ[GATE_VARIABLE]
