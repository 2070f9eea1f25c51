"""Finding a model: every place and their order, and an error that says what was tried where there is none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hf_files import CONFIG, make_folder, two_shards

from megaswift.errors import DataError, UserError
from megaswift.hub import locate, packaged
from megaswift.hub import remote as hubs
from megaswift.hub.locate import Located

QWEN = CONFIG | {"model_type": "qwen2"}
SHARD = "model.safetensors"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both hubs at an address where nobody listens, and no packaged model."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "127.0.0.1:9")
    monkeypatch.setattr(packaged, "gguf_file", lambda: None)


def hf_cache(home: Path, repository: str, revision: str = "main", config: dict = QWEN) -> Path:
    """A model in the Hugging Face cache, as one commit with a branch name."""
    place = home / ".cache/huggingface/hub" / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(f"sha-of-{revision}")
    return make_folder(place / "snapshots" / f"sha-of-{revision}", config=config)


# local directories


def test_a_local_directory_comes_first(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "My Model (v2)")
    assert locate.locate(None, str(path)) == Located(path, "my-model-v2", str(path), None, "local")
    assert locate.locate("my-name", str(path)).model_type == "my-name"


def test_home_and_relative_paths(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(alone / "a" / "m")
    assert locate.locate(None, "~/a/m").path == alone / "a" / "m"
    monkeypatch.chdir(alone)
    assert locate.locate(None, "a/m").kind == "local"  # a directory wins over a hub id of the same spelling


def test_a_local_directory_tells_its_model_type(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "x", config=QWEN | {"_name_or_path": "Qwen/Qwen2-7B-Instruct"})
    assert locate.locate(None, str(path)).model_type == "qwen2-7b-instruct"
    (path / "sft_args.json").write_text(json.dumps({"model_type": "qwen2_5-3b"}))
    assert locate.locate(None, str(path)).model_type == "qwen2_5-3b"
    assert locate.locate("other", str(path)).model_type == "other"


@pytest.mark.parametrize("name", ["", "a/b", "../x", "-x", "a b"])
def test_a_model_type_that_cannot_name_a_directory(tmp_path: Path, name: str) -> None:
    path = make_folder(tmp_path / "m")
    if name == "":
        assert locate.locate(name, str(path)).model_type == "m"
        return
    with pytest.raises(UserError, match="part of a directory name"):
        locate.locate(name, str(path))


def test_local_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist") as caught:
        locate.locate(None, str(tmp_path / "nothing"))
    assert "owner/name" in caught.value.fix
    with pytest.raises(UserError, match="does not exist") as caught:
        locate.locate(None, "qwen2-7b-instruct")
    assert "--model_type qwen2-7b-instruct" in caught.value.fix
    with pytest.raises(UserError, match="is a file"):
        locate.locate(None, str(make_folder(tmp_path / "m") / SHARD))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        locate.locate(None, str(tmp_path / "empty"))
    (tmp_path / "empty" / "latest_checkpointed_iteration.txt").touch()
    with pytest.raises(UserError) as caught:
        locate.locate(None, str(tmp_path / "empty"))
    assert "Megatron checkpoint" in caught.value.fix
    with pytest.raises(UserError) as caught:
        locate.locate(None, str(tmp_path))
    assert f"did you mean {tmp_path / 'm'}?" in caught.value.fix
    path = make_folder(tmp_path / "bin", {})
    with pytest.raises(DataError, match="no safetensors"):
        locate.locate(None, str(path))
    (path / "pytorch_model.bin").touch()
    with pytest.raises(DataError, match="pickles"):
        locate.locate(None, str(path))
    path = two_shards(tmp_path / "two")
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(DataError, match="1 weight files are missing"):
        locate.locate(None, str(path))


def test_no_model_named_and_an_unknown_one() -> None:
    with pytest.raises(UserError, match="no model is named"):
        locate.locate(None)
    with pytest.raises(UserError, match="'qwen2-7b-instrct' is not registered") as caught:
        locate.locate("qwen2-7b-instrct")
    assert "qwen2-7b-instruct" in caught.value.fix


# hub caches


def test_hugging_face_cache(alone: Path) -> None:
    path = hf_cache(alone, "Qwen/Qwen2.5-1.5B-Instruct")
    expected = Located(path, "qwen2_5-1_5b-instruct", "hf:Qwen/Qwen2.5-1.5B-Instruct", "sha-of-main", "cache")
    assert locate.locate("qwen2_5-1_5b-instruct") == locate.locate(None, "Qwen/Qwen2.5-1.5B-Instruct") == expected
    assert locate.locate(None, str(path)).model_type == "qwen2_5-1_5b-instruct"


def test_revisions_in_the_hugging_face_cache(alone: Path) -> None:
    hf_cache(alone, "Qwen/Qwen2-7B")
    path = hf_cache(alone, "Qwen/Qwen2-7B", "v1")
    assert locate.locate("qwen2-7b", revision="v1").path == locate.locate("qwen2-7b", revision="sha-of-v1").path == path
    with pytest.raises(UserError, match="not found"):
        locate.locate("qwen2-7b", revision="v2")


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"])
def test_hugging_face_cache_elsewhere(alone: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    hf_cache(alone, "Qwen/Qwen2-7B")
    places = {"HF_HOME": ".cache/huggingface", "HF_HUB_CACHE": ".cache/huggingface/hub", "XDG_CACHE_HOME": ".cache"}
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv(variable, str(alone / places[variable]))
    assert locate.locate("qwen2-7b").kind == "cache"


@pytest.mark.parametrize(
    "layout",
    [
        "hub/qwen/Qwen2___5-3B",  # modelscope below 1.22
        "hub/models/Qwen/Qwen2___5-3B",  # from 1.22
        "hub/models/Qwen/Qwen2.5-3B",  # its readable twin
        "models/Qwen--Qwen2.5-3B/snapshots/master",  # from 1.38
    ],
)
@pytest.mark.parametrize("moved", [False, True])
def test_modelscope_caches(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, moved: bool) -> None:
    base = tmp_path / "elsewhere" if moved else alone / ".cache/modelscope"
    if moved:
        monkeypatch.setenv("MODELSCOPE_CACHE", str(base))
        layout = layout.removeprefix("hub/")
    path = make_folder(base / layout, config=QWEN)
    found = locate.locate("qwen2_5-3b")
    assert (found.path, found.origin, found.kind) == (path, "ms:qwen/Qwen2.5-3B", "cache")
    assert locate.locate(None, str(path)).model_type == "qwen2_5-3b"


def test_revision_in_the_modelscope_cache(alone: Path) -> None:
    path = make_folder(alone / ".cache/modelscope/hub/models/Qwen/Qwen2-7B", config=QWEN)
    (path / ".mv").write_text("Revision:v1.0.1,CreatedAt:1717")
    assert locate.locate("qwen2-7b").revision == locate.locate("qwen2-7b", revision="v1.0.1").revision == "v1.0.1"
    with pytest.raises(UserError, match="not found"):
        locate.locate("qwen2-7b", revision="v2")


def test_use_hf_chooses_the_first_cache(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_cache(alone, "Qwen/Qwen2-7B")
    make_folder(alone / ".cache/modelscope/hub/Qwen/Qwen2-7B", config=QWEN)
    assert locate.locate("qwen2-7b").origin == "ms:qwen/Qwen2-7B"
    monkeypatch.setenv("USE_HF", "1")
    assert locate.locate("qwen2-7b").origin == "hf:Qwen/Qwen2-7B"


def test_an_incomplete_copy_is_passed_over_and_reported(alone: Path) -> None:
    hf_cache(alone, "Qwen/Qwen2-7B")
    broken = two_shards(alone / ".cache/modelscope/hub/Qwen/Qwen2-7B")
    (broken / "model-00002-of-00002.safetensors").unlink()
    assert locate.locate("qwen2-7b").origin == "hf:Qwen/Qwen2-7B"
    shutil.rmtree(alone / ".cache/huggingface")
    with pytest.raises(UserError, match=r"ModelScope cache, qwen/Qwen2-7B: .*model-00002-of-00002\.safetensors"):
        locate.locate("qwen2-7b")


# downloads


def fake_hub(monkeypatch: pytest.MonkeyPatch, fetch, address: str = "") -> list:
    """Hugging Face replaced by a hub that answers at `address` and fetches with `fetch`; the calls are returned."""
    calls: list = []

    def noted(model_id: str, revision: str | None) -> Path:
        calls.append((model_id, revision))
        return fetch(model_id, revision)

    hub = replace(hubs.HUGGING_FACE, fetch=noted, address=lambda model_id, revision: address)
    monkeypatch.setattr(locate, "hubs", lambda: (hubs.MODELSCOPE, hub))
    if not address:
        monkeypatch.setattr(locate, "probe", lambda addresses: [""] * len(addresses))
    return calls


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "models--Qwen--Qwen2-7B" / "snapshots" / "abc123"
    calls = fake_hub(monkeypatch, lambda model_id, revision: make_folder(path, config=QWEN))
    assert locate.locate("qwen2-7b", revision="v3") == Located(path, "qwen2-7b", "hf:Qwen/Qwen2-7B", "abc123", "download")
    assert calls == [("Qwen/Qwen2-7B", "v3")]


def test_a_failed_or_broken_download_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model_id: str, revision: str | None) -> Path:
        raise PermissionError("gated repository\nmore lines")

    fake_hub(monkeypatch, refuse)
    with pytest.raises(UserError, match="Hugging Face someone/model: PermissionError: gated repository\n"):
        locate.locate(None, "someone/model")
    fake_hub(monkeypatch, lambda model_id, revision: make_folder(tmp_path / "m", {}))
    with pytest.raises(UserError, match="but no safetensors file"):
        locate.locate(None, "someone/model")


def test_offline_means_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, lambda model_id, revision: Path("/"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        locate.locate("qwen2-7b")
    assert calls == []


def test_without_a_network_the_error_is_quick_and_complete() -> None:
    begin = time.perf_counter()
    with pytest.raises(UserError) as caught:
        locate.locate("qwen2-7b-instruct")
    assert time.perf_counter() - begin < 10
    text = str(caught.value)
    for part in (
        "ModelScope cache, qwen/Qwen2-7B-Instruct: not there",
        "Hugging Face cache, Qwen/Qwen2-7B-Instruct: not there",
    ):
        assert part in text
    assert "Hugging Face Qwen/Qwen2-7B-Instruct: cannot be reached" in text
    assert "--model_id_or_path DIR" in text and "smollm2-135m-instruct" in text


def test_a_host_that_never_answers_takes_no_longer_than_told() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        begin = time.perf_counter()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        answers = hubs.probe([address, address, "nonsense"], seconds=0.3)
        assert time.perf_counter() - begin < 2
    assert all(answers)


def test_hub_download_with_the_real_library(tmp_path: Path) -> None:
    """huggingface_hub against a small server of our own: only weights and side files come, never pickles or code."""
    source = make_folder(tmp_path / "served" / "tiny", config=QWEN)
    for name in ("tokenizer.json", "modeling_x.py", "pytorch_model.bin", "chat_template.jinja", "consolidated.safetensors"):
        (source / name).write_text("{}")
    code = (
        "import sys, json; from megaswift.hub.locate import locate; found = locate(None, 'me/tiny');"
        "print(json.dumps([str(found.path), found.model_type, found.origin, found.revision, found.kind]))"
    )
    with subprocess.Popen(
        [sys.executable, Path(__file__).parent / "hub_server.py", source], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            environment = os.environ | {
                "HF_ENDPOINT": endpoint,
                "HF_HUB_DISABLE_XET": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
            )
        finally:
            server.kill()
    assert done.returncode == 0, done.stderr
    path, name, origin, revision, kind = json.loads(done.stdout)
    assert (name, origin, revision, kind) == ("tiny", "hf:me/tiny", "c0ffee", "download")
    assert sorted(os.listdir(path)) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
