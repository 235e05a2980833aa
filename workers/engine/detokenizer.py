"""Turns token ids into the text that may be shown now: whole characters, and nothing that may become a stop string.

One TextStream per choice, on the engine thread. A choice taken over from another worker is replayed through a fresh
TextStream: equal tokens give equal text, whatever the pace at which they came.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable
from typing import Any, Protocol

from scheduler.telemetry import get_logger

_log = get_logger(__name__)

REPLACEMENT = "\ufffd"
_SPIECE_SPACE = "\u2581"
_PROBE = "The quick brown fox, 42 × naïve — 你好 🌊\n\tdone"

# Windowed decoding: how many ids of context stay, when the window slides, and where it slides in any case.
_CONTEXT_IDS, _SLIDE_IDS, _FORCED_SLIDE_IDS = 4, 12, 64
# An unfinished UTF-8 character has at most three bytes, so at most that many trailing replacement characters.
_UNFINISHED_CHARS = 3


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """The visible text of one choice, token by token.

    Special tokens are skipped, added tokens that are not special (`<think>`) are text like any other. The stop string
    that is complete first ends the text (the longest of those that end at the same character), so the result does not
    depend on where token borders fall. U+FFFD appears only where the bytes really are broken. O(1) per token.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), include_stop: bool = False) -> None:
        self._decoder = _decoder_for(tokenizer)
        self._stop = tuple(text for text in stop if text)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._include_stop = include_stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one token; return the text that may be shown now. After a stop string: nothing more."""
        if self.stopped:
            return ""
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """The end without a stop string: what was held back. Bytes of an unfinished character become U+FFFD."""
        if self.stopped:
            return ""
        shown = self._release(self._decoder.flush())
        if self.stopped:
            return shown
        rest, self._held = self._held, ""
        return shown + rest

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        if not text:
            return ""
        self._held += text
        match = self._first_match()
        if match is not None:
            self.stopped = True
            start, end = match
            shown, self._held = self._held[: end if self._include_stop else start], ""
            return shown
        keep = self._held_back_chars()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _first_match(self) -> tuple[int, int] | None:
        """(start, end) of the stop string that is complete first; what was held back can begin one, never hold one."""
        best: tuple[int, int] | None = None
        for stop in self._stop:
            start = self._held.find(stop)
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or (end, start) < (best[1], best[0]):
                best = (start, end)
        return best

    def _held_back_chars(self) -> int:
        """Length of the longest tail that is a proper beginning of a stop string."""
        for length in range(min(len(self._held), self._longest_stop - 1), 0, -1):
            tail = self._held[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0


class _Pieces:
    """The bytes that each token id stands for, learned on demand; one per tokenizer, shared by all its streams."""

    def __init__(self, tokenizer: Any, to_bytes: Callable[[str], bytes], strip_leading: int) -> None:
        self._tokenizer = tokenizer
        self._to_bytes = to_bytes
        self._hidden = special_ids(tokenizer)
        self._known: dict[int, bytes] = {}
        self.strip_leading = strip_leading

    def bytes_of(self, token_id: int) -> bytes:
        """b"" for special tokens and for ids beyond the vocabulary (padded logits)."""
        known = self._known.get(token_id)
        if known is None:
            piece = None if token_id in self._hidden else self._tokenizer.convert_ids_to_tokens(token_id)
            known = self._known[token_id] = b"" if piece is None else self._to_bytes(piece)
        return known


class _ByteDecoder:
    """Joins the tokens' bytes through an incremental UTF-8 decoder: exact at every border, without looking back."""

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = pieces.strip_leading

    def push(self, token_id: int) -> str:
        return self._stripped(self._utf8.decode(self._pieces.bytes_of(token_id)))

    def flush(self) -> str:
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip and text.startswith(" "):
            text = text[1:]
            self._strip -= 1
        if text:
            self._strip = 0
        return text


class _WindowDecoder:
    """For tokenizers whose decoder is none of the two known kinds: asks the tokenizer itself, over a short window."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._hidden = special_ids(tokenizer)
        self._window: list[int] = []
        self._shown_chars = 0

    def push(self, token_id: int) -> str:
        if token_id in self._hidden or self._tokenizer.convert_ids_to_tokens(token_id) is None:
            return ""
        self._window.append(token_id)
        text = self._decode()
        tail = len(text) - len(text.rstrip(REPLACEMENT))
        unfinished = min(tail, _UNFINISHED_CHARS)
        shown = self._show(text, len(text) - unfinished)
        if (len(self._window) >= _SLIDE_IDS and not unfinished) or len(self._window) >= _FORCED_SLIDE_IDS:
            shown += self._show(text, len(text))
            self._window = self._window[-_CONTEXT_IDS:]
            self._shown_chars = len(self._decode())
        return shown

    def flush(self) -> str:
        text = self._decode()
        return self._show(text, len(text))

    def _show(self, text: str, end: int) -> str:
        shown = text[self._shown_chars : end]
        self._shown_chars = max(self._shown_chars, end)
        return shown

    def _decode(self) -> str:
        return _plain_decode(self._tokenizer, self._window)


@functools.lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that never show as text: the added tokens that the tokenizer marks as special."""
    return frozenset(token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)


def _decoder_for(tokenizer: Any) -> _Decoder:
    pieces = _pieces_of(tokenizer)
    return _WindowDecoder(tokenizer) if pieces is None else _ByteDecoder(pieces)


@functools.lru_cache(maxsize=8)
def _pieces_of(tokenizer: Any) -> _Pieces | None:
    """The byte table of a tokenizer whose decoder is known and agrees with it on a probe, else None."""
    pieces = _known_pieces(tokenizer)
    if pieces is None:
        return None
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    decoder = _ByteDecoder(pieces)
    text = "".join(map(decoder.push, ids)) + decoder.flush()
    if text == _plain_decode(tokenizer, ids):
        return pieces
    _log.warning("tokenizer decodes unlike its declared decoder; its text is decoded over a window instead")
    return None


def _known_pieces(tokenizer: Any) -> _Pieces | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return None
    declared: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    if declared["type"] == "ByteLevel":
        return _Pieces(tokenizer, _byte_level_bytes, strip_leading=0)
    steps = declared.get("decoders", [])
    kinds = [step["type"] for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    if steps[0]["pattern"] != {"String": _SPIECE_SPACE} or steps[0]["content"] != " ":
        return None
    strip = steps[3] if kinds[3:] else {"content": " ", "start": 0, "stop": 0}
    if strip["content"] != " " or strip["stop"] != 0:
        return None
    return _Pieces(tokenizer, _sentencepiece_bytes, strip_leading=strip["start"])


def _plain_decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPIECE_SPACE, " ").encode("utf-8")


def _byte_level_bytes(piece: str) -> bytes:
    """A piece with any character outside the byte alphabet (an added token) stands for itself, as in HF tokenizers."""
    try:
        return bytes(map(_BYTE_OF_CHAR.__getitem__, piece))
    except KeyError:
        return piece.encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE (GPT-2) writes for each byte: itself if printable, else from U+0100 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes that one token stands for, a special token's name included; b"" beyond the vocabulary."""
    pieces = _pieces_of(tokenizer)
    if pieces is not None and token_id not in special_ids(tokenizer):
        return pieces.bytes_of(token_id)
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None or token_id in special_ids(tokenizer):
        return (piece or "").encode()
    return tokenizer.decode([token_id]).encode()
