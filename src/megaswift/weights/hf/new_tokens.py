"""`--new_special_tokens`: a model's config and tokenizer files with more tokens, in a small directory of the cache.

The weights stay where they are: whoever reads them adds rows for the ids from `rows_before` on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.errors import DataError, UserError
from megaswift.models import families
from megaswift.models.prediction import FIELD as LAYERS_AHEAD
from megaswift.store.cache import cache_root, published
from megaswift.terminal import say
from megaswift.weights.hf.folder import CONFIG, read_config, side_files
from megaswift.weights.hf.json_files import read_json
from megaswift.weights.hf.tokenizer import read_tokenizer, table_rows, tokens_beyond

OPTION = "--new_special_tokens"
_FORMAT = "1"  # changes when other files are made of the same ones


@dataclass(frozen=True)
class NewTokens:
    """Files of a model with more special tokens.

    Args:
        source: the model's own directory.
        directory: config.json, tokenizer and the other side files as they are with the new tokens.
        tokens: the special tokens that were asked for, with their ids.
        rows_before, rows_after: rows of the embedding; equal where it had rows for all of them.
    """

    source: Path
    directory: Path
    tokens: dict[str, int]
    rows_before: int
    rows_after: int

    def note(self) -> str:
        """What becomes of the tokenizer and the embedding, in one line."""
        rows = (
            f"the embedding keeps its {self.rows_before:,} rows"
            if self.rows_after == self.rows_before
            else f"the embedding grows from {self.rows_before:,} to {self.rows_after:,} rows, each new one the mean of the old"
        )
        shown = ", ".join(f"{token} ({number})" for token, number in list(self.tokens.items())[:8])
        more = f" and {len(self.tokens) - 8} more" if len(self.tokens) > 8 else ""
        return f"special tokens: {shown}{more}; {rows}"


def listed_tokens(values: list[str]) -> list[str]:
    """The tokens of --new_special_tokens: words, and the lines of .txt files, each once. Raises UserError."""
    tokens: list[str] = []
    for value in values:
        if not value.endswith(".txt"):
            tokens.append(value)
            continue
        try:
            lines = Path(value).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"the file of tokens cannot be read: {reason}.", where=f"{OPTION} {value}") from error
        tokens += [line for line in lines if line.strip()]
    for token in tokens:
        if not token or token != token.strip():
            raise UserError(
                f"{token!r} is no special token: white space begins or ends it.", where=OPTION, fix="write it without"
            )
    return list(dict.fromkeys(tokens))


def with_new_tokens(model_dir: Path, tokens: list[str]) -> NewTokens | None:
    """The model's files with these special tokens; None where it has all of them, and a row for each token.

    A token keeps its id where the tokenizer has it already. The embedding gets rows up to the tokenizer's last id.

    Raises DataError where the tokenizer cannot be read or cannot take them.
    """
    if not tokens:
        return None
    tokenizer, rows = read_tokenizer(model_dir), table_rows(model_dir)
    if rows is None:
        raise DataError("config.json names no vocab_size, so no row can be added.", where=str(model_dir / CONFIG))
    before = tokenizer.get_vocab()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    beyond = tokens_beyond(before, rows)
    if not beyond and all(token in before and token in special for token in tokens):
        return None
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    after = tokenizer.get_vocab()
    numbers = {token: after[token] for token in tokens}
    needed = max(rows, max(after.values()) + 1)
    if ordinary := [token for token in tokens if token in before and token not in special and before[token] < rows]:
        say(f"[yellow]{OPTION}: words of the vocabulary that become special tokens: {', '.join(ordinary[:8])}[/yellow]")
    if others := [token for token in beyond if token not in numbers]:
        say(
            f"[yellow]{OPTION}: tokens that the tokenizer has beyond the embedding get rows too: {', '.join(others[:8])}[/yellow]"
        )
    if needed > rows:
        _require_growing(model_dir)
    directory = _made(model_dir, tokenizer, numbers, needed if needed > rows else None)
    return NewTokens(model_dir, directory, numbers, rows, needed)


def _require_growing(model_dir: Path) -> None:
    """Raise UserError for a model whose embedding cannot grow by itself: what is carried along would not fit it any more."""
    values = read_config(model_dir)
    family = families().get(str(values.get("model_type")))
    tables = bool(values.get(LAYERS_AHEAD)) and family is not None and bool(family.carried)
    if (family is not None and family.whole is not None) or tables:
        what = (
            f"layers that predict ahead ({LAYERS_AHEAD}), which have tables of their own"
            if tables
            else "parts beside its text model"
        )
        raise UserError(
            f"the embedding has no row left for new tokens, and this model has {what}: these are carried along as they are.",
            where=OPTION,
            fix="leave the option out, or add tokens that the tokenizer has already",
        )


def _made(model_dir: Path, tokenizer: Any, numbers: dict[str, int], vocab_size: int | None) -> Path:
    """The directory in the cache, made now if it is not there."""
    files = side_files(model_dir)
    key = hashlib.sha256(json.dumps([_FORMAT, numbers, vocab_size]).encode())
    for file in files:
        key.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    target = cache_root() / "tokens" / key.hexdigest()[:32]
    if target.is_dir():
        return target
    with published(target) as directory:
        for file in files:
            shutil.copyfile(file, directory / file.name)
        _write_tokenizer(directory, tokenizer, numbers)
        if vocab_size is not None:
            _write(directory / CONFIG, read_config(model_dir) | {"vocab_size": vocab_size})
        _check(directory, model_dir, tokenizer, numbers)
    return target


def _write_tokenizer(directory: Path, tokenizer: Any, numbers: dict[str, int]) -> None:
    """Add the tokens to the tokenizer's files; what else stands in them stays.

    `save_pretrained` would write all of it anew, in a form that earlier versions of transformers do not read.
    """
    entries = {
        token: {"content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for token in numbers
    }
    main = directory / "tokenizer.json"
    if main.is_file():
        content = read_json(main)
        kept = [item for item in content.get("added_tokens") or [] if item.get("content") not in numbers]
        added = kept + [{"id": numbers[token], **entry} for token, entry in entries.items()]
        _write(main, content | {"added_tokens": sorted(added, key=lambda item: item["id"])})
    else:  # made of a slow tokenizer's files
        main.write_text(tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = directory / "tokenizer_config.json"
    values = read_json(settings) if settings.is_file() else {}
    if isinstance(values.get("added_tokens_decoder"), dict):
        fresh = {str(numbers[token]): entry for token, entry in entries.items()}
        values["added_tokens_decoder"] = values["added_tokens_decoder"] | fresh
    _write(settings, _with_extra(values, list(numbers)))
    names = directory / "special_tokens_map.json"
    if names.is_file():
        _write(names, _with_extra(read_json(names), list(numbers)))
    known = directory / "added_tokens.json"
    if known.is_file():
        _write(known, read_json(known) | numbers)


def _with_extra(values: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The settings with the tokens among the extra special ones, under the name that stands there."""
    name = "extra_special_tokens" if isinstance(values.get("extra_special_tokens"), list) else "additional_special_tokens"
    before = values.get(name) or []
    there = {item.get("content") if isinstance(item, dict) else item for item in before}
    return values | {name: [*before, *(token for token in tokens if token not in there)]}


def _check(directory: Path, model_dir: Path, wanted: Any, numbers: dict[str, int]) -> None:
    """Raise DataError unless the files give the tokenizer that was wanted: every old id, the new ones, the same template."""
    found = read_tokenizer(directory)
    special = {number for number, token in found.added_tokens_decoder.items() if token.special}
    same = found.get_vocab() == wanted.get_vocab() and found.chat_template == wanted.chat_template
    ends = all(getattr(found, name) == getattr(wanted, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    single = all(found.encode(token, add_special_tokens=False) == [number] for token, number in numbers.items())
    if not (same and ends and single and special >= set(numbers.values())):
        raise DataError(
            f"this tokenizer's files cannot take new tokens ({type(found).__name__}).",
            where=str(model_dir),
            fix="add them with transformers: add_special_tokens, resize_token_embeddings, save_pretrained; then give that folder",
        )


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
