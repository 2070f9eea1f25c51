"""Manifests: what made what, from the exported model to the base; changed files, tensors, configs and signatures are named."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megaswift.cli import main
from megaswift.commands.export import export_main
from megaswift.commands.verify import verify_main
from megaswift.config.options import ExportArguments
from megaswift.errors import DataError, UserError
from megaswift.proof.chain import walk
from megaswift.store.manifest import ancestry, read_manifest, sha256_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Any) -> Path:
    """A model converted there and back, once: start/ and start/tiny-hf/."""
    root = tmp_path_factory.mktemp("chain")
    folder, _ = tiny_folders("qwen2", tie_word_embeddings=True)
    start = export_main(
        ExportArguments(
            model_type="tiny", model_id_or_path=str(folder), to_megatron=True, megatron_output_dir=str(root / "start")
        )
    )
    export_main(ExportArguments(ckpt_dir=str(start), to_hf=True))
    return root


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def middle_of_a_tensor(release: Path, folder: Path, name: str) -> tuple[Path, int]:
    """A byte of a Hugging Face tensor inside the Megatron files."""
    from megaswift.weights.hf.read import HFCheckpoint

    source = HFCheckpoint.open(folder)
    wanted = source.tensor(name).contiguous().reshape(-1)[:16].numpy().tobytes()
    for path in release.glob("*.distcp"):
        place = path.read_bytes().find(wanted)
        if place >= 0:
            return path, place + 40
    raise AssertionError(name)


def test_what_a_manifest_says(made: Path) -> None:
    base, model = read_manifest(made / "start" / "release"), read_manifest(made / "start" / "tiny-hf")
    assert base["hf_tensors"] == model["hf_tensors"] and len(base["hf_tensors"]) == 50
    assert set(base["versions"]) == {"megaswift", "torch", "megatron-core", "transformers", "safetensors"}
    assert base["source"]["origin"] and base["layout"] == {"tp": 1, "pp": 1}
    assert base["beside"]["config.json"]["sha256"] == sha256_of(made / "start" / "config.json")
    for content in (base, model):
        verified = content["verified"]
        assert verified["round_trip_tensors"] == 50
        assert verified["logits"]["top1"] == 1.0 and len(verified["logits"]["prompts"]) >= 8 and verified["logits"]["limits"]
        assert verified["config"]["rms_norm_eps"]
    assert model["made_from"] == [
        {
            "directory": "../release",
            "kind": "megatron",
            "iteration": 0,
            "manifest_sha256": sha256_of(made / "start" / "release" / "manifest.json"),
        }
    ]
    for page in (made / "start" / "conversion.html", made / "start" / "tiny-hf" / "conversion.html"):
        text = page.read_text(encoding="utf-8")
        assert "Config audit" in text and "chinese" in text and "<script" not in text and "http" not in text


def test_the_chain_is_walked_and_survives_a_move(work: Path) -> None:
    links = walk(work / "start" / "tiny-hf", deep=True)
    assert [(link.directory.name, link.problem) for link in links] == [("tiny-hf", ""), ("release", "")]
    assert len(verify_main(["verify", str(work / "start")][1:])) == 1
    assert ancestry(work / "start" / "tiny-hf", work / "elsewhere")[1]["directory"] == "../start/release"
    shutil.move(work / "start" / "tiny-hf", work / "alone")
    links = walk(work / "alone", deep=True)
    assert links[0].problem == "" and links[1].note.startswith("not here any more")


def test_a_single_bit_is_found_in_both_forms_by_name(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    release, folder = work / "start" / "release", work / "start" / "tiny-hf"
    path, place = middle_of_a_tensor(release, folder, name)
    flip(path, place)
    assert main(["verify", str(work / "start")]) == 0  # sizes agree
    assert main(["verify", str(work / "start"), "--deep", "true"]) == 3
    assert main(["verify", str(folder), "--deep", "true"]) == 3  # the chain reaches it
    assert main(["export", "--ckpt_dir", str(work / "start"), "--to_hf", "true", "--hf_output_dir", str(work / "again")]) == 3
    said = capsys.readouterr().err
    assert said.count(f"{path.name} is not the file that was written: its SHA-256 differs. Changed tensors: {name}.") == 3
    assert not (work / "again").exists()

    flip(path, place)
    from megaswift.weights.hf.read import HFCheckpoint

    entry = HFCheckpoint.open(folder).entry("model.norm.weight")
    flip(entry.file, entry.start + 1, 7)
    with pytest.raises(DataError, match=r"model.safetensors is not the file .* Changed tensors: model.norm.weight\."):
        verify_main([str(folder), "--deep", "true"])


def test_a_changed_config_is_found_by_field(work: Path) -> None:
    path = work / "start" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))
    for act in (
        lambda: export_main(ExportArguments(ckpt_dir=str(work / "start"), to_hf=True, overwrite=True)),
        lambda: verify_main([str(work / "start")]),
    ):
        with pytest.raises(DataError, match=r"config.json was changed .*rms_norm_eps was 1e-06, is 1e-05"):
            act()
    assert (work / "start" / "tiny-hf" / "config.json").exists()


def test_a_replaced_base_is_found(work: Path) -> None:
    path = work / "start" / "release" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "other"}))
    with pytest.raises(DataError, match="its manifest is not the one that this chain was made from"):
        verify_main([str(work / "start" / "tiny-hf")])


@pytest.mark.parametrize(
    ("fault", "message"),
    [("missing", "is missing"), ("longer", "bytes, "), ("stranger", "is not listed in the manifest"), ("manifest", "not JSON")],
)
def test_other_faults(work: Path, fault: str, message: str) -> None:
    folder = work / "start" / "tiny-hf"
    if fault == "missing":
        (folder / "generation_config.json").unlink()
    elif fault == "longer":
        with (folder / "model.safetensors").open("ab") as file:
            file.write(b"x")
    elif fault == "stranger":
        shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    else:
        (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=message):
        verify_main([str(folder)])


def keys(place: Path, name: str) -> tuple[Path, Path]:
    private, public = place / f"{name}.pem", place / f"{name}.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(private)], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)], check=True, capture_output=True)
    return private, public


@pytest.mark.skipif(shutil.which("openssl") is None, reason="keys are made by openssl")
def test_signatures(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    ours, others = keys(tmp_path, "ours"), keys(tmp_path, "others")
    signed = export_main(
        ExportArguments(
            ckpt_dir=str(work / "start"), to_hf=True, hf_output_dir=str(work / "signed"), sign=str(ours[0]), verify=False
        )
    )
    assert verify_main([str(signed), "--public_key", str(ours[1])])
    assert walk(signed, deep=False)[0].signed_by
    with pytest.raises(DataError, match="signed by another key"):
        verify_main([str(signed), "--public_key", str(others[1])])
    with pytest.raises(DataError, match="is not signed"):
        verify_main([str(work / "start"), "--public_key", str(ours[1])])
    with pytest.raises(UserError, match="signing key cannot be read"):
        export_main(
            ExportArguments(
                ckpt_dir=str(work / "start"), to_hf=True, hf_output_dir=str(work / "no"), sign=str(tmp_path / "absent")
            )
        )
    flip(signed / "manifest.json", 30)
    with pytest.raises(DataError):
        verify_main([str(signed)])


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        verify_main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="no directory is named"):
        verify_main([])
    with pytest.raises(UserError, match=r"it has no manifest\.json"):
        verify_main([str(tmp_path)])
