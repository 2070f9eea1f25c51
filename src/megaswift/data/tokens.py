"""Text pieces to token ids, as the tokenizer would read the whole text, except that nobody may type the template's tokens.

A tokenizer cuts text at its added tokens and treats each run between them. We cut at the same places, except where somebody
other than the template wrote one of its control tokens, and once more where the loss mask changes.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from megaswift.data.added import AddedTokens, Found
from megaswift.errors import UserError

# What stands for the first character of a token that is to be read as characters: a letter or not, as that one is, since
# some tokens are found only beside no letter. No token has them.
_HOLES = {True: "\U00010380", False: "\ue0f2"}


class Kind(IntEnum):
    """Who wrote a piece, which decides which added tokens in it are read as characters."""

    TEMPLATE = 0  # the chat template, or a text row: none
    ANSWER = 1  # an assistant turn: the template's control tokens, except plain tags such as <think> and <tool_call>
    CONTENT = 2  # anybody else: the template's control tokens
    LITERAL = 3  # a text row with --parse_special_tokens false: special tokens


@dataclass(slots=True)
class Piece:
    """A stretch of text of one kind, and the weight of its tokens in the loss; `turn`: of which message's text, if of one's."""

    text: str
    kind: Kind
    weight: float = 0.0
    turn: int = -1


@dataclass(slots=True)
class Encoded:
    """Token ids of one sample.

    Attributes:
        ids: int32 [n].
        kept: bool [n], which of them carry loss.
        weights: fp32 [n], what the loss of each is multiplied by; None where that is 1 wherever there is loss.
        following: the token after the last, which the last one must predict; None: the last one predicts nothing.
    """

    ids: np.ndarray
    kept: np.ndarray
    weights: np.ndarray | None = None
    following: int | None = None

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
    """Encodes pieces with a fast tokenizer given as its JSON text.

    Attributes:
        control: text -> id of the added tokens, except white space.
        special: those of them that are special.
        guarded: the control tokens of the chat template, which count only where the template writes them.
        longest_token: most characters of one token, without white space that it swallows.
        swallows: whether a token may swallow white space around it.
    """

    def __init__(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        data = json.loads(tokenizer_json)
        added = data.get("added_tokens") or []
        control = [token for token in added if token["content"].strip()]
        self.control: dict[str, int] = {token["content"]: token["id"] for token in control}
        self.special = frozenset(token["content"] for token in control if token["special"])
        self._tags = {token["id"] for token in control if not token["special"] and re.fullmatch(r"</?\w+>", token["content"])}
        self._added = AddedTokens(added, data.get("normalizer"))
        self._prefix_when, self._prefix_always = _take_prefix_out(data)
        data.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self._plain = Tokenizer.from_str(json.dumps(data))
        words = self._plain.get_vocab(with_added_tokens=False)
        self._vocabulary = max([*(token["id"] for token in added), *words.values()], default=0) + 1
        self._known: dict[str, np.ndarray] = {}
        self.longest_token = max(map(len, [*words, *self.control]), default=1)
        self.swallows = any(token["lstrip"] or token["rstrip"] for token in added)
        self.guarded = frozenset[str]()
        self.guard(self.guarded)

    def guard(self, tokens: Iterable[str]) -> None:
        """Take these added tokens too for the template's own control tokens."""
        self.guarded |= frozenset(tokens)
        own, special = ({self.control[token] for token in tokens} for tokens in (self.guarded, self.special))
        self._refused = {Kind.TEMPLATE: set[int](), Kind.ANSWER: own - self._tags, Kind.CONTENT: own, Kind.LITERAL: special}
        self._is_control = np.zeros(self._vocabulary, bool)  # by token id
        self._is_control[list(own | special)] = True
        words = sorted(self.guarded | self.special, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, words)) or r"(?!)")

    def written(self, text: str) -> set[str]:
        """The added tokens in a template's own text that are control tokens by their form: special, or in brackets."""
        return {
            token for token in self.control if (token in self.special or re.fullmatch(r"<.+>|\[.+\]", token)) and token in text
        }

    def control_in(self, text: str) -> Counter[str]:
        """How often each control token (special, or the template's own) stands in a text."""
        names = {self.control[token]: token for token in self.guarded | self.special}
        return Counter(names[found.token] for found in self._added.find([text])[0] if found.token in names)

    def encode(self, samples: Iterable[list[Piece]], factors: Sequence[np.ndarray | None] | None = None) -> list[Encoded]:
        """Encode many samples with one call of the tokenizer.

        Args:
            factors: for each sample, what the weight of each of its characters is multiplied by; a token has that of its last.
        """
        plans: list[list[tuple[int, float | np.ndarray]]] = []  # per sample: (token id, weight), or (-1 - run, weights)
        texts: list[str] = []
        index: dict[str, int] = {}
        samples = [[piece for piece in pieces if piece.text] for pieces in samples]
        own = [None] * len(samples) if factors is None else factors
        all_found = self._added.find(["".join(piece.text for piece in pieces) for pieces in samples])
        for pieces, found, factor in zip(samples, all_found, own, strict=True):
            plan: list[tuple[int, float | np.ndarray]] = []
            for text, token, role_weight, first in self._runs(pieces, found):
                weight = role_weight if factor is None else role_weight * self._factors(text, token, first, factor)
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

    def _factors(self, text: str, token: int | None, first: int, factor: np.ndarray) -> float | np.ndarray:
        """Of a token whose last character is `first`, or of each token of a run of text that begins there."""
        if token is not None:
            return float(factor[first])
        own = factor[max(first, 0) : first + len(text)]
        if not len(own) or (own == own[0]).all():
            return float(own[0]) if len(own) else 1.0
        ends = np.maximum(self._ends(text) - 1 + first, max(first, 0))
        return factor[np.minimum(ends, len(factor) - 1)]

    def _ends(self, text: str) -> np.ndarray:
        """Where each token of a run of text ends."""
        ends, shift = [], 0
        whole = self._plain.encode(text, add_special_tokens=False)
        parts = self._uncontrolled(text) if self._is_control[whole.ids].any() else [text]
        for part in parts:
            encoding = whole if len(parts) == 1 else self._plain.encode(part, add_special_tokens=False)
            ends += [shift + stop for _, stop in encoding.offsets]
            shift += len(part)
        return np.array(ends, np.int64)

    def last_control(self, text: str, first: int, last: int) -> int | None:
        """Where the last control token within text[first:last] ends; None when there is none."""
        ids = set(self.control.values())
        ends = [found.stop for found in self._added.find([text[first:last]])[0] if found.token in ids]
        return first + ends[-1] if ends else None

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        known = self._known
        unknown = [text for text in texts if text not in known]
        encoded = self._plain.encode_batch_fast(unknown, add_special_tokens=False)
        fresh = {}
        for text, encoding in zip(unknown, encoded, strict=True):
            ids = np.array(encoding.ids, np.int32)
            if self._is_control[ids].any():
                ids = self._without_control(text)
            fresh[text] = ids
            if len(text) <= 64 and len(known) < 4096:
                known[text] = ids
        return [fresh[text] if text in fresh else known[text] for text in texts]

    def _without_control(self, text: str) -> np.ndarray:
        parts = self._uncontrolled(text)
        return np.array([token for part in parts for token in self._plain.encode(part, add_special_tokens=False).ids], np.int32)

    def _uncontrolled(self, text: str) -> list[str]:
        """A Unigram model may spell a control token as one piece; cutting inside it prevents that."""
        parts, last = [], 0
        for match in self._spelled.finditer(text):
            parts.append(text[last : match.start() + 1])
            last = match.start() + 1
        parts.append(text[last:])
        return parts

    def _runs(self, pieces: list[Piece], found: list[Found]) -> list[tuple[str, int | None, float, int]]:
        """Pieces as runs of text (text, None, weight, first character) and added tokens ("", id, weight, last character), in order.

        Args:
            found: the added tokens of all texts. A tokenizer's own space before a run is a character of it, before the first.
        """
        text, ends = "".join(piece.text for piece in pieces), list(accumulate(len(piece.text) for piece in pieces))
        borders = [end for end, (one, other) in zip(ends, pairwise(pieces), strict=False) if one.weight != other.weight]
        result: list[tuple[str, int | None, float, int]] = []
        position, fresh = 0, True  # fresh: a run that starts here would be the tokenizer's own start of a run

        def write(stop: int) -> None:
            nonlocal fresh
            inner = borders[bisect_right(borders, position) : bisect_left(borders, stop)]
            for first, last in pairwise([position, *inner, stop]):
                if first >= last:  # the token before may have swallowed this one, which is white space
                    continue
                part, begin = text[first:last], first
                if fresh and self._wants_prefix(part, not result):
                    part, begin = " " + part, first - 1
                fresh = False
                result.append((part, None, pieces[bisect_right(ends, first)].weight, begin))

        for item in self._allowed(text, pieces, ends, borders, found):
            if position == item.start and fresh and item.rest:  # nothing but the tokenizer's own prefix stands before it
                result.append((" ", None, pieces[bisect_right(ends, item.first)].weight, item.first - 1))
            write(item.start)
            result.append(("", item.token, pieces[bisect_right(ends, item.last - 1)].weight, item.last - 1))
            position = item.stop
            fresh = not (item.normalized and self._prefix_always)  # a normalizer's prefix stands before the first run only
        write(len(text))
        return result

    def _allowed(self, text: str, pieces: list[Piece], ends: list[int], borders: list[int], found: list[Found]) -> list[Found]:
        """Added tokens of a text without those that the writer of their piece may not write.

        Ordinary text is not read across a border of the loss, so no token may stand on both sides of one.
        """
        probe, cuts = text, [0, len(text)]
        while True:
            wrong = False
            for item in found:
                inside = pieces[bisect_right(ends, item.first) : bisect_left(ends, item.last) + 1]
                across = borders[bisect_right(borders, item.first) : bisect_left(borders, item.last)]
                if any(item.token in self._refused[piece.kind] for piece in inside):
                    letter = re.match(r"\w", text[item.first]) is not None
                    probe = probe[: item.first] + _HOLES[letter] + probe[item.first + 1 :]
                elif across:
                    insort(cuts, across[0])
                else:
                    continue
                wrong = True
            if not wrong:
                return found
            starts = cuts[:-1]
            parts = self._added.find([probe[first:last] for first, last in pairwise(cuts)])
            found = [item.moved(first) for first, items in zip(starts, parts, strict=True) for item in items]

    def _wants_prefix(self, text: str, at_start: bool) -> bool:
        if self._prefix_when == "never" or (self._prefix_when == "first" and not at_start):
            return False
        return self._prefix_always or not text.startswith(" ")


def pooled_place(ids: np.ndarray, pad_id: int) -> int:
    """Where the last token is that is not `pad_id`, whatever that means in the sample: transformers' rule; 0 if all are."""
    return int(np.flatnonzero(ids != pad_id).max(initial=0))


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


def _assemble(plan: list[tuple[int, float | np.ndarray]], runs: list[np.ndarray]) -> Encoded:
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
    return Encoded(ids, kept, None if bool((weights == kept).all()) else weights)


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
