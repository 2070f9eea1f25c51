"""Layers that predict further ahead: carried along to the bit, and how often they guess the model's own token."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.ranks import RankPool
from tests.training import train, write_rows

from megaswift.commands.export import export_main
from megaswift.commands.verify import print_guesses, verify_main
from megaswift.config.options import ExportArguments, VerifyArguments
from megaswift.errors import UserError
from megaswift.models import family_of
from megaswift.models.whole import decoder_of, whole_of
from megaswift.proof.ahead import guesses_of, measure
from megaswift.proof.prompts import token_rows
from megaswift.store.manifest import read_manifest
from megaswift.weights.carried import carried_names
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint

# What a family's layer is called in its folder, and fields that its config has then.
AFTER = {"num_nextn_predict_layers": 1}
NAMES: dict[str, dict[str, Any]] = {"deepseek_v3": AFTER, "glm4_moe": AFTER, "qwen3_next": {}, "qwen3_5": {}, "qwen3_5_moe": {}}
DEEPSEEK = {"joint": "eh_proj.weight", "token": "enorm.weight", "state": "hnorm.weight", "last": "shared_head.norm.weight"}
QWEN = {
    "joint": "fc.weight",
    "token": "pre_fc_norm_embedding.weight",
    "state": "pre_fc_norm_hidden.weight",
    "last": "norm.weight",
}


def with_a_layer_ahead(root: Path, name: str, **changes: Any) -> Path:
    """A tiny model whose folder holds one more layer: the last one that attends, and with experts, of a model of other values."""
    tiny.save_tiny(root, name, **NAMES[name], vocab_size=300, eos_token_id=1, **changes)
    tiny.write_tokenizer(root)
    other = root.parent / f"{root.name}-other"
    tiny.save_tiny(other, name, seed=3, **NAMES[name], vocab_size=300, eos_token_id=1, **changes)
    config = load_config(root)
    kinds = family_of(config.model_type).layers(config)
    experts = any(kind.experts for kind in kinds)
    number = max(n for n, kind in enumerate(kinds) if kind.delta is None and (kind.experts is not None) == experts)
    held, more = load_file(root / "model.safetensors"), load_file(other / "model.safetensors")
    prefix = "model.language_model.layers." if whole_of(config) is not None else "model.layers."
    layer, parts, place = ("model.layers.4.", DEEPSEEK, "model.layers.4.") if NAMES[name] else ("mtp.layers.0.", QWEN, "mtp.")
    for key, value in more.items():
        if key.startswith(f"{prefix}{number}."):
            held[layer + key.removeprefix(f"{prefix}{number}.")] = value
    hidden, random = config.hidden_size, torch.Generator().manual_seed(5)
    held[place + parts["joint"]] = torch.randn(hidden, 2 * hidden, generator=random) * 0.1
    for part in ("token", "state", "last"):
        held[place + parts[part]] = torch.rand(hidden, generator=random) + 0.5
    save_file(held, root / "model.safetensors", metadata={"format": "pt"})
    return root


def by_hand(root: Path, name: str) -> tuple[int, int]:
    """(guesses, right ones), text by text, out of transformers' model and its own class of a layer."""
    config, held = load_config(root), load_file(root / "model.safetensors")
    model = tiny.loaded(root)
    decoder = decoder_of(model)
    layer, parts, place = ("model.layers.4.", DEEPSEEK, "model.layers.4.") if NAMES[name] else ("mtp.layers.0.", QWEN, "mtp.")
    kinds = family_of(config.model_type).layers(config)
    experts = any(kind.experts for kind in kinds)
    number = max(n for n, kind in enumerate(kinds) if kind.delta is None and (kind.experts is not None) == experts)
    block = copy.deepcopy(decoder.layers[number])
    state = dict(block.state_dict())
    for key in state:  # experts are apart in the folder
        kind, _, leaf = key.rpartition(".")
        if leaf == "gate_up_proj" and kind.endswith("experts"):
            each = [
                torch.cat([held[f"{layer}{kind}.{e}.{one}_proj.weight"] for one in ("gate", "up")])
                for e in range(len(state[key]))
            ]
            state[key] = torch.stack(each)
        elif leaf == "down_proj" and kind.endswith("experts"):
            state[key] = torch.stack([held[f"{layer}{kind}.{e}.down_proj.weight"] for e in range(len(state[key]))])
        else:
            state[key] = held[layer + key]
    block.load_state_dict(state)
    if hasattr(block.self_attn, "layer_idx"):
        block.self_attn.layer_idx = 0
    norms = {}
    for part in ("token", "state", "last"):
        norms[part] = copy.deepcopy(decoder.norm)
        norms[part].weight.data.copy_(held[place + parts[part]])
    count = right = 0
    for row in token_rows(root, config.vocab_size, 256).values():
        ids = torch.tensor([row])
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            own, states = out.logits[0].argmax(-1), out.hidden_states[-1][:, :-1]
            if states.shape[1] == 0:
                continue
            embedded = model.get_input_embeddings()(ids[:, 1:])
            x = torch.cat([norms["token"](embedded), norms["state"](states)], -1) @ held[place + parts["joint"]].T
            positions = torch.arange(x.shape[1])[None]
            angles = decoder.rotary_emb(x, positions if whole_of(config) is None else positions[None].expand(3, 1, -1))
            mask = torch.full((x.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
            y = block(x, attention_mask=mask, position_ids=positions, position_embeddings=angles)
            y = y[0] if isinstance(y, tuple) else y
            guessed = model.lm_head(norms["last"](y))[0].argmax(-1)
        count, right = count + len(guessed), right + int((guessed == own[1:]).sum())
    return count, right


ALIKE = ("glm4_moe", "qwen3_5_moe")  # others show the same by default


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALIKE or "MEGASWIFT_FAMILIES" in os.environ])
def test_guesses_are_those_of_the_layer_by_hand(name: str, tmp_path: Path) -> None:
    root = with_a_layer_ahead(tmp_path / "hf", name)
    found = measure(root)
    assert (found.tokens, found.right) == by_hand(root, name) and found.tokens > 300


def test_a_layer_that_copies_guesses_nothing_and_one_that_repeats_the_model_does(tmp_path: Path) -> None:
    """Joined so that the token between is all there is, the layer's states are those of a model whose layers it has: here of none."""
    root = with_a_layer_ahead(tmp_path / "hf", "qwen3_next", layer_types=["full_attention"] * 4)
    held = load_file(root / "model.safetensors")
    for name in held:
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):  # no layer adds anything
            held[name].zero_()
    hidden = held["mtp.fc.weight"].shape[0]
    held["mtp.fc.weight"] = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], 1)
    for name in ("mtp.pre_fc_norm_embedding.weight", "mtp.norm.weight", "model.norm.weight"):
        held[name].zero_()  # stored minus one
    save_file(held, root / "model.safetensors", metadata={"format": "pt"})
    found = measure(root)
    assert found.share > 0.999  # norms of what is normed already
    held["mtp.fc.weight"] = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1)
    save_file(held, root / "model.safetensors", metadata={"format": "pt"})
    assert measure(root).share < 0.5  # it knows the state alone, which is that of the token before


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_guesses_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of its own model of such layers, which its later versions have for families whose configs count them."""
    layers: Any = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has none")
    root = with_a_layer_ahead(tmp_path / "hf", name)
    model = tiny.loaded(root)
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4.*"]  # it knows the numbers of published models
    from transformers.cache_utils import MtpCache

    ahead = layers.MtpModel.from_pretrained(model)
    text = {"one": "def merge(left, right): return left + right"}
    guessed, own, (length,) = guesses_of(root, text)
    ids = torch.tensor([token_rows(root, 300, 256, text)["one"]])
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        assert torch.equal(out.logits[0].argmax(-1), own)
        for last in range(1, length):
            cache = MtpCache(config=model.config.get_mtp_config())
            states, positions = out.hidden_states[-1][:, :last], torch.arange(1, last + 1)[None]
            found, _, _ = ahead(ids[:, 1 : last + 1], states, None, positions, cache)
            assert int(found) == int(guessed[last - 1]), last


def test_the_layer_is_carried_through_training_and_measured(pool: RankPool, tmp_path: Path, capsys: Any) -> None:
    source, rows = with_a_layer_ahead(tmp_path / "hf", "deepseek_v3"), write_rows(tmp_path / "rows.jsonl")
    words = dict(model_type="tiny-ahead", to_megatron=True, verify=False)
    start = export_main(ExportArguments(model_id_or_path=str(source), megatron_output_dir=str(tmp_path / "start"), **words))
    run = train(
        pool, tmp_path / "out", 2, resume_from_checkpoint=str(start), max_steps=2, dataset=[str(rows)], tp=2, batch_size=2
    )
    out = export_main(
        ExportArguments(ckpt_dir=str(run.directory), to_hf=True, hf_output_dir=str(tmp_path / "made"), verify=False)
    )
    before, after = HFCheckpoint.open(source), HFCheckpoint.open(out)
    carried = carried_names(before, load_config(source))
    assert set(before.names) == set(after.names) and len(carried) > 10
    assert [name for name in before.names if torch.equal(before.tensor(name), after.tensor(name))] == [
        name for name in before.names if name in carried or name.endswith("correction_bias")
    ]
    assert set(read_manifest(out)["carried"]["tensors"]) == set(carried)
    capsys.readouterr()
    verify_main(VerifyArguments(directory=str(out), mtp=True))
    said = " ".join(capsys.readouterr().out.split())
    assert "before: " in said and "after: " in said and "not trained" in said
    (tmp_path / "prompts.txt").write_text("who are you\n\nwhat is this\n")
    found = print_guesses(out, str(tmp_path / "prompts.txt"))
    assert set(found) == {"before", "after"} and 0 < found["after"].tokens < 30


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    tiny.save_tiny(tmp_path / "llama", "llama")
    tiny.save_tiny(tmp_path / "qwen", "qwen3_next")
    for place, words in (
        ("llama", "have no layers that predict ahead"),
        ("qwen", "in a form that is known"),
        ("none", "Hugging Face folders"),
    ):
        with pytest.raises(UserError, match=words):
            print_guesses(tmp_path / place, None)
    with pytest.raises(UserError, match="for --mtp true"):
        verify_main(VerifyArguments(directory=str(tmp_path), mtp_prompts="x.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no prompt"):
        print_guesses(tmp_path / "qwen", str(tmp_path / "empty.txt"))
