"""The prompts of the logit comparison: both languages, code, numbers, a conversation, a long text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megaswift.errors import DataError
from megaswift.weights.hf.tokenizer import has_tokenizer, read_tokenizer

_LONG = (
    "The harbour town had three bridges, and each of them told a different story about the people who had built it. "
    "The first was made of oak, laid by fishermen who wanted to reach the market before the tide turned. "
    "The second was stone, ordered by a council that argued for eleven years about its colour. "
    "The third was steel, and nobody remembered who had asked for it, only that it hummed when the wind came from the north. "
    "Children crossed all three on the same afternoon and kept a list of the differences: the smell of the wood, "
    "the cold of the stone, the song of the steel. When they were old they still agreed that the list was complete, "
    "although each of them remembered a different item at its end. "
)
PROMPTS: dict[str, str] = {
    "english": "The capital of France is Paris, and the river that flows through it is called the Seine.",
    "chinese": "请用三句话介绍一下你自己，然后解释为什么天空在白天是蓝色的，而在傍晚会变成红色。",
    "code": "def merge(left, right):\n    out = []\n    while left and right:\n        out.append((left if left[0] <= right[0] else right).pop(0))\n    return out + left + right\n",
    "numbers": "17 * 23 = 391; sqrt(2) = 1.41421356; 2026-02-28 + 1 day = 2026-03-01; 0x1F = 31.",
    "chat": "User: Who are you?\nAssistant: I am an assistant. How can I help you today?\nUser: 你会说中文吗？\nAssistant: 会的。",
    "data": '{"id": 7, "tags": ["a", "b"], "nested": {"ok": true, "ratio": 0.25}}\n| name | price |\n|---|---|\n| tea | 3.50 |',
    "symbols": "naïve café, Ω ≈ 376.73 ohm, ∑ᵢ xᵢ² ≤ 1 \t→ done!!! 😀 \\u0000 <|not a token|>",
    "one word": "Hello",
    "long": _LONG * 2,
}
LONGEST = 320  # tokens of one prompt
USUAL = 64  # tokens of every prompt but the long one


def token_rows(model_dir: Path, vocab: int, limit: int, texts: Mapping[str, str] | None = None) -> dict[str, list[int]]:
    """Every prompt as tokens of the model's tokenizer, or as bytes where the directory has none.

    Args:
        vocab: rows of the model's embedding.
        limit: the longest sample that the model takes.
        texts: other prompts than the usual ones, by name; they are not cut to the usual length.
    """
    encode = _encoder(model_dir)
    rows = {}
    for name, text in (PROMPTS if texts is None else texts).items():
        longest = LONGEST if name == "long" or texts is not None else USUAL
        tokens = [token % vocab for token in encode(text)][: min(longest, limit)]
        rows[name] = tokens or [0]
    return rows


def _encoder(model_dir: Path):  # type: ignore[no-untyped-def]
    if not has_tokenizer(model_dir):
        return lambda text: list(text.encode("utf-8"))
    try:
        tokenizer = read_tokenizer(model_dir)
    except DataError:  # a tokenizer that does not load is found elsewhere; the comparison only needs token numbers
        return lambda text: list(text.encode("utf-8"))
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
