"""Text pieces to token ids, so that control tokens come from the template alone and pieces join as the whole text would.

A tokenizer cuts text at its added tokens and treats each run between them. We cut at the same places, but only where
the template (not a user) wrote the token, and once more where the loss mask changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from megaswift.errors import UserError


class Kind(IntEnum):
    """Who wrote a piece, which decides what in it may become a control token."""

    TEMPLATE = 0  # the chat template: every added token counts
    ANSWER = 1  # an assistant turn: only plain tags such as <think> and <tool_call> count
    CONTENT = 2  # anybody else: nothing counts


@dataclass(slots=True)
class Piece:
    """A stretch of text of one kind, and the weight of its tokens in the loss."""

    text: str
    kind: Kind
    weight: float = 0.0


@dataclass(slots=True)
class Encoded:
    """Token ids of one sample.

    Attributes:
        ids: int32 [n].
        kept: bool [n], which of them carry loss.
        weights: fp32 [n], what the loss of each is multiplied by; None where that is 1 wherever there is loss.
    """

    ids: np.ndarray
    kept: np.ndarray
    weights: np.ndarray | None = None

    def part(self, piece: slice) -> Encoded:
        """Some of its tokens."""
        return Encoded(self.ids[piece], self.kept[piece], None if self.weights is None else self.weights[piece])


def joined(samples: list[Encoded]) -> Encoded:
    """Samples end to end."""
    if not samples:
        return Encoded(np.zeros(0, np.int32), np.zeros(0, bool))
    weights = None
    if any(sample.weights is not None for sample in samples):
        weights = np.concatenate([weights_of(sample) for sample in samples])
    return Encoded(np.concatenate([one.ids for one in samples]), np.concatenate([one.kept for one in samples]), weights)


def weights_of(sample: Encoded) -> np.ndarray:
    """fp32 [n]: the weight of every token, 0 where there is no loss."""
    return sample.kept.astype(np.float32) if sample.weights is None else np.where(sample.kept, sample.weights, np.float32(0))


class PieceEncoder:
    """Encodes pieces with a fast tokenizer given as its JSON text."""

    def __init__(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        data = json.loads(tokenizer_json)
        added = data.get("added_tokens") or []
        control = [token for token in added if token["content"].strip()]
        self.control = {token["content"]: token["id"] for token in control}
        self.special = frozenset(token["content"] for token in control if token["special"])
        tags = [token["content"] for token in control if not token["special"] and re.fullmatch(r"</?\w+>", token["content"])]
        strips = {token["content"]: (token["lstrip"], token["rstrip"]) for token in control}
        self._cut = {Kind.TEMPLATE: _cutter(self.control, strips), Kind.ANSWER: _cutter(tags, strips), Kind.CONTENT: None}
        self._prefix_when, self._prefix_always = _take_prefix_out(data)
        spaces = [token for token in added if not token["content"].strip()]
        data.update(added_tokens=spaces, post_processor=None, truncation=None, padding=None)
        self._plain = Tokenizer.from_str(json.dumps(data))
        self._renumber = {self._plain.token_to_id(token["content"]): token["id"] for token in spaces}
        self._renumber = {local: real for local, real in self._renumber.items() if local != real}
        vocabulary = max([*self.control.values(), self._plain.get_vocab_size(with_added_tokens=True)]) + 1
        self._is_control = np.zeros(vocabulary, bool)  # by token id
        self._is_control[list(self.control.values())] = True
        self._known: dict[str, np.ndarray] = {}
        self.longest_token = max(
            map(len, self._plain.get_vocab(with_added_tokens=False)), default=1
        )  # in characters of the vocabulary

    def encode(self, samples: Iterable[list[Piece]]) -> list[Encoded]:
        """Encode many samples with one call of the tokenizer."""
        plans: list[list[tuple[int, float]]] = []  # per sample: (token id, weight), or (-1 - run, weight)
        texts: list[str] = []
        index: dict[str, int] = {}
        for pieces in samples:
            plan = []
            for text, token, weight in self._runs(pieces):
                if token is None:
                    if len(text) > 64:
                        run = len(texts)
                        texts.append(text)
                    elif (run := index.get(text, -1)) < 0:
                        run = index[text] = len(texts)
                        texts.append(text)
                    plan.append((-1 - run, weight))
                else:
                    plan.append((token, weight))
            plans.append(plan)
        runs = self._encode_texts(texts)
        return [_assemble(plan, runs) for plan in plans]

    def last_control(self, text: str, first: int, last: int) -> int | None:
        """Where the last control token within text[first:last] ends; None when there is none."""
        cut = self._cut[Kind.TEMPLATE]
        ends = [match.end() for match in cut.finditer(text, first, last)] if cut else []
        return ends[-1] if ends else None

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        known = self._known
        unknown = [text for text in texts if text not in known]
        encoded = self._plain.encode_batch_fast(unknown, add_special_tokens=False)
        fresh = {}
        for text, encoding in zip(unknown, encoded, strict=True):
            ids = np.array(encoding.ids, np.int32)
            if self._renumber:
                ids = np.array([self._renumber.get(token, token) for token in ids.tolist()], np.int32)
            if self._is_control[ids].any():
                ids = self._without_control(text)
            fresh[text] = ids
            if len(text) <= 64 and len(known) < 4096:
                known[text] = ids
        return [fresh[text] if text in fresh else known[text] for text in texts]

    def _without_control(self, text: str) -> np.ndarray:
        """A Unigram model may spell a control token as one piece; cutting inside it prevents that."""
        parts, last = [], 0
        cut = self._cut[Kind.TEMPLATE]
        for match in cut.finditer(text) if cut else ():
            parts.append(text[last : match.start() + 1])
            last = match.start() + 1
        parts.append(text[last:])
        return np.array([token for part in parts for token in self._plain.encode(part, add_special_tokens=False).ids], np.int32)

    def _runs(self, pieces: list[Piece]) -> list[tuple[str, int | None, float]]:
        """Pieces as (text, None, weight) runs and ("", token id, weight) control tokens, in order."""
        result: list[tuple[str, int | None, float]] = []
        text, text_weight, fresh = "", 0.0, True  # fresh: a run that starts here would be the tokenizer's own start of a run

        def close() -> None:
            nonlocal text
            if text:
                result.append((text, None, text_weight))
                text = ""

        for piece in pieces:
            for part, token in self._split(piece):
                if token is not None:
                    close()
                    result.append(("", token, piece.weight))
                    fresh = True
                    continue
                if text and piece.weight != text_weight:
                    close()
                if not text:
                    text_weight = piece.weight
                    if fresh and self._wants_prefix(part, not result):
                        part = " " + part
                    fresh = False
                text += part
        close()
        return result

    def _wants_prefix(self, text: str, at_start: bool) -> bool:
        if self._prefix_when == "never" or (self._prefix_when == "first" and not at_start):
            return False
        return self._prefix_always or not text.startswith(" ")

    def _split(self, piece: Piece) -> list[tuple[str, int | None]]:
        cut = self._cut[piece.kind]
        if cut is None or not piece.text:
            return [(piece.text, None)] if piece.text else []
        parts: list[tuple[str, int | None]] = []
        last = 0
        for match in cut.finditer(piece.text):
            if match.start() > last:
                parts.append((piece.text[last : match.start()], None))
            parts.append(("", self.control[match.group().strip() if match.group() not in self.control else match.group()]))
            last = match.end()
        if last < len(piece.text):
            parts.append((piece.text[last:], None))
        return parts


def tokenizer_json(tokenizer: Any) -> str:
    """The JSON text of a Hugging Face tokenizer's fast backend. Raises UserError for a slow tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{type(tokenizer).__name__} has no fast tokenizer (tokenizer.json).",
            where=str(getattr(tokenizer, "name_or_path", "")),
            fix="convert it once with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return backend.to_str()


def _cutter(contents: Iterable[str], strips: dict[str, tuple[bool, bool]]) -> re.Pattern[str] | None:
    """A pattern that finds these tokens, longest first, with the white space that they swallow."""
    ordered = sorted(contents, key=len, reverse=True)
    if not ordered:
        return None
    return re.compile(
        "|".join((r"\s*" if strips[c][0] else "") + re.escape(c) + (r"\s*" if strips[c][1] else "") for c in ordered)
    )


def _assemble(plan: list[tuple[int, float]], runs: list[np.ndarray]) -> Encoded:
    size = sum(1 if token >= 0 else len(runs[-1 - token]) for token, _ in plan)
    ids, weights = np.empty(size, np.int32), np.empty(size, np.float32)
    position = 0
    for token, weight in plan:
        if token >= 0:
            ids[position], weights[position] = token, weight
            position += 1
        else:
            run = runs[-1 - token]
            end = position + len(run)
            ids[position:end], weights[position:end] = run, weight
            position = end
    kept = weights != 0
    return Encoded(ids, kept, None if all(weight in (0.0, 1.0) for _, weight in plan) else weights)


def _take_prefix_out(data: dict[str, Any]) -> tuple[str, bool]:
    """Remove from a tokenizer's JSON whatever puts a space before each text, and say when it does that.

    Returns (always | first | never, whether also before a text that starts with a space).
    """
    when, also_before_space = "never", False

    def visit(node: Any) -> Any:
        nonlocal when, also_before_space
        if not isinstance(node, dict):
            return node
        kind = node.get("type")
        if kind == "Sequence":
            key = "normalizers" if "normalizers" in node else "pretokenizers"
            children = [child for child in (visit(item) for item in node[key]) if child is not None]
            return {**node, key: children}
        if kind == "Prepend":
            when, also_before_space = "always", True
            return None
        if kind == "Metaspace" and node.get("prepend_scheme", "always") != "never":
            when = node.get("prepend_scheme", "always")
            return {**node, "prepend_scheme": "never"}
        if kind == "ByteLevel" and node.get("add_prefix_space"):
            when = "always"
            return {**node, "add_prefix_space": False}
        return node

    data["normalizer"] = visit(data.get("normalizer"))
    data["pre_tokenizer"] = visit(data.get("pre_tokenizer"))
    return when, also_before_space
