"""Families beyond the core: the round trip bit for bit, and a training step at two layouts; the others are for `make test-families`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.engine.test_packed import LAYOUTS
from tests.ranks import RankPool
from tests.steps import Steps

from megaswift.errors import MegaswiftError
from megaswift.inference.loading import load_model
from megaswift.models import family_of
from megaswift.weights.carried import carried_names, open_beside
from megaswift.weights.convert import Precisions, planned_hf_tensors
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader

BOTH = ("tp2", "tp2, sequence parallel")


@pytest.mark.parametrize("name", tiny.OTHERS)
def test_round_trip_and_a_step(name: str, pool: RankPool, tmp_path: Path) -> None:
    """Tied weights on two stages, packed rows; and two tensor-parallel ranks, padded ones.

    Gradients of norms of each head are a trap without sequence parallelism, those of all other norms with it; latent attention,
    and biases of experts and routers, have traps of both.
    """
    steps = Steps(tmp_path, name, samples=16, tie_word_embeddings=True)
    source, reader = HFCheckpoint.open(tmp_path / "hf"), Reader(tmp_path / "start" / "release")
    back = {planned.name: planned.produce() for planned in planned_hf_tensors(reader, steps.config, Precisions(torch.float32))}
    carried = carried_names(source, steps.config)
    assert set(back) | set(carried) == set(source.names) and bool(carried) == (family_of(name).whole is not None)
    beside = open_beside(tmp_path / "start" / "release")
    back |= {key: beside.tensor(key) for key in beside.names}
    assert set(back) == set(source.names) and all(torch.equal(back[key], source.tensor(key)) for key in back)
    steps.check(pool, "pp2", LAYOUTS["pp2"], ["packed"])
    kinds = family_of(steps.config.model_type).layers(steps.config)
    heads = any(kind.qk_norm_rotated or kind.qk_norm for kind in kinds)
    both = any(kind.latent is not None or (kind.experts is not None and kind.experts.biases) for kind in kinds)
    for layout in BOTH if both else ("tp2" if heads else "tp2, sequence parallel",):
        steps.check(pool, layout, LAYOUTS[layout], ["padded"])


def test_transformers_does_not_drop_caps_of_scores(tmp_path: Path) -> None:
    """Its SDPA attention does: answers, and the reference of a comparison, would come from another model."""
    wanted = tiny.save_tiny(tmp_path, "gemma2")
    tokens = torch.arange(20)[None]
    assert torch.equal(load_model(tmp_path, "fp32")(tokens).logits, wanted(tokens).logits)
    config = load_config(tmp_path)
    assert family_of("gemma2").loading(config) == {"attn_implementation": "eager"}
    assert family_of("llama").loading(tiny.tiny_config("llama")) == {}


def test_windows_of_old_configs(tmp_path: Path) -> None:
    """Configs of before transformers 5 name a pattern in place of layer_types, and the window's base in a field of its own."""
    tiny.tiny_config("gemma3_text").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name in ("layer_types", "rope_parameters"):
        del values[name]
    old = {
        "sliding_window_pattern": 2,
        "rope_theta": 5e5,
        "rope_local_base_freq": 77.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    path.write_text(json.dumps(values | old))
    config = load_config(tmp_path)
    assert [kind.window for kind in family_of("gemma3_text").layers(config)] == [9, None, 9, None]
    assert [kind.rotation for kind in family_of("gemma3_text").layers(config)] == ["sliding_attention", "full_attention"] * 2
    theta = {name: entry["rope_theta"] for name, entry in config.rope_parameters.items()}
    assert (
        theta == {"sliding_attention": 77.0, "full_attention": 5e5}
        and config.rope_parameters["full_attention"]["factor"] == 8.0
    )


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("arcee", {"hidden_act": "silu"}, "hidden_act"),
        ("arcee", {"mlp_bias": True}, "mlp_bias"),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias"),
        ("ernie4_5_moe", {"moe_gate": "top2_fused"}, "moe_gate"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 2, 1, 2]}, "moe_topk"),
        ("hunyuan_v1_moe", {"use_cla": True}, "use_cla"),
        ("hunyuan_v1_moe", {"num_shared_expert": [2, 2, 2, 2]}, "num_shared_expert"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1, 1]}, "attn_type_list"),
        ("minimax_m2", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ("deepseek_v3", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("deepseek_v3", {"v_head_dim": 32}, "v_head_dim"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
        ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "llama_4_scaling_beta"),
        ("phi3", {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope"),
    ],
)  # fmt: skip
def test_fields_that_no_layer_has_are_refused(name: str, changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    tiny.tiny_config(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(MegaswiftError) as caught:
        load_config(tmp_path)
    assert field in f"{caught.value.what} {caught.value.where}"
