"""`swift experts`: loads are those that transformers' routers give, of one model and of two side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.commands.experts import JSON, PAGE, experts_main
from megaswift.data.store import TokenRows
from megaswift.errors import UserError
from tests import tiny
from tests.training import write_rows


def folder_of(place: Path, name: str = "qwen3_moe", seed: int = 0, **changes: Any) -> Path:
    """A model with a tokenizer."""
    tiny.save_tiny(place, name, seed, vocab_size=300, **changes)
    tiny.write_tokenizer(place)
    return place


def of_transformers(folder: Path, rows: TokenRows) -> tuple[list[list[int]], list[float]]:
    """Layer by layer the choices that fall on each expert, sample by sample; and how undecided routers are, from 0 to 1."""
    model = tiny.loaded(folder).eval()
    load = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.int64)
    entropy, tokens = torch.zeros(len(load), dtype=torch.float64), 0
    for row in range(len(rows)):
        for sample in rows.samples(row):
            with torch.no_grad():
                logits = model(torch.tensor(sample.ids.astype(int))[None], output_router_logits=True).router_logits
            tokens += len(sample.ids)
            for layer, one in enumerate(logits):
                scores = one.double().softmax(-1)
                chosen = scores.topk(model.config.num_experts_per_tok).indices.flatten()
                load[layer] += torch.bincount(chosen, minlength=load.shape[1])
                entropy[layer] -= (scores * scores.log()).sum() / math.log(load.shape[1])
    return load.tolist(), (entropy / tokens).tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("experts")
    return folder_of(root / "base"), write_rows(root / "rows.jsonl")


def test_load_is_that_of_transformers(base: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other lengths share a pass, the last one is not full, and each is counted once."""
    folder, rows = base
    kept: list[Any] = []
    from megaswift.commands import experts as command

    monkeypatch.setattr(
        command, "prepare", lambda *args, _made=command.prepare, **more: kept.append(_made(*args, **more)) or kept[-1]
    )
    found = experts_main(["--model_id_or_path", str(folder), "--dataset", f"{rows}#19", "--output", str(tmp_path / "page")])
    assert len(kept[0].train) == 19
    load, entropy = of_transformers(folder, kept[0].train)
    assert [layer["load"] for layer in found["layers"]] == load and sum(load[0]) > 0
    assert [layer["router_entropy"] for layer in found["layers"]] == pytest.approx(entropy, abs=1e-5)
    assert all(layer["drift"] == 0 and layer["tokens"] == sum(kept[0].train.lengths) for layer in found["layers"])
    assert json.loads((tmp_path / "page" / JSON).read_text(encoding="utf-8")) == found
    page = (tmp_path / "page" / PAGE).read_text(encoding="utf-8")
    assert f"expert 0: {load[0][0]} of {sum(load[0])}" in page and "19 rows" in page


def test_two_models_on_the_same_rows(base: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One router was turned: its load moves, and that of the layers behind it may; the first layer's stays."""
    folder, rows = base
    model = tiny.loaded(folder)
    router = model.model.layers[1].mlp.gate.weight
    before = router.detach().clone()
    with torch.no_grad():
        router.add_(
            0.5 * torch.randn(router.shape, generator=torch.Generator().manual_seed(1)) * router.norm() / router.numel() ** 0.5
        )
    tuned = tmp_path / "tuned"
    model.save_pretrained(tuned)
    tiny.write_tokenizer(tuned)
    found = experts_main(
        ["--model_id_or_path", str(tuned), "--compare", str(folder), "--dataset", str(rows), "--output", str(tmp_path / "page")]
    )
    drift = [layer["drift"] for layer in found["layers"]]
    moved = float((router.detach() - before).norm() / before.norm())
    assert drift[0] == 0 and drift[1] == pytest.approx(moved, rel=1e-5)
    assert found["before"][0]["load"] == found["layers"][0]["load"] and found["before"][1]["load"] != found["layers"][1]["load"]
    told = capsys.readouterr().out
    assert "load moved" in told and f"{100 * moved:.2f} %" in told
    page = (tmp_path / "page" / PAGE).read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and str(folder.name) in page


def test_what_is_refused(base: tuple[Path, Path], tmp_path: Path) -> None:
    folder, rows = base
    dense, other = folder_of(tmp_path / "dense", "qwen3"), folder_of(tmp_path / "other", num_experts=6)
    for words, text in (
        (["--model_id_or_path", str(dense)], "has no experts"),
        (["--model_id_or_path", str(folder), "--compare", str(dense)], "has no experts"),
        (["--model_id_or_path", str(folder), "--compare", str(other)], "other experts"),
        (["--model_id_or_path", str(folder), "--dataset_test_ratio", "0.1"], "nothing is held out"),
        (["--model_id_or_path", str(folder), "--val_dataset", str(rows)], "nothing is held out"),
    ):
        with pytest.raises(UserError, match=text):
            experts_main([*words, "--dataset", str(rows)])
