"""Files that users bring, changed at random: configs, weights, indexes, options. Each ends in success or in one of our errors."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megaswift.config.files import DATASET_OPTIONS, EXPORT_ARGS, LAYOUT_OPTIONS, MODEL_OPTIONS, fill_from_file, read_args_file
from megaswift.config.options import ExportArguments, InferArguments, SftArguments, parse
from megaswift.errors import MegaswiftError
from megaswift.evaluation.custom import read_config as read_benchmarks
from megaswift.evaluation.custom import read_custom
from megaswift.models import family_of
from megaswift.run.memory import parameter_count
from megaswift.run.problems import contradictions, layout_problems, refuse, usable_length
from megaswift.run.spec import Parallel
from megaswift.weights.hf.config import check_source, load_config
from megaswift.weights.hf.header import read_header
from megaswift.weights.hf.pickled import read_pickle
from megaswift.weights.hf.read import HFCheckpoint
from tests import tiny
from tests.faults.test_fuzz import MANY, changed, survives

numbers = st.sampled_from([-1, 0, 1, 2, 3, 4, 7, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), -1e300])
words = st.sampled_from(
    ["", "x", "4", "silu", "true", "1e-5", "../x", "/etc/passwd", "a\0b", "\ud800", "default", "yarn", "llama3", "bf16"]
)
leaves = st.none() | st.booleans() | numbers | words
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.sampled_from(["rope_type", "factor", "type"]), inner, max_size=3), max_leaves=6
)  # fmt: skip
FIELDS = [
    *json.loads(tiny.tiny_config("qwen3").to_json_string()), "rope_scaling", "rope_theta", "sliding_window", "num_labels", "id2label",
    "auto_map", "quantization_config", "max_window_layers", "use_sliding_window", "torch_dtype", "architectures", "head_dim",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzzed") / "hf"
    tiny.save_tiny(root, "llama")
    torch.save(load_file(root / "model.safetensors"), root.parent / "model.bin")
    return root


def _layout(config: Any, parallel: Parallel) -> None:
    refuse(layout_problems(config, parallel))


def _config(directory: Path) -> None:
    config = load_config(directory)
    family_of(config.model_type).settings(config)
    for tp, pp in ((1, 1), (2, 2), (3, 1)):
        survives(_layout, config, Parallel(tp=tp, pp=pp, world_size=4))
    parameter_count(config)
    survives(usable_length, config, 64)
    check_source(HFCheckpoint.open(directory), config)


@MANY
@given(name=st.sampled_from(tiny.FAMILIES), fields=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=2))
def test_configs(name: str, fields: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "hf", dirs_exist_ok=True)
    config = json.loads(tiny.tiny_config(name).to_json_string()) | fields
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    survives(_config, tmp_path / "hf")


def _weights(directory: Path) -> None:
    source = HFCheckpoint.open(directory)
    for name in source.names:
        source.tensor(name)
    check_source(source, load_config(directory))


@MANY
@given(
    index=values
    | st.fixed_dictionaries({"weight_map": st.dictionaries(st.sampled_from(["model.norm.weight", "x"]), values, max_size=3)})
)
def test_indexes_of_shards(index: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "hf", dirs_exist_ok=True)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    survives(_weights, tmp_path / "hf")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


entry = st.fixed_dictionaries({}, optional={"dtype": words | st.sampled_from(["F32", "BF16"]), "shape": values, "data_offsets": values, "x": leaves})  # fmt: skip


@MANY
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), entry | values, max_size=3) | values, extra=st.integers(-8, 8), data=st.binary(max_size=16))  # fmt: skip
def test_headers_of_safetensors(header: Any, extra: int, data: bytes, tmp_path: Path) -> None:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", max(len(text) + extra, 0)) + text + data)
    survives(read_header, tmp_path / "x.safetensors")


@MANY
@given(data=st.data())
def test_pickled_weights(data: st.DataObject, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(data.draw(changed((folder.parent / "model.bin").read_bytes())))
    survives(read_pickle, tmp_path / "x.bin")


OPTIONS = sorted(SftArguments().to_dict())
option_values = values | st.lists(words, max_size=3)


def _options(path: Path) -> None:
    args = parse(SftArguments, [str(path)])
    args.check_choices()
    refuse(contradictions(args))
    for name, value in args.to_dict().items():
        assert value is None or isinstance(value, (str, int, float, bool, list)), name
        assert not isinstance(value, list) or all(isinstance(part, str) for part in value), name


@MANY
@given(content=st.dictionaries(st.sampled_from(OPTIONS) | words, option_values, max_size=4) | values)
def test_option_files(content: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(content), encoding="utf-8")
    survives(_options, tmp_path / "run.json")


@MANY
@given(lines=st.lists(st.tuples(st.sampled_from(OPTIONS), st.text(st.sampled_from("a1.:-[]{}#&*!|>'\"%@`\t \n,?~e0é"), max_size=10)), max_size=4), tail=st.text(max_size=12))  # fmt: skip
def test_yaml_option_files(lines: list[tuple[str, str]], tail: str, tmp_path: Path) -> None:
    text = "".join(f"{name}: {value}\n" for name, value in lines) + tail
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8", errors="replace")
    survives(_options, tmp_path / "run.yaml")


@MANY
@given(
    content=values | st.dictionaries(st.sampled_from([*MODEL_OPTIONS, *DATASET_OPTIONS, "tp", "pp"]), option_values, max_size=4)
)
def test_options_kept_in_a_directory(content: Any, tmp_path: Path) -> None:
    (tmp_path / EXPORT_ARGS).write_text(json.dumps(content), encoding="utf-8")
    for cls in (ExportArguments, SftArguments, InferArguments):
        try:
            args = fill_from_file(cls(), read_args_file(tmp_path), (*MODEL_OPTIONS, *LAYOUT_OPTIONS, *DATASET_OPTIONS))
        except MegaswiftError as error:
            assert error.what
            continue
        assert not args.model_type or not set("/\\\0") & set(args.model_type)


@MANY
@given(content=values | st.lists(st.fixed_dictionaries({}, optional={"name": leaves, "pattern": st.sampled_from(["ceval", "general_qa", "x"]), "dataset": words | st.just("."), "subset_list": values}), max_size=2))  # fmt: skip
def test_configurations_of_benchmarks(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content), encoding="utf-8")

    def read() -> None:
        for one in read_benchmarks(str(path)):
            read_custom(one, str(path))

    survives(read)
