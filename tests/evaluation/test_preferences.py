"""Preference accuracy of reward models and language models on held-out pairs, beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests import tiny
from tests.rlhf.pairs import write_pairs

from megaswift.commands.eval import eval_main
from megaswift.data.chat import ChatTemplate
from megaswift.data.pairs import to_pair
from megaswift.errors import DataError, UserError
from megaswift.weights.hf.tokenizer import read_tokenizer


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A language model, and two reward models of it."""
    from transformers import AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("models")
    tiny.save_tiny(root / "words", "qwen2", vocab_size=300, eos_token_id=1, pad_token_id=2)
    tiny.write_tokenizer(root / "words")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(root / "words", num_labels=1)
        with torch.no_grad():
            model.score.weight.normal_()
        model.save_pretrained(root / name)
        tiny.write_tokenizer(root / name)
    return root / "words", root / "first", root / "second"


def numbers(folder: Path, rows: Path, reward: bool) -> np.ndarray:
    """[pairs, 2]: what transformers says of both answers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model: Any = (AutoModelForSequenceClassification if reward else AutoModelForCausalLM).from_pretrained(folder).eval()
    template, found = ChatTemplate(read_tokenizer(folder)), []
    for line in rows.read_text().splitlines():
        for sample in template.encode(list(to_pair(json.loads(line)))):
            ids = torch.tensor(sample.ids[None].astype(np.int64))  # type: ignore[union-attr]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0]
            if reward:
                found.append(float(logits[0]))
            else:
                losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
                found.append(-float(losses[torch.from_numpy(sample.kept[1:].copy())].mean()))  # type: ignore[union-attr]
    return np.array(found).reshape(-1, 2)


def test_models_are_compared_by_the_pairs_that_they_put_right(
    models: tuple[Path, Path, Path], tmp_path: Path, capsys: Any
) -> None:
    rows = write_pairs(tmp_path / "held_out.jsonl", 20)
    words, first, second = models
    with rows.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "no pair"}]}) + "\n")
    named = [f"words={words}", f"first={first}", f"second={second}"]
    found = eval_main(["--compare", *named, "--preference_dataset", str(rows), "--eval_batch_size", "3"])
    assert "1 rows are no pairs" in capsys.readouterr().err
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[:-1]) + "\n")
    [directory] = Path("eval_outputs/default").iterdir()
    answers = [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]
    for number, (folder, row) in enumerate(zip(models, found, strict=True)):
        wanted = numbers(folder, rows, reward=number > 0)
        part = answers[20 * number : 20 * (number + 1)]
        assert all(one["correct"] == (one["values"][0] > one["values"][1]) == (one["prediction"] == "chosen") for one in part)
        own = np.array([one["values"] for one in part])
        assert np.abs(own - wanted).max() < 2e-5
        assert row["result"] == {"pairs:held_out": pytest.approx((wanted[:, 0] > wanted[:, 1]).mean())}
        assert row["details"]["pairs:held_out"]["questions"] == 20
        assert float(row["details"]["pairs:held_out"]["mean_margin"]) == pytest.approx(
            (wanted[:, 0] - wanted[:, 1]).mean(), abs=1e-5
        )
    assert 0 < found[1]["result"]["pairs:held_out"] < 1 and (directory / "comparison.html").is_file()
    again = eval_main(["--ckpt_dir", str(first), "--preference_dataset", str(rows), "--eval_use_cache", "true"])
    assert again[0]["details"]["pairs:held_out"]["asked_now"] == 0 and again[0]["result"] == found[1]["result"]


def test_what_is_refused(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", 4)
    with pytest.raises(UserError, match="gives scores and no answers, and arc asks questions"):
        from eval_files import write_all

        eval_main(["--ckpt_dir", str(models[1]), "--eval_dataset", "arc", "--eval_data_dir", str(write_all(tmp_path / "data"))])
    with pytest.raises(UserError, match="no benchmark is named"):
        eval_main(["--ckpt_dir", str(models[1])])
    rows.write_text('{"query": "a", "response": "b"}\n')
    with pytest.raises(DataError, match="has no pair: .*rows.jsonl:1: no rejected answer"):
        eval_main(["--ckpt_dir", str(models[1]), "--preference_dataset", str(rows)])
