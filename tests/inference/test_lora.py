"""A LoRA adapter answers merged into its base; what cannot be merged, or does not fit, is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.inference.test_run_model import race
from tests.tiny import save_tiny, write_tokenizer

from megaswift.commands.infer import infer_main, prepare
from megaswift.config.options import DeployArguments, InferArguments
from megaswift.errors import DataError, MegaswiftError, UserError
from megaswift.inference import model_ref as run_model
from megaswift.inference.model_ref import KEPT, choose

MODULES = {"model.layers.0.self_attn.q_proj": 4, "model.layers.3.mlp.down_proj": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_tiny(folder, "llama", vocab_size=512)
    write_tokenizer(folder)
    return folder


def write_adapter(path: Path, base: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """An adapter of two matrices and a norm, as PEFT saves one."""
    path.mkdir(parents=True)
    weights, made = load_file(base / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for module, rank in MODULES.items():
        out, into = weights[f"{module}.weight"].shape
        made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
        made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    made["base_model.model.model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 0.5)
    save_file(made if tensors is None else tensors, path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 6, **config}
    (path / "adapter_config.json").write_text(json.dumps(values))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"down_proj": 16}}])
def test_the_merged_model_is_the_sum(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, **config)
    located = prepare(InferArguments(ckpt_dir=str(adapter))).located
    before, after = load_file(base / "model.safetensors"), load_file(located.path / "model.safetensors")
    pairs = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        module = name.removesuffix(".weight")
        if module in MODULES:
            rank = MODULES[module]
            alpha = config.get("alpha_pattern", {}).get(module.rpartition(".")[2], 6)
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            a, b = (pairs[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
            value = (value.float() + scale * (b @ a)).to(value.dtype)
            assert not torch.equal(after[name], before[name])
        elif name == "model.norm.weight":
            value = torch.full_like(value, 0.5)
        assert torch.allclose(after[name].float(), value.float(), rtol=1e-5, atol=1e-5), name
    assert str(adapter) in located.origin and str(base.resolve()) in located.origin


def test_it_answers_once_merged_and_the_base_stays(
    base: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    question = tmp_path / "q.jsonl"
    question.write_text('{"query": "who are you"}\n')
    words = ["--val_dataset", str(question), "--temperature", "0", "--max_new_tokens", "6"]
    [first] = infer_main(["--ckpt_dir", str(adapter), *words])
    assert "merging 2 LoRA matrices" in capsys.readouterr().err
    [again] = infer_main(["--ckpt_dir", str(adapter), "--model_id_or_path", str(base), *words])
    assert "merging" not in capsys.readouterr().err, "it is merged once"
    [plain] = infer_main(["--model_id_or_path", str(base), *words])
    assert first["response"] == again["response"] != plain["response"]
    assert files == {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    assert list((adapter / "infer_result").glob("*.jsonl")), "results go to the adapter"
    assert len(merged(cache)) == 1


def merged(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "merged").iterdir() if path.is_dir())


def test_only_what_the_user_gave_counts_as_given(base: Path, tmp_path: Path) -> None:
    """The base's options file fills in the rest, and vLLM is not told of a batch size that nobody gave."""
    adapter = write_adapter(tmp_path / "adapter", base)
    told = {"model_type": "my-tiny", "system": "Be brief.", "template_type": "chatml", "dtype": "bf16"}
    folder = base.with_name("told")
    if not folder.exists():
        folder.mkdir()
        for file in base.iterdir():
            (folder / file.name).symlink_to(file)
    (folder / "sft_args.json").write_text(json.dumps(told))
    args = choose(DeployArguments(ckpt_dir=str(adapter), model_id_or_path=str(folder), infer_backend="vllm")).args
    assert args.explicit() == {"ckpt_dir", "model_id_or_path", "infer_backend"}
    assert {name: getattr(args, name) for name in told} == told
    assert (args.ckpt_dir, args.model_id_or_path) == (str(adapter), str(folder))
    given = choose(
        InferArguments(ckpt_dir=str(adapter), model_id_or_path=str(folder), system="Be long.", infer_batch_size=3)
    ).args
    assert "infer_batch_size" in given.explicit() and given.infer_batch_size == 3
    assert (given.system, given.template_type) == ("Be long.", "chatml")


def test_the_newest_merged_models_of_an_adapter_stay(
    base: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that is trained on, and one of the same name elsewhere."""
    other = prepare(InferArguments(ckpt_dir=str(write_adapter(tmp_path / "elsewhere" / "adapter", base)))).located.path
    adapter, made = write_adapter(tmp_path / "adapter", base), []
    for alpha in (1, 2, 3, 4):
        monkeypatch.setattr(run_model, "_handed_out", set())  # each by a process of its own
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
        made.append(prepare(InferArguments(ckpt_dir=str(adapter))).located.path)
        for age, path in enumerate(reversed(made)):
            if path.exists():
                os.utime(path, (1e9 - age, 1e9 - age))
    assert merged(cache) == sorted([other, *made[-KEPT:]])


def test_several_first_questions_at_once_share_one_merge(base: Path, tmp_path: Path, cache: Path) -> None:
    question = tmp_path / "q.jsonl"
    question.write_text('{"query": "who are you"}\n')
    adapter = write_adapter(tmp_path / "adapter", base)
    words = ["--ckpt_dir", str(adapter), "--val_dataset", str(question), "--max_new_tokens", "4", "--save_result", "false"]
    results = race(words)
    assert [result.returncode for result in results] == [0, 0], [result.stderr[-500:] for result in results]
    assert sum(result.stderr.count("merging 2 LoRA matrices") for result in results) == 1
    assert len(merged(cache)) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"peft_type": "IA3"}, "IA3, not LoRA"),
        ({"base_model_name_or_path": None}, "does not say which model"),
        ({"init_lora_weights": "pissa"}, "began as PiSSA .*changed the base"),
        ({"init_lora_weights": "pissa_niter_16"}, "began as PiSSA"),
        ({"init_lora_weights": "OLoRA"}, "began as OLoRA"),
        ({"init_lora_weights": "corda"}, "began as CorDA"),
        ({"init_lora_weights": "lora_ga"}, "began as LoRA-GA"),
        ({"init_lora_weights": "LoftQ"}, "began as LoftQ"),
    ],
)
def test_what_cannot_be_merged_is_refused(base: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, **config)
    with pytest.raises(UserError, match=message) as caught:
        prepare(InferArguments(ckpt_dir=str(adapter))).located  # noqa: B018
    if "init_lora_weights" in config:
        wanted = "merge_and_unload" if config["init_lora_weights"] == "LoftQ" else "path_initial_model_for_weight_conversion"
        assert wanted in caught.value.fix and caught.value.where == str(adapter / "adapter_config.json")


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", None])
def test_a_start_that_leaves_the_base_as_it_is(base: Path, tmp_path: Path, start: Any) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, init_lora_weights=start)
    assert prepare(InferArguments(ckpt_dir=str(adapter))).located.path.is_dir()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.9.mlp.up_proj.lora_A.weight": (2, 64), "model.layers.9.mlp.up_proj.lora_B.weight": (128, 2)}, "no such tensor"),
        ({"model.layers.0.mlp.up_proj.lora_A.weight": (2, 63), "model.layers.0.mlp.up_proj.lora_B.weight": (128, 2)}, "the base has"),
        ({"model.layers.0.mlp.up_proj.lora_A.weight": (2, 64)}, "do not fit"),
        ({"model.embed_tokens.lora_embedding_A": (2, 64)}, "lora_embedding_A, which cannot be merged"),
        ({}, "it holds no tensor"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(base: Path, tmp_path: Path, cache: Path, tensors: dict[str, Any], message: str) -> None:
    made = {f"base_model.model.{name}": torch.zeros(shape) for name, shape in tensors.items()}
    adapter = write_adapter(tmp_path / "adapter", base, made)
    with pytest.raises(MegaswiftError, match=message):
        prepare(InferArguments(ckpt_dir=str(adapter))).located  # noqa: B018
    assert not merged(cache)


def test_an_adapter_without_safetensors_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(DataError, match="adapter_model.safetensors is missing"):
        prepare(InferArguments(ckpt_dir=str(adapter))).located  # noqa: B018


def test_a_damaged_adapter_is_named(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_model.safetensors").write_bytes(b"<!doctype html>")
    with pytest.raises(DataError, match="adapter_model.safetensors"):
        prepare(InferArguments(ckpt_dir=str(adapter))).located  # noqa: B018
