"""From tokens to shown text: whole characters, stop words, nothing that steers a terminal."""

from __future__ import annotations

import re

import pytest
import torch
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


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer as Llama 2 and Mistral have it: a token for each byte, for characters that are no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi", "▁hi", "x"]
    merges = [("h", "i"), ("▁", "hi")]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_half_a_character_leaves_the_bytes_before_it_whole(byte_fallback) -> None:
    ids = byte_fallback.encode("hi😀睡😀", add_special_tokens=False)
    assert len(ids) == 1 + 4 + 3 + 4
    for count in range(1, len(ids) + 1):
        expected = "hi" + "😀" * (count >= 5) + "睡" * (count >= 8) + "😀" * (count == 12)
        assert whole_text(byte_fallback, ids[:count]) == expected == "".join(assembled(byte_fallback, ids[:count]))
    # A byte that is wrong costs itself, and what stands with it is read.
    wrong = byte_fallback.convert_tokens_to_ids(["▁hi", "<0xE7>", "<0x9D>", "<0xA1>", "<0xFF>", "x"])
    assert whole_text(byte_fallback, wrong) == "hi睡\ufffdx"


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 264), max_size=20))
def test_streamed_text_equals_whole_text_for_any_bytes(byte_fallback, ids: list[int]) -> None:
    assert "".join(assembled(byte_fallback, ids)) == whole_text(byte_fallback, ids)


def test_a_stop_word_of_bytes_is_found_behind_half_a_character(byte_fallback) -> None:
    from megaswift.inference.decoding import criteria
    from megaswift.inference.options import GenerationOptions

    ids = byte_fallback.encode("hi睡睡觉", add_special_tokens=False)
    rules = criteria(byte_fallback, GenerationOptions(stop_words=("觉",)), 0, [99], None)
    found = [bool(rules(torch.tensor([ids[:count]]), None)) for count in range(1, len(ids) + 1)]
    assert found == [False] * 9 + [True]


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
    found = re.search("|".join(map(re.escape, words)), whole)
    assert place == (found.start() if found else None)
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
