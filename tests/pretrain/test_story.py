"""The README's example of continued pre-training, run as processes on a tiny model; the page shows the same."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.pretrain.texts import write_texts
from tests.test_readme import README, ROOT, blocks, commands
from tests.test_whole_story import swift

PAGE = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")


def example(text: str) -> list[list[str]]:
    """The commands of the first block that shows continued pre-training."""
    block = next(block for block in blocks("shell", text) if "swift pt" in block)
    return [words for _, words in commands(block)]


def test_the_example(tmp_path: Path) -> None:
    tiny.save_tiny(tmp_path / "model", "qwen2", vocab_size=301, eos_token_id=1, pad_token_id=2)
    tiny.write_tokenizer(tmp_path / "model")
    write_texts(tmp_path / "books.jsonl", 80)
    write_texts(tmp_path / "papers.txt", 40, 1)
    train, export = example(README)
    assert example(PAGE) == [train, export]
    own = {"qwen2_5-0_5b": "tiny-chat", "2B": "3K", "4096": "32"}
    done = swift(tmp_path, *(own.get(word, word) for word in train), "--model_id_or_path", "model")
    said = " ".join(done.stdout.split())
    assert "3,000 tokens (--train_tokens) / 512 a step = 6 steps" in said and "3,072 tokens" in said
    assert "0.7 of the rows from books.jsonl" in said and "answers end with probability" in said
    [run] = (tmp_path / "output" / "tiny-chat-tp1-pp1").iterdir()
    swift(tmp_path, *(str(run) if word.startswith("output/") else word for word in export))
    assert (run / "tiny-chat-hf" / "model.safetensors").is_file()
