"""Tokens and the embedding: who has no row is named, and new special tokens reach every file of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tiny

from megaswift.errors import DataError, UserError
from megaswift.weights.hf.new_tokens import listed_tokens, with_new_tokens
from megaswift.weights.hf.tokenizer import has_tokenizer, load_tokenizer, read_tokenizer

OWN = 277  # tokens of the tiny tokenizer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a folder with the tiny tokenizer and a config of so many rows; `added`: tokens that it knows already."""
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))

    def make(rows: int | None, *added: str) -> Path:
        place = tmp_path / "model"
        place.mkdir(parents=True)
        tiny.write_tokenizer(place)
        tiny.add_tokens(place, *added)
        config = {"model_type": "llama"} | ({} if rows is None else {"vocab_size": rows})
        (place / "config.json").write_text(json.dumps(config))
        return place

    return make


def edit(path: Path, **values: Any) -> None:
    """Set entries of a JSON file."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))


def test_tokens_without_a_row_are_named(folder: Callable[..., Path]) -> None:
    place = folder(OWN, "<a>", "<b>")
    with pytest.raises(DataError, match=r"2 tokens without a row .* has 277 rows: '<a>' \(277\), '<b>' \(278\)") as error:
        load_tokenizer(place)
    assert "--new_special_tokens" in error.value.fix and error.value.where == str(place)
    edit(place / "config.json", vocab_size=OWN + 1)
    with pytest.raises(DataError, match=r"has a token without a row .* 278 rows: '<b>' \(278\)"):
        load_tokenizer(place)
    for rows in (OWN + 2, OWN + 200):
        edit(place / "config.json", vocab_size=rows)
        assert len(load_tokenizer(place)) == OWN + 2
    (place / "config.json").write_text('{"model_type": "llama"}')  # the family's default: 32,000 rows
    assert len(load_tokenizer(place)) == OWN + 2


def test_a_missing_tokenizer_file_is_one_error(folder: Callable[..., Path]) -> None:
    place = folder(OWN)
    (place / "tokenizer.json").unlink()
    assert has_tokenizer(place), "a part of it is there"
    with pytest.raises(DataError, match="tokenizer.json is not there") as error:
        load_tokenizer(place)
    assert error.value.where == str(place) and "fetch" in error.value.fix
    assert not error.value.what.endswith(":") and "\n" not in error.value.what
    assert "from one of: (1) " in error.value.what and "(3) " in error.value.what, "what transformers lists stands there too"


def test_the_list_of_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_bytes("\ufeff<a>\r\n\r\n<b>\r\n".encode())
    assert listed_tokens(["<c>", str(file), "<c>"]) == ["<c>", "<a>", "<b>"]
    with pytest.raises(UserError, match="cannot be read: No such file"):
        listed_tokens(["nowhere.txt"])
    for wrong in ("", " ", "<a> "):
        with pytest.raises(UserError, match="white space"):
            listed_tokens([wrong])


def test_all_files_get_the_tokens_and_nothing_else_changes(folder: Callable[..., Path]) -> None:
    """Files as transformers 4 wrote them, with lists of tokens in four places."""
    place = folder(OWN)
    edit(place / "special_tokens_map.json", additional_special_tokens=["<|im_start|>"], eos_token="<|im_end|>")
    entry = {"content": "<|im_start|>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    edit(
        place / "tokenizer_config.json",
        added_tokens_decoder={"0": entry | {"normalized": False}},
        additional_special_tokens=["<|im_start|>"],
        odd="kept",
    )
    edit(place / "added_tokens.json", **{"<|im_start|>": 0})
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    found = with_new_tokens(place, ["<a>", "<|im_start|>", "<b>"])
    assert found is not None and (found.rows_before, found.rows_after) == (OWN, OWN + 2)
    assert found.tokens == {"<a>": OWN, "<|im_start|>": 0, "<b>": OWN + 1}
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before, "the model's own directory stays"
    made = {file.name: json.loads(file.read_text()) for file in found.directory.glob("*.json")}
    assert made["config.json"] == {"model_type": "llama", "vocab_size": OWN + 2}
    assert made["special_tokens_map.json"]["additional_special_tokens"] == ["<|im_start|>", "<a>", "<b>"]
    assert made["tokenizer_config.json"]["additional_special_tokens"] == ["<|im_start|>", "<a>", "<b>"]
    assert made["tokenizer_config.json"]["odd"] == "kept"
    assert made["tokenizer_config.json"]["added_tokens_decoder"][str(OWN)]["special"] is True
    assert made["added_tokens.json"] == {"<|im_start|>": 0, "<a>": OWN, "<b>": OWN + 1}
    assert (found.directory / "chat_template.jinja").read_bytes() == before["chat_template.jinja"]
    content, own = made["tokenizer.json"], json.loads(before["tokenizer.json"])
    assert content["added_tokens"].pop()["content"] == "<b>" and content["added_tokens"].pop()["id"] == OWN
    assert content == own
    tokenizer = load_tokenizer(found.directory)
    assert tokenizer("x<a>y<b>", add_special_tokens=False)["input_ids"][1::2] == [OWN, OWN + 1]
    assert tokenizer.decode([OWN, OWN + 1], skip_special_tokens=True) == ""
    assert set(tokenizer.extra_special_tokens) >= {"<a>", "<b>"} and tokenizer.eos_token == "<|im_end|>"
    again = with_new_tokens(place, ["<a>", "<|im_start|>", "<b>"])
    assert again is not None and again.directory == found.directory
    assert with_new_tokens(found.directory, ["<a>", "<b>"]) is None, "nothing is left to do"


def test_rows_that_are_there_are_used(folder: Callable[..., Path]) -> None:
    found = with_new_tokens(folder(OWN + 1), ["<a>"])
    assert found is not None and found.rows_before == found.rows_after == OWN + 1
    assert "keeps its 278 rows" in found.note()
    assert json.loads((found.directory / "config.json").read_text())["vocab_size"] == OWN + 1


def test_tokens_beyond_the_embedding_keep_their_ids(folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    place = folder(OWN, "<a>", "<b>", "<c>")
    found = with_new_tokens(place, ["<b>"])
    assert found is not None and found.tokens == {"<b>": OWN + 1} and found.rows_after == OWN + 3
    assert "get rows too: <a>, <c>" in capsys.readouterr().out
    tokens = read_tokenizer(found.directory).added_tokens_decoder
    assert [tokens[OWN + k].special for k in range(3)] == [False, True, False]
    load_tokenizer(found.directory)


def test_a_word_that_becomes_special_is_told(folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = with_new_tokens(folder(OWN), ["a"])
    assert found is not None and found.rows_after == OWN and found.tokens["a"] < OWN
    assert "words of the vocabulary that become special tokens: a" in capsys.readouterr().out
