"""The tokenizer of a model folder, and whether the model's embedding has a row for each of its tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megaswift.errors import DataError, first_line
from megaswift.models import families
from megaswift.models.whole import TEXT_CONFIG, text_of
from megaswift.weights.hf.folder import read_config

_FILES = (
    "tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_SHOWN = 8  # tokens in an error message
ADD_ROWS = "add rows for them with --new_special_tokens (swift export --to_megatron true, swift sft)"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only, and no progress bars, while a folder is read: what matters is checked and said by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def has_tokenizer(path: Path) -> bool:
    """Whether a directory has any file of a tokenizer; a part of them may be missing."""
    return any(fnmatch(item.name, mark) for item in path.iterdir() for mark in _FILES)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder, padding on the left. Raises DataError where files are missing or damaged."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, padding_side="left")
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError and the parser's own
            absent = "" if (path / "tokenizer.json").is_file() else "tokenizer.json is not there; "
            fix = (
                "fetch the model's tokenizer files again: tokenizer.json (or the vocabulary files of its tokenizer) "
                "and tokenizer_config.json"
            )
            raise DataError(f"the tokenizer cannot be read: {absent}{first_line(error)}", where=str(path), fix=fix) from error


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder. Raises DataError where it cannot be read, or has tokens without a row in the embedding."""
    tokenizer = read_tokenizer(path)
    require_embedding_rows(tokenizer.get_vocab(), table_rows(path), path)
    return tokenizer


def table_rows(path: Path) -> int | None:
    """Rows of the embedding of the model in a folder, as its config.json tells; None where that does not name them.

    A folder's weights are compared with that wherever they are read. The field may be left out for the family's default.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not (path / "config.json").is_file():
        return None
    values = read_config(path)
    inside = values.get(TEXT_CONFIG)
    for part in (inside if isinstance(inside, dict) else {}, values):
        if isinstance(part.get("vocab_size"), int):
            return int(part["vocab_size"])
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or (inside is not None and kind not in families()):
        return None
    found = getattr(text_of(CONFIG_MAPPING[kind]()), "vocab_size", None)
    return found if isinstance(found, int) else None


def tokens_beyond(vocabulary: Mapping[str, int], rows: int | None) -> dict[str, int]:
    """Tokens whose ids have no row in an embedding of `rows` rows, with these ids, in their order."""
    if rows is None:
        return {}
    return dict(sorted(((token, number) for token, number in vocabulary.items() if number >= rows), key=lambda item: item[1]))


def require_embedding_rows(vocabulary: Mapping[str, int], rows: int | None, where: Path | str) -> None:
    """Raise DataError where a tokenizer (token -> id) has tokens beyond the embedding, naming them."""
    beyond = tokens_beyond(vocabulary, rows)
    if beyond:
        raise no_rows(beyond, rows, str(where))


def no_rows(beyond: Mapping[str, int], rows: int | None, where: str, what: str = "the tokenizer has") -> DataError:
    """The error for tokens beyond the embedding.

    Args:
        beyond: token -> id.
        what: who has them, and the verb.
    """
    named = ", ".join(f"{token!r} ({number})" for token, number in list(beyond.items())[:_SHOWN])
    more = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
    count = "a token" if len(beyond) == 1 else f"{len(beyond)} tokens"
    return DataError(
        f"{what} {count} without a row in the model's embedding, which has {rows:,} rows: {named}{more}.",
        where=where,
        fix=f"{ADD_ROWS}, or take them out of the tokenizer's files",
    )
