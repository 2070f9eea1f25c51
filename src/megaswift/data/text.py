"""Plain text as tokens: a document's own, the tokenizer's first token where it has one, and the token that ends the document.

It needs neither transformers nor torch, so that worker processes start at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megaswift.data.chat import own_bos
from megaswift.data.conversation import BadRow
from megaswift.data.pipeline import Recipe, renamed
from megaswift.data.rows import CHAT_COLUMNS, QUERY_NAMES, TEXT_NAMES, check_text
from megaswift.data.tables import Raw
from megaswift.data.tokens import Kind, Piece, PieceEncoder, tokenizer_json
from megaswift.errors import UserError

SMALL = 1 << 16  # ids below are stored in two bytes


class TextTokens:
    """A tokenizer as continued pre-training needs it; no chat template is.

    Args:
        tokenizer: a Hugging Face tokenizer with a fast backend.

    Attributes:
        state: what the tokens of a text follow from.
        eos_id: the token that ends a document.
        bos_id: the token that the tokenizer itself puts before a text, or None.
        pad_id: what fills up rows.

    Raises UserError for a tokenizer without an end token.
    """

    name = "text"

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end token (eos_token), so the end of a document could not be learnt.",
                where=str(getattr(tokenizer, "name_or_path", "")),
                fix="name one in tokenizer_config.json",
            )
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.bos_id = own_bos(tokenizer)
        self.encoder = PieceEncoder(tokenizer_json(tokenizer))
        self._whole = tokenizer.backend_tokenizer
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.state = {"tokenizer": tokenizer_json(tokenizer), "eos_id": self.eos_id, "bos_id": self.bos_id, "date": ""}
        self.end_ids = (self.eos_id,)
        self.small = max(self.vocabulary.values(), default=0) < SMALL
        self.control = {self.encoder.control[token]: token for token in self.encoder.special}

    def decode(self, ids: np.ndarray) -> str:
        """The text of some token ids, control tokens included."""
        return str(self._whole.decode(ids.tolist(), skip_special_tokens=False))

    def encode(self, texts: list[str], parse_special: bool) -> list[np.ndarray]:
        """Token ids (int32) of each document, its end included."""
        kind = Kind.TEMPLATE if parse_special else Kind.LITERAL
        first = [] if self.bos_id is None else [self.bos_id]
        found = []
        for item in self.encoder.encode([[Piece(text, kind, 1.0)] for text in texts]):
            ids = item.ids
            before = [] if ids[:1].tolist() == first else first
            after = [] if ids[-1:].tolist() == [self.eos_id] else [self.eos_id]
            found.append(np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)]))
        return found


@dataclass
class TextEncoding:
    """What became of some rows: documents end to end, and the fate of each row.

    Attributes:
        ids: int32, all documents. sizes: tokens of each.
        rows: how many there were. kept: number (within the call) of the row of each document.
        bad: row number -> why it cannot be used.
        control: control token -> how often it stands inside of documents.
        found: columns of the recipe that some row had. shapes: column of the text -> rows.
    """

    ids: np.ndarray
    sizes: list[int]
    rows: int
    kept: list[int]
    bad: dict[int, BadRow]
    control: Counter[str] = field(default_factory=Counter)
    found: frozenset[str] = frozenset()
    shapes: Counter[str] = field(default_factory=Counter)


class TextPipeline:
    """All that is needed to turn raw rows into documents; `parse_special`: control tokens in texts are tokens."""

    def __init__(self, tokens: TextTokens, parse_special: bool = True) -> None:
        self.tokens, self.parse_special = tokens, parse_special

    def encode(self, raws: list[Raw], recipe: Recipe) -> TextEncoding:
        """Documents of these rows."""
        texts, kept, bad, shapes, found = [], [], {}, Counter[str](), set[str]()
        for number, raw in enumerate(raws):
            try:
                name, text = text_of(renamed(raw, recipe, found))
            except BadRow as error:
                bad[number] = error
                continue
            texts.append(text)
            kept.append(number)
            shapes[name] += 1
        documents = self.tokens.encode(texts, self.parse_special)
        ids = np.concatenate([np.zeros(0, np.int32), *documents])
        sizes = list(map(len, documents))
        return TextEncoding(ids, sizes, len(raws), kept, bad, self._inside(ids, sizes), frozenset(found), shapes)

    def _inside(self, ids: np.ndarray, sizes: list[int]) -> Counter[str]:
        """Control tokens that stand in documents, and not at the place where we put the same."""
        control = np.isin(ids, list(self.tokens.control))
        ends = np.cumsum(sizes, dtype=np.int64)
        control[ends - 1] = False
        if self.tokens.bos_id is not None:
            control[ends - sizes] = False
        return Counter(self.tokens.control[number] for number in ids[control].tolist())


def text_of(row: dict[str, Any]) -> tuple[str, str]:
    """The column that holds a row's text, and the text. Raises BadRow where there is none."""
    name = next((name for name in TEXT_NAMES if row.get(name) is not None), None)
    if name is None:
        chat = any(row.get(name) is not None for name in (*CHAT_COLUMNS, *QUERY_NAMES))
        more = "; conversations are trained by swift sft" if chat else ""
        raise BadRow("no text", f"columns: {', '.join(map(str, row)) or 'none'}{more}")
    text = row[name]
    if not isinstance(text, str):
        raise BadRow("wrong type", f"{name} is no text")
    if not text.strip():
        raise BadRow("empty content", f"{name} is empty")
    check_text(text, name)
    return name, text
