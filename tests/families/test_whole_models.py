"""Models that read pictures, too: the text model trains, everything else comes back to the bit, and the folder is the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.ranks import RankPool
from tests.training import Trained, train, write_rows

from megaswift.commands.export import export_main
from megaswift.commands.verify import verify_main
from megaswift.config.options import ExportArguments, SftArguments, VerifyArguments
from megaswift.data.conversation import NOT_TEXT
from megaswift.errors import DataError, UserError
from megaswift.inference.loading import load_model
from megaswift.models import families, family_of, parameters_of
from megaswift.models.parameters import hf_shapes
from megaswift.models.whole import picture_ids, text_of
from megaswift.proof.streams import hf_stream, one_process
from megaswift.run.source import resolve_source
from megaswift.store.manifest import read_manifest
from megaswift.weights.carried import carried_names, find_carried, open_beside
from megaswift.weights.convert import Precisions
from megaswift.weights.hf.config import check_source, load_config
from megaswift.weights.hf.read import HFCheckpoint

WHOLE = sorted(family.name for family in families().values() if family.whole is not None)


def folder(root: Path, name: str, **changes: Any) -> Path:
    """A tiny whole model as it might be published: its text in fp32, one tensor of its tower in fp16, and a file of a processor."""
    tiny.save_tiny(root, name, vocab_size=300, eos_token_id=1, **changes)
    tiny.write_tokenizer(root)
    held = load_file(root / "model.safetensors")
    first = carried_names(HFCheckpoint.open(root), load_config(root))[0]
    held[first] = held[first].half()
    save_file(held, root / "model.safetensors", metadata={"format": "pt"})
    (root / "preprocessor_config.json").write_text('{"patch_size": 4}')
    return root


def to_megatron(source: Path, target: Path, **options: Any) -> Path:
    words = dict(model_type="tiny-whole", model_id_or_path=str(source), to_megatron=True, megatron_output_dir=str(target))
    return export_main(ExportArguments(**words | {"language_model_only": True, **options}))  # type: ignore[arg-type]


def to_hf(run: Path, target: Path, **options: Any) -> Path:
    return export_main(ExportArguments(ckpt_dir=str(run), to_hf=True, hf_output_dir=str(target), **options))


@dataclass
class Story:
    """A whole model that was converted, trained for two steps on two ranks and for two more, and exported."""

    source: Path
    start: Path
    run: Trained
    out: Path


def rows_with_pictures(path: Path) -> Path:
    """Rows, and three with pictures: in a column, as a block, and by a tag in the text."""
    write_rows(path)
    block = [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": "x.png"}]
    rows: list[dict[str, Any]] = [
        {"query": "what is this", "response": "a cat", "images": ["x.png"]},
        {"messages": [{"role": "user", "content": block}, {"role": "assistant", "content": "a cat"}]},
        {"query": "<image>what is this", "response": "a cat"},
    ]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    root, pool = tmp_path_factory.mktemp("whole"), RankPool()
    source, rows = folder(root / "hf", "gemma3"), rows_with_pictures(root / "rows.jsonl")
    start = to_megatron(source, root / "start")
    words: dict[str, Any] = dict(dataset=[str(rows)], tp=2, batch_size=2, save_steps=2)
    train(pool, root / "out", 2, resume_from_checkpoint=str(start), max_steps=2, **words)
    (run,) = (root / "out").glob("*/v0*")
    again = train(pool, root / "out", 2, resume_from_checkpoint=str(run), max_steps=4, **words)
    yield Story(source, start, again, to_hf(again.directory, root / "made"))
    pool.close()


def test_text_is_trained_and_everything_else_comes_back(story: Story) -> None:
    before, after = HFCheckpoint.open(story.source), HFCheckpoint.open(story.out)
    assert set(before.names) == set(after.names) and story.run.rows[-1]["global_step/max_steps"] == "4/4"
    config = load_config(story.out)
    text, carried = set(hf_shapes(parameters_of(config))), set(carried_names(before, config))
    assert text | carried == set(before.names) and not text & carried and len(carried) == 34
    for name in before.names:
        assert before.dtype(name) == after.dtype(name) and before.shape(name) == after.shape(name)
        assert torch.equal(before.tensor(name), after.tensor(name)) == (name in carried), name
    assert {before.dtype(name) for name in carried} == {torch.float16, torch.float32}
    assert json.loads((story.out / "config.json").read_text()) == json.loads((story.source / "config.json").read_text())
    assert (story.out / "preprocessor_config.json").read_text() == '{"patch_size": 4}'
    manifest = read_manifest(story.out)
    assert set(manifest["hf_tensors"]) == set(after.names) and manifest["verified"]["carried_tensors"] == 34
    verify_main(VerifyArguments(directory=str(story.out), deep=True))
    model = load_model(story.out)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    made = model.generate(torch.arange(9)[None], max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 12)


def test_converted_weights_hold_what_is_carried_and_ranks_read_none_of_it(story: Story) -> None:
    release = story.start / "release"
    beside, manifest = open_beside(release), read_manifest(release)
    assert set(beside.names) == set(manifest["carried"]["tensors"]) and "carried.safetensors" in manifest["files"]
    assert not set(manifest["hf_tensors"]) & set(beside.names) and manifest["verified"]["carried_tensors"] == 34
    checkpoint = read_manifest(story.run.directory / "iter_0000004")
    assert checkpoint["carried"]["path"] == str(release) and set(checkpoint["carried"]["tensors"]) == set(beside.names)
    assert not list((story.run.directory / "iter_0000004").glob("*.safetensors"))


def test_rows_with_pictures_are_refused_by_name(story: Story) -> None:
    run = json.loads((story.run.directory / "run.json").read_text())
    report = json.loads((Path(run["data"]["train"]).parent / "report.json").read_text())
    (entry,) = report["datasets"]
    assert entry["dropped"][NOT_TEXT]["count"] == 3, entry
    shown = json.dumps(report)
    assert "<image> in message 1" in shown


def test_a_changed_tensor_is_not_carried(story: Story, tmp_path: Path) -> None:
    """Neither one of another value, whose digest is another, nor one of another precision, nor one that is gone."""
    release, kept = story.start / "release", tmp_path / "kept.safetensors"
    shutil.copy(release / "carried.safetensors", kept)
    held = load_file(kept)
    name = next(name for name, value in held.items() if value.ndim > 1 and value.dtype == torch.float32)
    elsewhere = story.source.rename(tmp_path / "elsewhere")  # else what is missing beside the weights would be taken from it
    try:
        for fault, words in (("value", "not those that were recorded"), ("dtype", "BF16"), ("gone", f"without {name}")):
            one = dict(held)
            if fault == "gone":
                del one[name]
            else:
                one[name] = one[name] * 1.001 if fault == "value" else one[name].bfloat16()
            save_file(one, release / "carried.safetensors", metadata={"format": "pt"})
            with pytest.raises(DataError) as caught:
                to_hf(story.run.directory, tmp_path / fault, verify=False)
            assert words in f"{caught.value.what} {caught.value.where}" and not (tmp_path / fault).exists()
        manifest = read_manifest(story.run.directory / "iter_0000004")
        found = find_carried(manifest, story.run.directory / "iter_0000004", elsewhere)
        assert found is not None and found[0].path == elsewhere  # what the user names
        (release / "carried.safetensors").unlink()
        with pytest.raises(DataError, match="34 tensors that were carried along"):
            find_carried(manifest | {"made_from": [], "carried": manifest["carried"] | {"origin": None}}, tmp_path)
    finally:
        shutil.copy(kept, release / "carried.safetensors")
        elsewhere.rename(story.source)


@pytest.mark.parametrize("name", WHOLE)
def test_such_a_model_is_refused_unless_its_text_alone_is_meant(name: str, tmp_path: Path) -> None:
    tiny.save_tiny(tmp_path / "hf", name)
    with pytest.raises(UserError) as caught:
        to_megatron(tmp_path / "hf", tmp_path / "start", language_model_only=False)
    assert "--language_model_only true" in str(caught.value.fix)
    with pytest.raises(UserError, match="only its text model can be trained"):
        resolve_source(SftArguments(model_type="tiny-whole", model_id_or_path=str(tmp_path / "hf")))
    held = load_file(tmp_path / "hf" / "model.safetensors")
    source, config = HFCheckpoint.open(tmp_path / "hf"), load_config(tmp_path / "hf")
    for part in (set(carried_names(source, config)), {parameters_of(config)[3].hf[0].name}):
        save_file({key: value for key, value in held.items() if key not in part}, tmp_path / "hf" / "model.safetensors")
        with pytest.raises(DataError, match="text model alone|missing"):
            check_source(HFCheckpoint.open(tmp_path / "hf"), config)


def test_the_option_means_nothing_for_a_text_model(tmp_path: Path) -> None:
    tiny.save_tiny(tmp_path / "hf", "llama")
    with pytest.raises(UserError, match="nothing else"):
        to_megatron(tmp_path / "hf", tmp_path / "start")


@pytest.mark.parametrize("name", WHOLE)
def test_text_alone_has_the_positions_that_transformers_gives_it(name: str, tmp_path: Path) -> None:
    """The whole model, which chooses the positions of three axes itself, and with positions one after the other."""
    model = tiny.save_tiny(tmp_path, name)
    tokens = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits[0]
    config, source = load_config(tmp_path), HFCheckpoint.open(tmp_path)
    with one_process():
        found = hf_stream(config, source, Precisions(torch.float32)).run(tokens, torch.arange(24)[None], [24])
    assert (found - wanted).abs().max() < 1e-5 and text_of(config) is config


@pytest.mark.parametrize("start", ["folder", "converted"])
def test_adapters_have_pefts_names_and_load_onto_the_whole_model(start: str, pool: RankPool, tmp_path: Path) -> None:
    """Modules of the tower have the same last names (gate_proj), and none of them may get an adapter."""
    source, rows = folder(tmp_path / "hf", "qwen2_5_vl"), write_rows(tmp_path / "rows.jsonl")
    begin = source if start == "folder" else to_megatron(source, tmp_path / "start", verify=False)
    options: dict[str, Any] = dict(
        model_type="tiny-whole", max_steps=2, dataset=[str(rows)], tp=2, batch_size=2, sft_type="lora", language_model_only=True
    )
    run = train(pool, tmp_path / "out", 2, resume_from_checkpoint=str(begin), **options)
    adapter = to_hf(run.directory, tmp_path / "adapter")
    assert read_manifest(adapter)["serves"] == {"peft": "loaded and compared", "vllm": "not compared"}
    base = tiny.loaded(source)
    targets = [
        name
        for name, one in base.named_modules()
        if ".layers." in name and name.startswith("model.language_model") and isinstance(one, torch.nn.Linear)
    ]
    own = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets))
    own.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (adapter, tmp_path / "peft"))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    loaded = PeftModel.from_pretrained(tiny.loaded(source), adapter)
    assert not [name for name, _ in loaded.named_parameters() if "lora_" in name and "visual" in name]
    merged = to_hf(run.directory, tmp_path / "merged", merge_lora=True)
    before, after = HFCheckpoint.open(source), HFCheckpoint.open(merged)
    carried = carried_names(before, load_config(source))
    assert set(before.names) == set(after.names) and all(torch.equal(before.tensor(one), after.tensor(one)) for one in carried)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert (loaded(input_ids=tokens).logits - load_model(merged, "fp32")(input_ids=tokens).logits).abs().max() < 2e-5


VISION = {"depth": 2, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2}
QWEN = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "hidden_act": "silu", "vocab_size": 151936, "max_position_embeddings": 128000, "attention_dropout": 0.0,
}  # fmt: skip
IMAGE = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655, "video_token_id": 151656}
# What folders on the hub say: flat, without fields that are transformers' defaults, with fields of the engine that they were made with.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        **QWEN, **IMAGE, "model_type": "qwen2_5_vl", "vision_token_id": 151654, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 70,
        "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": True, "vision_config": VISION,
    },
    "qwen3_vl": {
        **IMAGE, "model_type": "qwen3_vl", "tie_word_embeddings": True, "vision_config": {"depth": 2, "model_type": "qwen3_vl"},
        "text_config": {
            **QWEN, "model_type": "qwen3_vl_text", "head_dim": 128, "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        },
    },
    "qwen3_5": {
        **IMAGE, "model_type": "qwen3_5", "tie_word_embeddings": False, "vision_config": {"depth": 2, "model_type": "qwen3_5"},
        "text_config": {
            **QWEN, "model_type": "qwen3_5_text", "attn_output_gate": True, "mamba_ssm_dtype": "float32", "output_gate_type": "swish",
            "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "full_attention_interval": 4, "mlp_only_layers": [],
            "rope_parameters": {
                "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
            },
        },
    },
    "gemma3": {
        "model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000, "image_token_index": 262144, "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 2, "vision_use_head": False},
    },
    "mistral3": {
        "model_type": "mistral3", "image_token_index": 10, "multimodal_projector_bias": False, "vision_feature_layer": -1,
        "text_config": {**QWEN, "model_type": "mistral", "head_dim": 128, "rope_theta": 1e9, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", "num_hidden_layers": 2, "rope_theta": 10000.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_they_are_published(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = load_config(tmp_path)
    names = list(hf_shapes(parameters_of(config)))
    prefix, head = {
        "qwen2_5_vl": ("model.", None), "qwen3_vl": ("model.language_model.", None), "qwen3_5": ("model.language_model.", "lm_head.weight"),
        "gemma3": ("language_model.model.", None), "mistral3": ("language_model.model.", "language_model.lm_head.weight"),
    }[name]  # fmt: skip
    assert f"{prefix}layers.35.mlp.down_proj.weight" in names or f"{prefix}layers.33.mlp.down_proj.weight" in names
    assert [one for one in names if "lm_head" in one] == ([head] if head else [])
    assert picture_ids(config) and family_of(config.model_type).whole is not None


@pytest.mark.parametrize(
    ("field", "value"), [("attn_output_gate", False), ("output_gate_type", "gelu"), ("mamba_ssm_dtype", "bfloat16")]
)
def test_what_transformers_would_not_compute_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    text = PUBLISHED["qwen3_5"]["text_config"] | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["qwen3_5"] | {"text_config": text}))
    with pytest.raises(UserError) as caught:
        load_config(tmp_path)
    assert field in f"{caught.value.what} {caught.value.where}"


def test_experts_of_a_layer_may_be_one_tensor(tmp_path: Path) -> None:
    """As Qwen3.5 is published: seen as transformers saves it, which is what is written; transformers reads the same of both."""
    plain, one = tmp_path / "plain", tmp_path / "one"
    tiny.save_tiny(plain, "qwen3_5_moe")
    shutil.copytree(plain, one)
    held = load_file(plain / "model.safetensors")
    for layer in range(4):
        stem = f"model.language_model.layers.{layer}.mlp.experts."
        each = [[held.pop(f"{stem}{e}.{part}_proj.weight") for part in ("gate", "up", "down")] for e in range(4)]
        held[f"{stem}gate_up_proj"] = torch.stack([torch.cat(parts[:2]) for parts in each])
        held[f"{stem}down_proj"] = torch.stack([parts[2] for parts in each])
    held["mtp.layers.0.mlp.experts.gate_up_proj"] = torch.ones(4, 6, 5)
    save_file(held, one / "model.safetensors", metadata={"format": "pt"})
    left, right, config = HFCheckpoint.open(plain), HFCheckpoint.open(one), load_config(one)
    check_source(right, config)
    assert set(right.names) == set(left.names) | {"mtp.layers.0.mlp.experts.gate_up_proj"}
    assert all(torch.equal(left.tensor(name), right.tensor(name)) for name in left.names)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(tiny.loaded(plain)(input_ids=tokens).logits, tiny.loaded(one)(input_ids=tokens).logits)
    start = to_megatron(one, tmp_path / "start")
    out = HFCheckpoint.open(to_hf(start, tmp_path / "out"))
    assert set(out.names) == set(right.names) and all(torch.equal(out.tensor(name), right.tensor(name)) for name in out.names)
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "out" / "model.safetensors")
