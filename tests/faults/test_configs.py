"""config.json that nobody should trust: every command ends with one of our errors, soon, without code from the folder and without memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.ranks import RankPool
from tests.training import write_rows

MEMORY_MB, SECONDS = 300, 60  # what a refusal may take, imports included
EVIL = "from pathlib import Path\nPath(__file__).with_name('marker').touch()\n"

# name -> what is written in place of config.json: fields to change, or the text itself (None: no file)
TEXTS: dict[str, str | None] = {
    "missing": None, "empty": "", "a page": "<html></html>", "a list": "[1, 2]", "null": "null", "cut": '{"model_type": "lla',
    "deep": "[" * 200_000, "a long number": '{"num_hidden_layers": 1' + "0" * 6000 + "}", "not UTF-8": "\udcff",
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "no type": {"model_type": None},
    "unknown type": {"model_type": "mamba9"},
    "type is a list": {"model_type": ["llama"]},
    "type is a path": {"model_type": "../../llama"},
    "10^9 layers": {"num_hidden_layers": 10**9},
    "10^18 layers": {"num_hidden_layers": 10**18},
    "no layer": {"num_hidden_layers": 0},
    "layers as text": {"num_hidden_layers": "4"},
    "layers as a fraction": {"num_hidden_layers": 4.5},
    "layers are true": {"num_hidden_layers": True},
    "negative layers": {"num_hidden_layers": -4},
    "hidden size 2^50": {"hidden_size": 2**50},
    "vocabulary 10^12": {"vocab_size": 10**12},
    "head size 10^9": {"head_dim": 10**9},
    "positions 10^15": {"max_position_embeddings": 10**15},
    "no head": {"num_attention_heads": 0},
    "heads and groups": {"num_attention_heads": 8, "num_key_value_heads": 3},
    "RoPE of another kind": {"rope_scaling": {"rope_type": "evil", "factor": 2.0}},
    "RoPE is a list": {"rope_scaling": [1, 2]},
    "RoPE factor is text": {"rope_scaling": {"rope_type": "linear", "factor": "__import__('os')"}},
    "a dtype that is a function": {"dtype": "load"},
    "quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "an unknown field": {"use_magic": True},
    "9,999 layers": {"num_hidden_layers": 9_999},
    "a large vocabulary": {"vocab_size": 2**24},
}
# Sizes that may be, but the weights are others; values that transformers cannot read.
DATA_FAULTS = {"9,999 layers", "a large vocabulary", "heads and groups", "RoPE is a list", "a dtype that is a function"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each bad config, and one with code beside a good one."""
    root = tmp_path_factory.mktemp("configs")
    tiny.save_tiny(root / "good", "llama", vocab_size=300, eos_token_id=1, pad_token_id=2)
    tiny.write_tokenizer(root / "good")
    write_rows(root / "rows.jsonl")
    made = {}
    for number, name in enumerate([*TEXTS, *FIELDS, "code"]):
        folder = made[name] = Path(shutil.copytree(root / "good", root / f"m{number}"))
        file = folder / "config.json"
        values = json.loads(file.read_text())
        if name == "code":
            _plant_code(folder, values)
        elif name in FIELDS:
            file.write_text(json.dumps({key: value for key, value in (values | FIELDS[name]).items() if value is not None}))
        elif (text := TEXTS[name]) is None:
            file.unlink()
        else:
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
    return made


def _plant_code(folder: Path, values: dict[str, Any]) -> None:
    """Code wherever transformers would look for it, named by config and tokenizer."""
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(EVIL)
    autos = {auto: f"modeling_evil.{auto}" for auto in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": autos}))
    file = folder / "tokenizer_config.json"
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | auto))


def commands(folder: str, rows: str, out: str) -> dict[str, list[str]]:
    model = ["--model_type", "t", "--model_id_or_path", folder]
    return {
        "export": ["export", "--to_megatron", "true", *model, "--megatron_output_dir", f"{out}/m"],
        "sft": ["sft", *model, "--dataset", rows, "--max_steps", "1", "--output_dir", f"{out}/run"],
        "infer": ["infer", *model, "--val_dataset", rows, "--show_dataset_sample", "1", "--max_new_tokens", "2", "--result_dir", f"{out}/answers"],
    }  # fmt: skip


def _tried(folder: str, rows: str, out: str) -> dict[str, tuple[int, str, float, float]]:
    """Exit code, messages, seconds and MB of each command, in a process that had imported everything."""
    from megaswift.cli import main

    found = {}
    kept = {name: os.environ.pop(name, None) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    for verb, words in commands(folder, rows, out).items():
        said, before, began = io.StringIO(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = int(main(words))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        found[verb] = (code, said.getvalue(), time.monotonic() - began, grown)
    os.environ.update({name: value for name, value in kept.items() if value is not None})
    return found


@pytest.mark.parametrize("name", [*TEXTS, *FIELDS])
def test_a_config_that_cannot_be(name: str, models: dict[str, Path], pool: RankPool, tmp_path: Path) -> None:
    rows = models[name].parent / "rows.jsonl"
    out = tmp_path / "out"
    for verb, (code, said, seconds, grown) in pool.run(1, _tried, str(models[name]), str(rows), str(out))[0].items():
        if verb == "infer" and code == 0:
            assert name in ("RoPE of another kind", "an unknown field"), name  # transformers' business
            continue
        assert code == (3 if name in DATA_FAULTS else 2) or (verb == "infer" and code == 3), (verb, code, said)
        assert said.count("error:") == 1, said
        assert "Traceback" not in said, said
        assert seconds < SECONDS
        assert grown < MEMORY_MB, f"{verb} took {grown:.0f} MB"
        if verb != "infer" and name in ("unknown type", "no type", "type is a path"):
            assert f"known families: {', '.join(tiny.EVERY)}" in said
    left = {path.relative_to(out).parts[0] for path in out.rglob("*")} if out.exists() else set()
    assert left <= {"answers"}, left


def test_code_in_the_folder_never_runs(models: dict[str, Path], pool: RankPool, tmp_path: Path) -> None:
    """auto_map is data: the commands work as if it were not there, and no file of code travels on."""
    rows = models["code"].parent / "rows.jsonl"
    out = tmp_path / "out"
    tried = pool.run(1, _tried, str(models["code"]), str(rows), str(out))[0]
    assert not (models["code"] / "marker").exists()
    assert not list(tmp_path.rglob("marker"))
    assert not list(out.rglob("*.py"))
    for verb, (code, said, _, _) in tried.items():
        assert code in (0, 2, 3), (verb, said)
        assert "Traceback" not in said
    assert tried["export"][0] == 0, tried["export"]
