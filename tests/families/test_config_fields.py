"""Fields of config.json: bookkeeping of any version of transformers passes, what changes the computation is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests import tiny

from megaswift.errors import UserError
from megaswift.models import families
from megaswift.models.family import Family
from megaswift.weights.hf.config import load_config

# What transformers 4.40 to 5.x writes beside the model's own fields, with values as they are found; and other tools' marks.
WRITTEN: dict[str, Any] = {
    "_attn_implementation_autoset": True, "_attn_implementation_internal": "sdpa", "_attn_was_changed": True,
    "_experts_implementation": "eager", "_experts_implementation_internal": "eager", "_flash_attn_2_enabled": True,
    "_pre_quantization_dtype": "bfloat16", "_commit_hash": "0123abcd", "_auto_class": "AutoModelForCausalLM",
    "_name_or_path": "Qwen/Qwen2-7B", "_configuration_file": "config.json", "attn_implementation": "flash_attention_2",
    "base_model_tp_plan": {"layers.*.self_attn.q_proj": "colwise"}, "base_model_pp_plan": {"norm": [["x"], ["x"]]},
    "distributed_config": {"enable_expert_parallel": False}, "compile_config": {"mode": "default"}, "cache_implementation": "static",
    "gradient_checkpointing": True, "torchscript": True, "use_bfloat16": True, "tf_legacy_loss": True,
    "return_dict_in_generate": True, "output_scores": True, "keys_to_ignore_at_inference": ["past_key_values"],
    "ignore_keys_at_rope_validation": ["mrope_section"], "custom_pipelines": {"x": {"impl": "x.X"}}, "auto_map": {"AutoConfig": "x.X"},
    "num_labels": 2, "classifier_dropout": 0.1, "prefix": "", "sep_token_id": 3, "decoder_start_token_id": 1, "is_decoder": True,
    "is_composition": True, "quantization_config": None, "pruned_heads": {}, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "is_causal": True, "logit_scale": None,
    "max_length": 4096, "min_length": 0, "do_sample": True, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "typical_p": 1.0, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None,
    "num_return_sequences": 1, "forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None, "finetuning_task": None,
    "task_specific_params": None, "problem_type": None, "tokenizer_class": None, "torch_dtype": "bfloat16",
    "transformers_version": "4.48.1", "max_sequence_length": 4096, "model_max_length": 4096, "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right", "pad_token": "<pad>", "model_name": "unsloth/x", "unsloth_version": "2025.1.1",
}  # fmt: skip

COMPUTED: dict[str, Any] = {
    "is_causal": False, "per_layer_config": {"0": {"num_attention_heads": 2}}, "attention_chunk_size": 16, "logit_scale": 2.0,
    "layer_types": ["full_attention"] * 3 + ["chunked_attention"], "pruned_heads": {"0": [1]}, "hidden_dropout": 0.1,
    "residual_multiplier": 0.5, "embedding_multiplier": 12.0, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
    "query_pre_attn_scalar": 256, "no_rope_layers": [1, 0, 1, 0], "num_nextn_predict_layers": 1, "num_experts": 8,
    "transformers_weights": "other.safetensors", "use_qk_norm": True, "use_bidirectional_attention": True, "partial_rotary_factor": 0.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "hidden_act": "gelu",
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


def with_fields(target: Path, name: str, **fields: Any) -> Path:
    tiny.tiny_config(name).save_pretrained(target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return target


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_bookkeeping_passes(name: str, tmp_path: Path) -> None:
    plain = load_config(with_fields(tmp_path / "plain", name))
    honoured = _family(name).extra_fields
    config = load_config(with_fields(tmp_path / "written", name, **{k: v for k, v in WRITTEN.items() if k not in honoured}))
    for field in ("hidden_size", "num_hidden_layers", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "vocab_size"):
        assert getattr(config, field, None) == getattr(plain, field, None)


def _family(name: str) -> Family:
    return next(family for family in families().values() if family.name == name)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_what_changes_the_computation_is_refused_by_name(name: str, tmp_path: Path) -> None:
    family = _family(name)
    honoured = family.extra_fields | {"hidden_act"} - {family.activation_field}
    honoured |= {"partial_rotary_factor", "rope_parameters"} if family.partial_rotary else set()
    for number, (field, value) in enumerate(COMPUTED.items()):
        if field in honoured:
            continue
        folder = with_fields(tmp_path / str(number), name, **{field: value})
        with pytest.raises(UserError) as caught:
            load_config(folder)
        assert field in f"{caught.value.what} {caught.value.where}", field


@pytest.mark.parametrize("value", [[1, 0, 1], [1, 0, 2, 1]])
def test_layers_that_rotate_are_told_one_by_one(value: list[int], tmp_path: Path) -> None:
    """With layer_types given transformers itself looks no further."""
    kinds = ["full_attention"] * 4
    assert load_config(with_fields(tmp_path / "good", "smollm3", no_rope_layers=[0, 1, 1, 0, 1], layer_types=kinds))
    with pytest.raises(UserError, match="no_rope_layers"):
        load_config(with_fields(tmp_path / "bad", "smollm3", no_rope_layers=value, layer_types=kinds))


def test_a_null_quantization_loads_in_transformers_too(tmp_path: Path) -> None:
    """What is trained from such a folder has its config byte for byte."""
    from transformers import AutoModelForCausalLM

    tiny.save_tiny(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    load_config(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
