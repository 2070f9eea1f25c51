"""The list of an adapter's parameters: names, shapes and keys that PEFT and checkpoints have, and which modules words mean."""

from __future__ import annotations

import math

import pytest
import torch

from megaswift.config.options import SftArguments, parse
from megaswift.errors import UserError
from megaswift.models import family_of
from megaswift.models.adapters import Lora, saved_modules, shortened, target_modules
from megaswift.models.whole import whole_of
from megaswift.run.method import adapter_of, with_method_defaults
from megaswift.train.adapters import first_value
from tests import tiny


def described(name: str = "qwen2", words: tuple[str, ...] = ("all-linear",), **changes: object) -> tuple[list, Lora]:
    config = tiny.tiny_config(name, tie_word_embeddings=False)
    base = family_of(config.model_type).parameters(config)
    lora = Lora(rank=4, alpha=8.0, dropout=0.0, targets=target_modules(base, words), **changes)  # type: ignore[arg-type]
    return lora.parameters(family_of(config.model_type), config), lora


@pytest.mark.parametrize("name", tiny.dense_families())
@pytest.mark.parametrize("dora", [False, True])
def test_names_and_shapes_are_those_of_peft(name: str, dora: bool) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = tiny.tiny_config(name, tie_word_embeddings=False)
    base = family_of(config.model_type).parameters(config)
    lora = Lora(4, 8.0, 0.0, target_modules(base, ["all-linear"]), dora=dora)
    words = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=dora)
    wanted = get_peft_model_state_dict(get_peft_model(tiny.tiny_model(name, tie_word_embeddings=False), words))
    if whole_of(config) is not None:  # what PEFT calls all layers are those of the tower, too
        wanted = {key: value for key, value in wanted.items() if ".language_model." in key}
    listed = {part.name: part.shape for p in lora.parameters(family_of(config.model_type), config) for part in p.hf}
    assert listed == {key: tuple(value.shape) for key, value in wanted.items()}


def test_layers_that_are_alike_share_a_key() -> None:
    parameters, _ = described()
    assert {p.key for p in parameters} == {
        f"decoder.layers.{module}.lora_{half}" for half in "AB"
        for module in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    }  # fmt: skip
    fused = next(p for p in parameters if p.name == "decoder.layers.2.self_attention.linear_qkv.lora_A")
    assert fused.place == (2,) and fused.counts == (4,) and fused.shape[0] == 12 and fused.arrangement.split is None
    mixed, _ = described(words=(r"model\.layers\.[01]\..*", "down_proj"))
    assert all(p.key == p.name and p.place == () for p in mixed)
    assert len({p.key for p in mixed}) == len(mixed) == 2 * (2 * 4 + 2)
    some, _ = described(words=(r"model\.layers\.[01]\..*",))
    assert all(p.key == p.name and p.place == () for p in some), "the layers that have any are alike, but others have none"


def test_words_of_targets() -> None:
    config = tiny.tiny_config("qwen3", tie_word_embeddings=False)
    base = family_of(config.model_type).parameters(config)
    assert len(target_modules(base, ["all-linear"])) == 28
    assert target_modules(base, ["v_proj", "q_proj"]) == tuple(
        f"model.layers.{i}.self_attn.{n}_proj" for i in range(4) for n in "qv"
    )
    assert target_modules(base, [r".*layers\.3\.mlp\.(gate|up)_proj"]) == (
        "model.layers.3.mlp.gate_proj",
        "model.layers.3.mlp.up_proj",
    )
    assert target_modules(base, ["layers.1.mlp.down_proj"]) == ("model.layers.1.mlp.down_proj",)
    with pytest.raises(UserError, match="is an embedding"):
        target_modules(base, ["embed_tokens"])
    for word in ("q_prj", "lm_head", "norm", "layers", r".*\.norm"):
        with pytest.raises(UserError, match=r"names no linear layer inside the blocks.*\n?"):
            target_modules(base, [word])
    assert len(saved_modules(base, ["norm", "input_layernorm"], tied=False)) == 5
    with pytest.raises(UserError, match="names no norm"):
        saved_modules(base, ["q_proj"], tied=False)
    with pytest.raises(UserError, match="one matrix with the output layer"):
        saved_modules(base, ["embed_tokens"], tied=True)


def test_names_are_shortened_only_where_they_mean_the_same() -> None:
    known = ["a.0.q", "a.1.q", "a.0.k", "a.1.k", "a.norm", "a.0.q_norm"]
    assert shortened(["a.0.q", "a.1.q"], known) == ["q"]
    assert shortened(["a.1.q"], known) == ["a.1.q"]
    assert shortened(["a.norm"], known, "") == ["a.norm"], "PEFT would take q_norm as well"
    assert shortened(["a.norm"], known) == ["norm"]


def test_first_values() -> None:
    """Uniform within 1 / sqrt(in) or normal with 1 / r, another for each name and seed; B is zero."""
    lora = Lora(8, 16.0, 0.0, ())
    a = first_value("x.q_proj.lora_A.weight", (8, 400), lora, 1)
    bound = 1 / math.sqrt(400)
    assert float(a.abs().max()) <= bound and float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for other in (
        first_value("x.k_proj.lora_A.weight", (8, 400), lora, 1),
        first_value("x.q_proj.lora_A.weight", (8, 400), lora, 2),
    ):
        assert abs(float(torch.corrcoef(torch.stack((a.flatten(), other.flatten())))[0, 1])) < 0.1
    normal = first_value("x.q_proj.lora_A.weight", (8, 400), Lora(8, 16.0, 0.0, (), init="gaussian"), 1)
    assert float(normal.std()) == pytest.approx(1 / 8, rel=0.1)
    assert not first_value("x.q_proj.lora_B.weight", (400, 8), lora, 1).any()


def test_other_names_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(
        SftArguments, "--tuner_type lora --lora_target_modules q_proj v_proj --lora_dropout_p 0.1 --lorap_lr_ratio 8".split()
    )
    assert (args.sft_type, args.target_modules, args.lora_dropout, args.lora_plus_lr_ratio) == (
        "lora",
        ["q_proj", "v_proj"],
        0.1,
        8.0,
    )
    assert "--lora_dropout_p is --lora_dropout here" in capsys.readouterr().out


def test_options_of_adapters_mean_something_only_beside_one() -> None:
    """A run's own file of options, which has all of them, begins that run again; learning_rate has a default of its own."""
    assert with_method_defaults(SftArguments(**SftArguments().to_dict())).learning_rate == 1e-5
    assert with_method_defaults(SftArguments(sft_type="lora")).learning_rate == 1e-4
    assert with_method_defaults(SftArguments(sft_type="lora", learning_rate=3e-6)).learning_rate == 3e-6
    with pytest.raises(UserError, match="belongs to adapters"):
        with_method_defaults(SftArguments(lora_rank=16))
    with pytest.raises(UserError, match="for full training"):
        with_method_defaults(SftArguments(sft_type="lora", freeze_parameters=["model.norm"]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quantization_bit": 4, "tp": 2}, "blocks of 64 along a row"),
        ({"use_dora": True}, "twice the work"),
        ({"recompute_modules": "mlp"}, "not computed again"),
        ({"fp8": True}, "not proven"),
        ({"target_modules": []}, "no module is named"),
        ({"lora_rank": 0}, "not 1 or more"),
        ({"quantization_bit": 3}, "is not known"),
        ({"bnb_4bit_use_double_quant": True, "quantization_bit": 8}, "where weights are in 4"),
        ({"bnb_4bit_use_double_quant": True}, "where weights are in 4"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be(options: dict, text: str) -> None:
    with pytest.raises(UserError, match=text):
        adapter_of(SftArguments(sft_type="lora", **options), tiny.tiny_config("qwen2", tie_word_embeddings=True))
