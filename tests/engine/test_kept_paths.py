"""A run means the same from any directory: its options name places absolutely, `~` is home, and no by-product goes into it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from megaswift.commands.export import export_main
from megaswift.commands.infer import infer_main
from megaswift.commands.verify import verify_main
from megaswift.config.options import ExportArguments, SftArguments, VerifyArguments, parse
from megaswift.run.source import resolve_source
from tests.ranks import RankPool
from tests.training import Trained, tiny_start, train, write_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, start/, rows.jsonl, and info.json, which registers the rows as mine."""
    root = tmp_path_factory.mktemp("kept")
    tiny_start(root)
    write_rows(root / "rows.jsonl")
    (root / "info.json").write_text(json.dumps({"mine": {"path": "rows.jsonl"}}))
    return root


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another directory, in which the same names mean something else."""
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "rows.jsonl").write_text('{"query": "something else", "response": "x"}\n')
    return place


def command(pool: RankPool, words: list[str]) -> Trained:
    """`swift sft WORDS` with its loop on a pooled rank."""
    args = parse(SftArguments, words)
    options = {name: getattr(args, name) for name in args.explicit()}
    return train(pool, Path("unused"), 1, **options)


def test_a_run_with_relative_options_is_used_from_elsewhere(
    made: Path, elsewhere: Path, tmp_path: Path, pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(work)
    words = "--resume_from_checkpoint start --dataset rows.jsonl#20 mine#12 --custom_dataset_info info.json".split()
    words += "--output_dir out --max_steps 2 --gradient_accumulation_steps 2 --learning_rate 0.001".split()
    run = command(pool, words).directory
    told = json.loads((run / "sft_args.json").read_text(encoding="utf-8"))
    assert told["dataset"] == [f"{work}/rows.jsonl#20", "mine#12"] and told["val_dataset"] == []
    assert told["custom_dataset_info"] == f"{work}/info.json"
    places = {name: told[name] for name in ("resume_from_checkpoint", "output_dir", "logging_dir", "model_id_or_path")}
    assert places == {
        "resume_from_checkpoint": f"{work}/start",
        "output_dir": f"{work}/out",
        "logging_dir": None,
        "model_id_or_path": None,
    }

    monkeypatch.chdir(elsewhere)
    plain = ["--ckpt_dir", str(run), "--max_new_tokens", "2", "--save_result", "false", "--temperature", "0"]
    first = infer_main([*plain, "--load_dataset_config", "true", "--show_dataset_sample", "1"])
    assert len(first) == 1 and "something else" not in str(first)
    assert len(infer_main([*plain, "--val_dataset", "mine#2"])) == 2, "the registry of the run is found"
    longer = command(pool, [f"{run}/sft_args.json", "--resume_from_checkpoint", str(run), "--max_steps", "3"])
    assert longer.directory == run and len(longer.losses) == 3
    again = command(pool, [f"{run}/sft_args.json", "--resume", "true", "--max_steps", "4"])
    assert again.directory == run and len(again.losses) == 4
    assert sorted(path.name for path in elsewhere.iterdir()) == ["rows.jsonl"]


def test_home_is_written_out(
    made: Path, elsewhere: Path, tmp_path: Path, pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("hf", "start", "rows.jsonl"):
        (home / name).symlink_to(made / name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    (elsewhere / "run.yaml").write_text("output_dir: ~/out\nresume_from_checkpoint: ~/start\nlogging_dir: ~/tb\n")
    run = command(pool, ["run.yaml", "--dataset=~/rows.jsonl#8", "--max_steps=1", "--gradient_accumulation_steps=1"])
    assert run.directory.is_relative_to(home / "out") and list((home / "tb").iterdir())
    assert resolve_source(SftArguments(output_dir="~/out", resume=True, model_type="tiny-chat")).root == run.directory
    assert resolve_source(SftArguments(model_id_or_path="~/hf", model_type="t")).root == home / "hf"
    assert verify_main([f"--directory=~/{run.directory.relative_to(home)}"])
    assert not (elsewhere / "~").exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="keys are made by openssl")
@pytest.mark.parametrize("start", ["megatron", "hf"])
def test_a_run_from_a_signed_start_verifies(made: Path, elsewhere: Path, tmp_path: Path, pool: RankPool, start: str) -> None:
    pytest.importorskip("cryptography")
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True, capture_output=True)
    signed = ExportArguments(
        ckpt_dir=str(made / "start"), to_hf=True, hf_output_dir=str(tmp_path / "signed"), sign=str(key), verify=False
    )
    source = export_main(signed)
    if start == "megatron":
        source = export_main(
            ExportArguments(
                model_type="tiny-chat",
                model_id_or_path=str(source),
                to_megatron=True,
                megatron_output_dir=str(tmp_path / "m"),
                sign=str(key),
                verify=False,
            )
        )
    named = {"resume_from_checkpoint": str(source)} if start == "megatron" else {"model_id_or_path": str(source)}
    run = train(
        pool, tmp_path / "out", 1, model_type="tiny-chat", dataset=[f"{made}/rows.jsonl#8"], max_steps=1,
        gradient_accumulation_steps=1, **named,
    ).directory  # fmt: skip
    assert not list(run.glob("*.sig"))
    model = export_main(ExportArguments(ckpt_dir=str(run), to_hf=True, verify=False))
    assert not {"manifest.json.sig", "run.json"} & {path.name for path in model.iterdir()}
    for place in (run, model):
        verify_main(VerifyArguments(directory=str(place), deep=True))
