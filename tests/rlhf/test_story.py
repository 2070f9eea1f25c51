"""The README's and the page's example of preference training, run as processes on a tiny model; and on the packaged SmolLM2 once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaswift.cli import main
from tests import tiny
from tests.rlhf.pairs import write_pairs
from tests.test_readme import README, ROOT, blocks, commands
from tests.test_whole_story import swift
from tests.training import long

PAGE = (ROOT / "docs" / "rlhf.md").read_text(encoding="utf-8")


def example(text: str, words: str = "swift rlhf --rlhf_type dpo") -> list[list[str]]:
    """The commands of the block that has these words: by default the one that shows preference training."""
    [block] = [block for block in blocks("shell", text) if words in block]
    return [words for _, words in commands(block)]


@pytest.mark.parametrize(("text", "form"), [(README, "hf"), (PAGE, "adapter")], ids=["README.md", "rlhf.md"])
def test_the_example(text: str, form: str, tmp_path: Path) -> None:
    tiny.save_tiny(tmp_path / "model", "qwen2", vocab_size=301, eos_token_id=1, pad_token_id=2)
    tiny.write_tokenizer(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 32)
    write_pairs(tmp_path / "held_out.jsonl", 8)
    with (tmp_path / "pairs.jsonl").open("a", encoding="utf-8") as file:
        [row] = [block for block in blocks("json", README) if "rejected_response" in block]
        file.write(row)
    train, export = example(text)
    own = {"smollm2-135m-instruct": "tiny-chat", "30": "4"}
    done = swift(tmp_path, *(own.get(word, word) for word in train), "--model_id_or_path", "model")
    assert "learnt: dpo (sigmoid), beta 0.1" in done.stdout and "33 training rows, 8 validation rows" in done.stdout
    [run] = (tmp_path / "output" / "tiny-chat-tp1-pp1").iterdir()
    rows = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    assert any("eval_rewards/accuracies" in row for row in rows)
    swift(tmp_path, *(str(run) if word.startswith("output/") else word for word in export))
    assert (run / f"tiny-chat-{form}").is_dir()


def test_the_examples_of_models_that_give_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command of the page: looked at, trained, exported, asked, compared; and rows with classes."""
    tiny.save_tiny(tmp_path / "model", "qwen2", vocab_size=301, eos_token_id=1, pad_token_id=2)
    tiny.write_tokenizer(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 32)
    write_pairs(tmp_path / "held_out.jsonl", 8)
    [row] = [block for block in blocks("json", PAGE) if '"label"' in block]
    (tmp_path / "classes.jsonl").write_text("".join(row.replace('"label": 2', f'"label": {k % 3}') for k in range(40)))
    monkeypatch.chdir(tmp_path)
    own = {"smollm2-135m-instruct": "tiny-chat", "30": "2"}

    def said(words: list[str], *more: str) -> str:
        capsys.readouterr()
        assert main([*(own.get(word, word) for word in words), *more]) == 0
        return capsys.readouterr().out

    [look] = example(PAGE, "swift data --rlhf_type")
    assert "Pair 2, rejected; loss is on" in said(look, "--model_id_or_path", "model")
    train, export, infer = example(PAGE, "swift rlhf --rlhf_type rm")
    done = swift(tmp_path, *(own.get(word, word) for word in train), "--model_id_or_path", "model")
    assert "learnt: rm (reward model), center_rewards_coefficient 0.01; no reference" in done.stdout
    [run] = (tmp_path / "output" / "tiny-chat-tp1-pp1").iterdir()
    place = {word: str(run) for word in export if word.startswith("output/")}
    said([place.get(word, word) for word in export])
    lines = said([str(run / "tiny-chat-hf") if word.startswith("output/") else word for word in infer]).splitlines()
    assert len(lines) == 8 and all({"score", "rejected_score"} <= json.loads(line).keys() for line in lines)
    [compare] = example(PAGE, "swift eval --compare")
    compare = ["before=model" if word.startswith("before=") else word for word in compare]
    assert "pairs:held_out (8 of 8 questions" in said(
        [f"after={run}" if word.startswith("after=") else word for word in compare]
    )
    [classes] = example(PAGE, "swift sft --task_type seq_cls")
    done = swift(tmp_path, *(own.get(word, word) for word in classes), "--model_id_or_path", "model")
    assert "learnt: 3 classes (single_label_classification)" in done.stdout


@long
@pytest.mark.smollm2
def test_smollm2_prefers_what_it_was_shown(tmp_path: Path) -> None:
    """Thirty steps over pairs of a lower-case and an upper-case answer; margin and accuracy rise on pairs that it never saw."""
    things = "sun moon sea river tree stone bird fish house road bread milk".split()
    verbs = "describe explain name paint draw sell".split()

    def write(name: str, which: list[tuple[str, str]]) -> None:
        with (tmp_path / name).open("w") as file:
            for verb, thing in which:
                asked, answer = f"Please {verb} the {thing}.", f"I {verb} the {thing} for you now."
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns, "rejected_response": answer.upper()}) + "\n")

    every = [(verb, thing) for verb in verbs for thing in things]
    write("held_out.jsonl", every[::6])
    write("pairs.jsonl", [pair for k, pair in enumerate(every) if k % 6])
    swift(
        tmp_path, "rlhf", "--model_type", "smollm2-135m-instruct", "--dtype", "fp32", "--dataset", "pairs.jsonl", "--val_dataset", "held_out.jsonl",
        "--learning_rate", "5e-6", "--max_steps", "30", "--gradient_accumulation_steps", "2", "--eval_steps", "10", "--output_dir", "run",
        "--add_output_dir_suffix", "false", "--save_only_model", "true",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "logging.jsonl").read_text().splitlines()]
    margins = [row["eval_rewards/margins"] for row in rows if "eval_loss" in row]
    assert margins == sorted(margins) and margins[-1] > 1, margins
    assert [row for row in rows if "eval_loss" in row][-1]["eval_rewards/accuracies"] == 1
