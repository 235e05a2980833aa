"""Events of a chat job → OpenAI's bodies: stream chunks, and the whole completion. Pure; called by routes/chat.

The chunk path runs once per relayed token, so a chunk is joined from bytes made beforehand and one JSON string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from scheduler.request import Usage
from scheduler.tokens import ChoiceDelta, Delta, PositionLogprobs, TokenLogprob

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0  # what OpenAI says for an impossible token; JSON has no infinity

_encode = msgspec.json.Encoder().encode
# Line readers that follow Unicode would cut an event in two at these.
_LINE_BREAKS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


@dataclass(frozen=True, slots=True)
class CompletionHead:
    """What every chunk and the whole completion say alike; `created_s` is Unix time."""

    id: str
    created_s: int
    model: str
    service_tier: str


class ChunkEncoder:
    """The stream chunks of one job. `unfinished` holds the choices that have had no finish chunk yet."""

    def __init__(self, head: CompletionHead, n: int, include_usage: bool) -> None:
        self._head = (
            b'data: {"id":%s,"object":"chat.completion.chunk","created":%d,"model":%s,"service_tier":%s,'
            b'"system_fingerprint":null,"choices":['
        ) % (json_text(head.id), head.created_s, json_text(head.model), json_text(head.service_tier))
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._content_heads = [self._head + b'{"index":%d,"delta":{"content":' % index for index in range(n)]
        self._content_end = b'},"logprobs":null,"finish_reason":null}' + self._end
        self.unfinished = set(range(n))

    def opening(self) -> bytes:
        """The first chunk of every choice, in order of index: its role."""
        delta = b'"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}'
        chunks = (self._head + b'{"index":%d,' % index + delta + self._end for index in range(len(self._content_heads)))
        return b"".join(chunks)

    def delta(self, delta: Delta) -> bytes:
        """What the choices gained; empty where all of it is held back."""
        parts: list[bytes] = []
        for choice in delta.choices:
            if choice.logprobs:
                parts += (self._content_heads[choice.index], json_text(choice.text), b'},"logprobs":')
                parts += (_escaped(_encode(_logprobs(choice.logprobs))), b',"finish_reason":null}', self._end)
            elif choice.text:
                parts += (self._content_heads[choice.index], json_text(choice.text), self._content_end)
            if choice.finish_reason is not None:
                self.unfinished.discard(choice.index)
                parts += (self._head, b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"' % choice.index)
                parts += (choice.finish_reason.encode(), b'"}', self._end)
        return b"".join(parts)

    def usage(self, usage: Usage) -> bytes:
        """The extra last chunk that `include_usage` asks for."""
        return self._head + b'],"usage":' + _encode(usage_body(usage)) + b"}\n\n"


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list[str])
    logprobs: list[PositionLogprobs] = field(default_factory=list[PositionLogprobs])
    finish_reason: str | None = None


class CompletionBuilder:
    """Gathers a job's deltas into the whole completion."""

    def __init__(self, n: int) -> None:
        self._choices = [_Choice() for _ in range(n)]

    @property
    def unfinished(self) -> list[int]:
        return [index for index, choice in enumerate(self._choices) if choice.finish_reason is None]

    def add(self, delta: Delta) -> None:
        for gained in delta.choices:
            self._add(self._choices[gained.index], gained)

    def build(self, head: CompletionHead, usage: Usage, with_logprobs: bool) -> bytes:
        """The response body."""
        body: dict[str, Any] = {
            "id": head.id,
            "object": "chat.completion",
            "created": head.created_s,
            "model": head.model,
            "choices": [
                _choice_body(index, choice, with_logprobs=with_logprobs) for index, choice in enumerate(self._choices)
            ],
            "usage": usage_body(usage),
            "service_tier": head.service_tier,
            "system_fingerprint": None,
        }
        return _encode(body)

    @staticmethod
    def _add(choice: _Choice, gained: ChoiceDelta) -> None:
        choice.texts.append(gained.text)
        choice.logprobs.extend(gained.logprobs)
        if gained.finish_reason is not None:
            choice.finish_reason = gained.finish_reason


def json_text(text: str) -> bytes:
    """`text` as a JSON string that no line reader splits."""
    encoded = _encode(text)
    return encoded if text.isascii() else _escaped(encoded)


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _choice_body(index: int, choice: _Choice, *, with_logprobs: bool) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None, "annotations": []},
        "logprobs": _logprobs(choice.logprobs) if with_logprobs else None,
        "finish_reason": choice.finish_reason,
    }


def _escaped(encoded: bytes) -> bytes:
    for raw, escape in _LINE_BREAKS:
        if raw in encoded:
            encoded = encoded.replace(raw, escape)
    return encoded


def _logprobs(positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
    content = [
        {**_candidate(position.chosen), "top_logprobs": [_candidate(top) for top in position.top]}
        for position in positions
    ]
    return {"content": content, "refusal": None}


def _candidate(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "logprob": max(token.logprob, LOWEST_LOGPROB),
        "bytes": list(token.bytes) if token.bytes else None,
    }
