"""Whole runs with experts: the same losses at every layout, and what one layout saved goes on at another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.commands.export import export_main
from megaswift.config.options import ExportArguments
from megaswift.errors import UserError
from megaswift.run.memory import estimate, parameter_count
from megaswift.run.spec import Run
from megaswift.train.expert_health import line, summary
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader
from tests import tiny
from tests.engine.test_experts import LAYOUTS, built, join, run_of
from tests.ranks import RankPool
from tests.runs import resolved_run
from tests.training import Trained, long, tiny_start, train, write_rows

STEPS = 4


@pytest.fixture(scope="module", params=["qwen3_moe", pytest.param("qwen2_moe", marks=long)])
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model, and rows; one model has experts in every layer, the other not, and an expert that every token goes to."""
    root = tmp_path_factory.mktemp(request.param)
    return str(tiny_start(root, request.param)), str(write_rows(root / "rows.jsonl"))


def run(pool: RankPool, output: Path, start: tuple[str, str], processes: int, **layout: Any) -> Trained:
    words: dict[str, Any] = dict(resume_from_checkpoint=start[0], dataset=[start[1]], max_steps=STEPS, save_steps=2)
    words |= dict(gradient_accumulation_steps=4 // processes, dataset_test_ratio=0.1, save_total_limit=5, eval_steps=2) | layout
    return train(pool, output, processes, **words)


def same(one: Trained, other: Trained) -> None:
    assert one.losses == pytest.approx(other.losses, abs=1e-5)
    assert one.norms == pytest.approx(other.norms, rel=2e-5)
    assert one.eval_losses == pytest.approx(other.eval_losses, abs=1e-5)


def test_what_ep_2_saved_goes_on_elsewhere(start: tuple[str, str], pool: RankPool, tmp_path: Path) -> None:
    """At tp 2, at pp 2 with ep 2, in one process, at etp 2: weights, moments and steps as they were."""
    plain = run(pool, tmp_path / "plain", start, 1)
    spread = run(pool, tmp_path / "ep2", start, 2, ep=2)
    same(spread, plain)
    half = spread.directory / "iter_0000002"
    whole, parts = Reader(plain.directory / "iter_0000002"), Reader(half)
    assert set(whole.keys) == set(parts.keys)
    for key in whole.keys:
        assert (whole.read(key) - parts.read(key)).abs().max() < 1e-4, key
    places: dict[str, tuple[int, dict[str, Any]]] = {
        "tp2": (2, {"tp": 2, "sequence_parallel": True, "ep": 1}),
        "one": (1, {"ep": 1}),
        "pp2,ep2": (4, {"pp": 2, "ep": 2}),
        "tp2,etp2": (2, {"tp": 2, "etp": 2}),
    }
    for name, (processes, layout) in places.items():
        (spread.directory / "iter_0000004").rename(tmp_path / f"set_aside_{name}")
        further = run(pool, tmp_path / "unused", start, processes, **layout, resume_from_checkpoint=str(spread.directory))
        assert further.directory == spread.directory
        same(further, plain)


def test_ways_to_run_do_not_change_losses(start: tuple[str, str], pool: RankPool, tmp_path: Path) -> None:
    """Packed rows, reduction beside the backward pass, recomputed layers, context parallelism."""
    plain = run(pool, tmp_path / "plain", start, 1)
    for name, layout in {
        "overlap": dict(ep=2, overlap_grad_reduce=True, overlap_param_gather=True),
        "recompute": dict(ep=2, gradient_checkpointing=True),
        "cp2": dict(ep=2, cp=2),
        "tp2": dict(tp=2, ep=2),
    }.items():  # fmt: skip
        same(run(pool, tmp_path / name, start, 2, **layout), plain)
    packed = dict(packing=True, max_length=48, max_steps=2, save_steps=2, eval_steps=2)
    one = run(pool, tmp_path / "packed", start, 1, **packed)
    same(run(pool, tmp_path / "packed_ep2", start, 2, ep=2, **packed), one)


def test_bf16_trains(start: tuple[str, str], pool: RankPool, tmp_path: Path) -> None:
    """As near to fp32 as bf16 is, with all of its roundings in other places at ep 2."""
    plain = run(pool, tmp_path / "plain", start, 1)
    for name, processes, layout in (("one", 1, {}), ("ep2", 2, {"ep": 2})):
        rounded = run(pool, tmp_path / name, start, processes, dtype="bf16", **layout)
        assert rounded.losses == pytest.approx(plain.losses, abs=0.03)


def test_a_run_is_exported_and_proven(pool: RankPool, tmp_path: Path) -> None:
    """What ep 2 trained, as a Hugging Face folder that transformers loads, with what it gives there."""
    start = str(tiny_start(tmp_path, "qwen3_moe")), str(write_rows(tmp_path / "rows.jsonl"))
    trained = run(pool, tmp_path / "run", start, 2, ep=2)
    folder = export_main(ExportArguments(ckpt_dir=str(trained.directory), to_hf=True, hf_output_dir=str(tmp_path / "hf_out")))
    source, config = HFCheckpoint.open(folder), load_config(folder)
    for planned in planned_hf_tensors(Reader(trained.directory / "iter_0000004"), config, Precisions(torch.float32)):
        assert torch.equal(planned.produce(), source.tensor(planned.name))


def test_the_bias_of_routers_stays(pool: RankPool, tmp_path: Path) -> None:
    """No update, no rounding: trained in bf16 at ep 2, gone on with at tp 2, exported, it is the source's, bit for bit, in fp32."""
    start = str(tiny_start(tmp_path, "dots1")), str(write_rows(tmp_path / "rows.jsonl"))
    spread = run(pool, tmp_path / "run", start, 2, ep=2, dtype="bf16", max_steps=2)
    run(pool, tmp_path / "unused", start, 2, tp=2, resume_from_checkpoint=str(spread.directory))
    words = dict(ckpt_dir=str(spread.directory), to_hf=True, verify=False, hf_output_dir=str(tmp_path / "hf_out"))
    folder, source = HFCheckpoint.open(export_main(ExportArguments(**words))), HFCheckpoint.open(tmp_path / "hf")
    names = [name for name in source.names if name.endswith("correction_bias")]
    assert len(names) == 3
    for name in names:
        assert folder.tensor(name).dtype == torch.float32 and torch.equal(folder.tensor(name), source.tensor(name)), name
    assert folder.dtype("model.layers.1.mlp.experts.0.up_proj.weight") == torch.bfloat16


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "experts": (dict(ep=3), "--ep 3 does not divide the 8 experts"),
    "rows": (dict(etp=5), "--etp 5 does not divide the 24 rows"),
    "processes": (dict(ep=4), "2 processes cannot hold the experts at pp 1 x ep 4 x etp 1: 4 are needed"),
    "fp8": (dict(fp8=True, dtype="bf16"), "--fp8"),
    "fp16": (dict(dtype="fp16"), "fp16 does not work with experts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_told_before_a_rank_starts(name: str, pool: RankPool, tmp_path: Path) -> None:
    start = str(tiny_start(tmp_path, "qwen3_moe")), str(write_rows(tmp_path / "rows.jsonl"))
    options, words = WRONG[name]
    with pytest.raises(UserError) as caught:
        run(pool, tmp_path / "out", start, 2, **options)
    assert words in caught.value.what and caught.value.fix


def test_what_a_gpu_could_do_but_not_with_experts() -> None:
    config = tiny.tiny_config("qwen3_moe")
    with pytest.raises(UserError, match="does not work with experts"):
        resolved_run(config=config, dtype="bf16", world_size=1, on_gpu=True, cpu_offloading_num_layers=1)
    with pytest.raises(UserError, match="--cuda_graphs true does not work with --ep above 1"):
        resolved_run(config=config, dtype="bf16", world_size=2, on_gpu=True, cuda_graphs="true", ep=2)


def test_a_model_without_experts_has_nothing_to_spread() -> None:
    for options in ({"ep": 2}, {"etp": 2}):
        with pytest.raises(UserError, match="has none"):
            resolved_run(**options)


@pytest.mark.parametrize("name", ["one", "ep2", "tp2, etp2", "pp2, ep2", "tp2, ep2, sp"])
def test_the_estimate_is_what_ranks_hold(name: str, tiny_folders: Any, pool: RankPool) -> None:
    """Weights and gradients of the fullest rank; the optimizer's part, over all ranks, is that of every weight once."""
    folder, release = tiny_folders("qwen2_moe", tie_word_embeddings=False, vocab_size=128)
    held = max(pool.run(LAYOUTS[name].get("world", 1), weights_held, str(folder), str(release), LAYOUTS[name]))
    config = load_config(folder)
    found = estimate(run_of(LAYOUTS[name]), config)
    # Norms and routers, which every tensor-parallel rank holds whole, are counted as if they were split.
    assert found.device["weights"] == found.device["gradients"] == pytest.approx(4 * held, rel=0.02)
    if LAYOUTS[name].get("pp", 1) == 1:
        assert found.device["optimizer"] * LAYOUTS[name].get("world", 1) == pytest.approx(8 * parameter_count(config), rel=0.1)


def weights_held(folder: str, release: str, layout: dict[str, int]) -> int:
    """On one rank: parameters that it has."""
    with join(layout):
        return sum(parameter.numel() for parameter in built(folder, release, layout).parameters())


def test_the_options_of_routers_need_experts(pool: RankPool, tmp_path: Path) -> None:
    start = str(tiny_start(tmp_path, "llama")), str(write_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="are about routers of experts"):
        run(pool, tmp_path / "out", start, 1, moe_aux_loss_coeff=0.1)


def counted_by_transformers(folder: Path, trained: Trained) -> list[list[int]]:
    """Choices of each layer's experts on the validation rows of a run, by the routers of transformers."""
    from transformers import AutoModelForCausalLM

    from megaswift.data.store import TokenRows

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    val = Run.read(trained.directory / "run.json").data.val
    assert val is not None
    data = TokenRows.open(val)
    loads: list[torch.Tensor] = []
    for number in range(len(data)):
        for sample in data.samples(number):
            tokens = torch.from_numpy(sample.ids.astype("int64"))[None]
            found = model(tokens, output_router_logits=True, use_cache=False).router_logits
            chosen = [layer.topk(model.config.num_experts_per_tok, -1).indices.flatten() for layer in found]
            counts = [torch.bincount(one, minlength=model.config.num_experts) for one in chosen]
            loads = counts if not loads else [a + b for a, b in zip(loads, counts)]
    return [load.tolist() for load in loads]


def test_the_health_of_experts(pool: RankPool, tmp_path: Path) -> None:
    """The load of every expert, as transformers counts it, the same at every layout; padding does not count."""
    start = str(tiny_start(tmp_path, "qwen3_moe")), str(write_rows(tmp_path / "rows.jsonl"))
    losses: dict[str, Any] = {"moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.001}
    padded: dict[str, Any] = {
        "padding_free": False,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    }
    found = {}
    for name, processes, layout in (
        ("one", 1, losses),
        ("ep2", 2, {"ep": 2, **losses}),
        ("tp2", 2, {"tp": 2, **losses}),
        ("cp2", 2, {"cp": 2, "ep": 2, **losses}),
        ("pp2", 4, {"pp": 2, "tp": 2, "sequence_parallel": True, "ep": 2, **losses}),
        ("plain", 1, {}),
        ("padded", 1, padded),  # micro batches are others, and so are losses of a micro batch's routers: without them
    ):
        made = run(pool, tmp_path / name, start, processes, **layout)
        found[name] = json.loads((made.directory / "experts.json").read_text(encoding="utf-8"))
        page = (made.directory / "experts.html").read_text(encoding="utf-8")
        assert "before training" in page and "<svg" in page
        assert ("balancing loss" in line(summary(found[name]["window"]))) == ("moe_aux_loss_coeff" in layout)
        rows = [row for row in made.rows if "expert_busiest" in row]
        assert len(rows) == STEPS and all(row["router_entropy"] <= 1 and 0 < row.get("aux_loss", 1) < 10 for row in rows)
        if name == "one":
            assert [layer["load"] for layer in found["one"]["before"]] == counted_by_transformers(tmp_path / "hf", made)
    for name, other in found.items():
        one = found["plain" if name == "padded" else "one"]
        assert [layer["load"] for layer in other["before"]] == [layer["load"] for layer in one["before"]], name
        for mine, layer in zip(other["window"], one["window"], strict=True):
            assert mine["tokens"] == layer["tokens"] and sum(mine["load"]) == 2 * mine["tokens"]
            if name != "plain":  # a near tie may fall to the other side
                assert sum(abs(a - b) for a, b in zip(mine["load"], layer["load"])) <= 4, name
                assert mine["drift"] == pytest.approx(layer["drift"], rel=0.01) and mine["drift"] > 0
                assert mine["router_entropy"] == pytest.approx(layer["router_entropy"], rel=1e-3)
            if "aux_loss" in layer and name != "plain":
                assert mine["aux_loss"] == pytest.approx(layer["aux_loss"], rel=1e-2)
                assert mine["z_loss"] == pytest.approx(layer["z_loss"], rel=1e-3)


def test_an_idle_expert_is_counted() -> None:
    layer = {"layer": 3, "tokens": 10, "load": [20, 0, 0, 0], "router_entropy": 0.5, "drift": 0.01}
    row = summary([layer])
    assert (row["expert_busiest"], row["expert_busiest_layer"], row["experts_idle"], row["expert_load_entropy"]) == (
        4.0,
        3,
        3,
        0.0,
    )
    assert "busiest 4.0 x the mean (layer 3), 3 idle" in line(row) and line({}) == "experts: nothing was routed"
