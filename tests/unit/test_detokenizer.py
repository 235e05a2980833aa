"""Streamed text equals the tokenizer's own decoding, however it is cut; stop strings cut it as they cut the whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from workers.engine.detokenizer import REPLACEMENT, TextStream

CORPUS = [
    "The quick brown fox jumps over the lazy dog, twice; isn't it?",
    "Zürich, São Paulo, Kraków — naïve café",
    "東京で水を飲む。你好，世界。안녕하세요",
    "привет мир, שלום עולם, नमस्ते दुनिया",
    "🌊🚀 👩‍👩‍👧‍👦 👍🏽 🇨🇭 e\u0301 a\u0308",
    "def f(x):\n\treturn x  +  1\n\n",
]
SPECIAL = [AddedToken("<|end|>", special=True), AddedToken("<|turn|>", special=True)]
MARKERS = [
    AddedToken("<think>", special=False),
    AddedToken("</think>", special=False),
    AddedToken("<né x>", special=False),
]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(MARKERS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer)


def sentencepiece(strip: int) -> PreTrainedTokenizerFast:
    """As Llama 2 (strip 1) and Gemma (strip 0) have it: spaces as U+2581, unknown characters as byte tokens."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({"▁", *"abcdefghijklmnopqrstuvwxyz,.;?'東京水你好"})
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("▁", "▁")]
    pieces = [*byte_pieces, *letters, *(left + right for left, right in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", strip, 0)] if strip else decode)
    return _wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """A decoder that is not known by name: its text goes through the tokenizer itself, over a window."""
    pieces = [("<unk>", 0.0), *((letter, -3.0) for letter in sorted({"▁", *"".join(CORPUS)} - {" "}))]
    pieces += [("▁the", -2.0), ("▁fox", -2.0), ("jump", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer)


KINDS = {
    "byte-level": byte_level(),
    "sentencepiece, stripped": sentencepiece(1),
    "sentencepiece": sentencepiece(0),
    "metaspace": metaspace(),
}
FRAGMENTS = [*CORPUS, "👩‍👩‍👧‍👦", "e\u0301", "  ", "<think>", "</think>", "the fox", "\u200d"]
HARD_TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join),
    st.text(alphabet="abc the,水😀é\n", max_size=60),
)


def _encode_in_parts(tokenizer: Any, text: str, cuts: Iterable[int]) -> list[int]:
    """Ids of the text tokenised part by part, so that token borders fall where no tokenizer would put them."""
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    parts = [text[start:end] for start, end in itertools.pairwise(borders)]
    return [token_id for part in parts for token_id in tokenizer.encode(part, add_special_tokens=False)]


def _stream(stream: TextStream, ids: Iterable[int]) -> list[str]:
    return [*map(stream.push, ids), stream.flush()]


def _whole(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@given(text=HARD_TEXTS, cuts=st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=150, deadline=None)
def test_streamed_text_equals_decoding_the_whole(kind: str, text: str, cuts: list[int]) -> None:
    tokenizer = KINDS[kind]
    ids = _encode_in_parts(tokenizer, text, cuts)
    assert "".join(_stream(TextStream(tokenizer), ids)) == _whole(tokenizer, ids)


@given(ids=st.lists(st.integers(0, len(KINDS["byte-level"]) + 3), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_byte_tokens_broken_or_not_decode_as_the_whole_does(ids: list[int]) -> None:
    tokenizer = KINDS["byte-level"]
    assert "".join(_stream(TextStream(tokenizer), ids)) == _whole(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=HARD_TEXTS, cuts=st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=100, deadline=None)
def test_no_piece_holds_half_a_character(kind: str, text: str, cuts: list[int]) -> None:
    tokenizer = KINDS[kind]
    ids = _encode_in_parts(tokenizer, text.replace(REPLACEMENT, ""), cuts)
    assert REPLACEMENT not in "".join(_stream(TextStream(tokenizer), ids))


def _naive_cut(text: str, stop: tuple[str, ...], include_stop: bool) -> str:
    for end in range(1, len(text) + 1):
        complete = [one for one in stop if text[:end].endswith(one)]
        if complete:
            return text[:end] if include_stop else text[: end - max(map(len, complete))]
    return text


@given(
    text=st.text(alphabet="abé水 ", max_size=40),
    stop=st.lists(st.text(alphabet="abé水 ", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=8),
    include_stop=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_as_they_would_cut_the_whole_text(
    text: str, stop: list[str], cuts: list[int], include_stop: bool
) -> None:
    tokenizer = KINDS["byte-level"]
    ids = _encode_in_parts(tokenizer, text, cuts)
    expected = _naive_cut(text, tuple(stop), include_stop)
    stream = TextStream(tokenizer, tuple(stop), include_stop)
    shown = ""
    for piece in _stream(stream, ids):
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected
    assert stream.stopped == any(one in text for one in stop)


def test_a_possible_stop_string_is_held_back_and_released_when_it_is_none() -> None:
    tokenizer = KINDS["byte-level"]
    stream = TextStream(tokenizer, ("END!",))
    pieces = [stream.push(token_id) for part in ("x", "E", "N", "D", "s") for token_id in tokenizer.encode(part)]
    assert pieces == ["x", "", "", "", "ENDs"]
    assert not stream.stopped


def test_nothing_follows_a_stop_string() -> None:
    tokenizer = KINDS["byte-level"]
    stream = TextStream(tokenizer, ("b",))
    assert "".join(map(stream.push, tokenizer.encode("abc"))) == "a"
    assert stream.stopped
    assert stream.push(tokenizer.encode("z")[0]) == "" and stream.flush() == ""


def test_special_tokens_are_skipped_and_added_ones_are_text() -> None:
    tokenizer = KINDS["byte-level"]
    ids = tokenizer.encode("<|turn|><think>so</think>yes<|end|>")
    assert "".join(_stream(TextStream(tokenizer), ids)) == "<think>so</think>yes"


def test_an_unfinished_character_shows_only_at_the_end() -> None:
    tokenizer = KINDS["byte-level"]
    ids = tokenizer.encode("🌊")[:-1]
    stream = TextStream(tokenizer)
    assert ids and "".join(map(stream.push, ids)) == ""
    assert stream.flush() == REPLACEMENT


def test_a_long_text_costs_the_same_per_token_at_its_end() -> None:
    """Counts what the tokenizer is asked to decode: a window, never the text so far."""
    asked: list[int] = []

    class Counting(PreTrainedTokenizerFast):
        def decode(self, token_ids: Any, *arguments: Any, **options: Any) -> Any:
            asked.append(len(token_ids))
            return super().decode(token_ids, *arguments, **options)

    plain = KINDS["metaspace"]
    tokenizer = Counting(tokenizer_object=plain.backend_tokenizer, clean_up_tokenization_spaces=False)
    ids = plain.encode("the fox jumps over " * 100)
    assert "".join(_stream(TextStream(tokenizer), ids)) == _whole(plain, ids)
    assert max(asked) <= 64
