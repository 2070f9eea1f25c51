"""From tokens to shown text: whole characters, stop words, nothing that steers a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswift.inference.text import StopWords, TextAssembler, clean_input, first_stop, printable, whole_text


def assembled(tokenizer, ids: list[int]) -> list[str]:
    assembler = TextAssembler(tokenizer)
    return [*(assembler.push(token) for token in ids), assembler.flush()]


@pytest.mark.parametrize("text", ["你是谁？我是小黄。", "emoji 🎉 and 👨‍👩‍👧", "naïve café", "plain words", "混合 mixed 文字"])
def test_pieces_are_whole_characters_and_join_to_the_text(backend, text: str) -> None:
    ids = backend.tokenizer.encode(text, add_special_tokens=False)
    pieces = assembled(backend.tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_streamed_text_equals_whole_text_for_any_tokens(backend, ids: list[int]) -> None:
    assert "".join(assembled(backend.tokenizer, ids)) == whole_text(backend.tokenizer, ids)


def test_half_a_character_at_the_end_is_left_out(backend) -> None:
    ids = backend.tokenizer.encode("好x睡", add_special_tokens=False)
    assert whole_text(backend.tokenizer, ids[:-1]) == "好x"
    assert "".join(assembled(backend.tokenizer, ids[:-1])) == "好x"


@settings(max_examples=200, deadline=None)
@given(text=st.text("abc", max_size=30), words=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_words_cut_as_a_search_in_the_whole_text_does(text: str, words: list[str]) -> None:
    stop = StopWords(words)
    shown = ""
    for count, letter in enumerate(text, start=1):
        shown += stop.feed(letter)
        if stop.found:
            whole = text[:count]
            break
    else:
        whole, shown = text, shown + stop.flush()
    place = first_stop(whole, words)
    assert (place is not None) == stop.found
    assert shown == (whole if place is None else whole[:place])


def test_nothing_is_shown_after_a_stop_word() -> None:
    stop = StopWords(["END"])
    assert [stop.feed(piece) for piece in ("go on E", "N", "D and more", "x")] == ["go on ", "", "", ""]
    assert stop.flush() == ""


def test_terminal_control_codes_are_not_shown() -> None:
    assert printable("red \x1b[31mtext\x07\n\tnext 你好\x9b1m") == "red [31mtext\n\tnext 你好1m"


def test_input_that_is_no_text_is_replaced() -> None:
    assert clean_input(b"ab\xffc".decode("utf-8", "surrogateescape")) == "ab\ufffdc"
    assert clean_input("小黄") == "小黄"
