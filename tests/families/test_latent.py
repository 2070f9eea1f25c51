"""Latent attention: the shapes that published models have, beside transformers; layers that predict ahead; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.engine.test_experts import LENGTH, logits_at, rows
from tests.ranks import RankPool

from megaswift.errors import DataError
from megaswift.megatron.layer_specs import SequenceLayout
from megaswift.megatron.model import build
from megaswift.models import family_of, parameters_of
from megaswift.models.prediction import layers_ahead, notes_on_carried, without_layers_ahead
from megaswift.proof.streams import one_process
from megaswift.run.spec import Parallel, Precision
from megaswift.weights.hf.config import check_source, load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.load_hf import load_hf_weights

PLAIN = {"rope_type": "default", "rope_theta": 50000.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Moonlight": ("deepseek_v3", {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "n_shared_experts": 2, "rope_parameters": PLAIN,
    }),
    "Kimi K2": ("deepseek_v3", {
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 50000.0, "factor": 32.0, "original_max_position_embeddings": 64, "mscale": 1.0,
            "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0,
        },
    }),
    "V2": ("deepseek_v2", {"q_lora_rank": 24, "v_head_dim": 16}),
    "V2 Lite": ("deepseek_v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    "rotation by halves": ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False, "v_head_dim": 24}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_published_shapes(shape: str, pool: RankPool, tmp_path: Path) -> None:
    """With norms of narrow states by 1e-6, whatever the config says of the others."""
    name, changes = SHAPES[shape]
    model = tiny.save_tiny(tmp_path / "hf", name, **changes)
    release = tiny.to_megatron(tmp_path / "hf", tmp_path / "release")
    with torch.no_grad():
        wanted = model(rows(model.config.vocab_size)[0], use_cache=False).logits
    ((_, found),) = pool.run(1, logits_at, str(tmp_path / "hf"), str(release), {})
    assert found.shape[1] == LENGTH and (found[..., : model.config.vocab_size] - wanted).abs().max() < 5e-6


def test_samples_stay_apart_in_every_way_through(tmp_path: Path) -> None:
    """By their lengths, by where they begin alone (as CUDA graphs know them), and by the kernels that a user names."""
    tiny.save_tiny(tmp_path, "deepseek_v3")
    hidden, lengths = torch.randn(20, 1, 64), [7, 12, 1]
    borders = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    found = []
    with one_process():
        for precision in (Precision(), Precision(attention="plain"), Precision(deterministic=True)):
            model = build(load_config(tmp_path), Parallel(), precision)
            load_hf_weights(model, tmp_path)
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            tables = {"main": model.ropes["main"](positions, torch.float32)}
            layout = SequenceLayout(tables=tables, seq_lens=lengths)
            layout.cu_seqlens_q, layout.max_seqlen_q = borders, max(lengths)
            attention = model.decoder.layers[0].self_attention
            found.append(attention(hidden, packed_seq_params=layout)[0])
            if len(found) == 1:
                graphs = replace(layout, seq_lens=None, cu_seqlens_q=borders, max_seqlen_q=max(lengths))
                found.append(attention(hidden, packed_seq_params=graphs)[0])
                starts = [0, 7, 19]
                for start, length in zip(starts, lengths):  # each by itself, as a whole row
                    own = SequenceLayout(tables={"main": model.ropes["main"](torch.arange(length)[None], torch.float32)})
                    alone = attention(hidden[start : start + length], packed_seq_params=own)[0]
                    assert (alone - found[0][start : start + length]).abs().max() < 1e-5
    assert all((one - found[0]).abs().max() < 1e-5 for one in found)


def test_norms_of_narrow_states(tmp_path: Path) -> None:
    """They add 1e-6 to a variance, whatever rms_norm_eps says: where states are small it is most of it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny.tiny_config("deepseek_v3", rms_norm_eps=1e-5))
    attention = model.model.layers[0].self_attn
    latent = family_of("deepseek_v3").layers(model.config)[0].latent
    assert latent is not None
    assert {attention.q_a_layernorm.variance_epsilon, attention.kv_a_layernorm.variance_epsilon} == {latent.epsilon} == {1e-6}


def test_groups_count_by_their_two_best(pool: RankPool) -> None:
    """Two groups of four experts: the one whose two best are better wins, though all four of the other are together."""
    assert pool.run(1, chosen_of_groups) == [([4, 5], [0, 1])]


def chosen_of_groups() -> tuple[list[int], list[int]]:
    """On one rank: the experts that a token goes to by the two best of each group, and by the best."""
    from types import SimpleNamespace

    from megaswift.megatron.router import Router
    from megaswift.models.kinds import Experts

    config: Any = SimpleNamespace(
        routing_dtype=torch.float32, num_moe_experts=None, moe_z_loss_coeff=None, use_cpu_initialization=True, hidden_size=1,
        params_dtype=torch.float32, sequence_parallel=False,
    )  # fmt: skip
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.8, 0.7, 0.1, 0.1]])
    found = []
    for group_score in ("two best", "best"):
        router = Router(config, Experts(8, 2, 4, score="sigmoid", groups=2, kept=1, group_score=group_score))
        found.append(sorted(router._chosen(scores)[0].tolist()))
    return found[0], found[1]


def test_a_sum_of_weights_has_a_least_value(pool: RankPool, tmp_path: Path) -> None:
    """ERNIE's moe_norm_min: raised above what the weights sum up to, it is what they are divided by."""
    changes = {"moe_norm_min": 0.8}
    model = tiny.save_tiny(tmp_path / "hf", "ernie4_5_moe", **changes)
    release = tiny.to_megatron(tmp_path / "hf", tmp_path / "release")
    with torch.no_grad():
        wanted = model(rows(model.config.vocab_size)[0], use_cache=False).logits
    ((_, found),) = pool.run(1, logits_at, str(tmp_path / "hf"), str(release), {})
    assert (found[..., : model.config.vocab_size] - wanted).abs().max() < 5e-6


def with_layers_ahead(folder: Path, name: str, **changes: Any) -> None:
    """A folder that holds one layer more than its model, as published ones do."""
    tiny.save_tiny(folder, name, **changes)
    path = folder / "model.safetensors"
    held = load_file(path)
    more = {
        f"model.layers.4.{end}": torch.ones(3)
        for end in ("enorm.weight", "mlp.experts.0.up_proj.weight", "shared_head.head.weight")
    }
    save_file(held | more, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_ahead_are_told_and_nothing_else_passes(name: str, tmp_path: Path) -> None:
    with_layers_ahead(tmp_path, name, num_nextn_predict_layers=1)
    config = load_config(tmp_path)
    check_source(HFCheckpoint.open(tmp_path), config)
    assert (
        layers_ahead(config) == ("model.layers.4.*",)
        and "model.layers.4.* (multi-token" in notes_on_carried(["model.layers.4.enorm.weight"], config)[0]
    )
    assert without_layers_ahead(["model.layers.4.enorm.weight", "model.layers.40.x"], config) == ["model.layers.40.x"]
    assert not any(
        ".4." in part.name and part.name.startswith("model.layers.4") for one in parameters_of(config) for part in one.hf
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 0}))
    config = load_config(tmp_path)
    assert notes_on_carried([], config) == [] and family_of("llama").ahead(config) == ()
    with pytest.raises(DataError, match=r"model\.layers\.4\.enorm"):
        check_source(HFCheckpoint.open(tmp_path), config)
