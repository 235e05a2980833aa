"""The events of a job, numbered `<attempt>-<seq>`: Started | Delta | Finished | Failed.

Workers write them (the event log and the job's channel), the API relays them. Sequence 0 of an attempt is its
Started, written by the claim; SEQ_TERMINAL is its Finished or Failed, written by the finish; in between come Deltas.
Payloads are msgpack and a wire format: add fields with defaults, never rename one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from scheduler.request import Usage

SEQ_STARTED = 0
SEQ_TERMINAL = 4_294_967_295

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class EventId(NamedTuple):
    """Position of an event in its job's log; ordered, and equal to the Redis stream id `<attempt>-<seq>`."""

    attempt: int
    seq: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"

    @staticmethod
    def parse(text: str | bytes) -> EventId:
        """Parse `<attempt>-<seq>`; raises ValueError on anything else."""
        attempt, _, seq = (text.decode("ascii") if isinstance(text, bytes) else text).partition("-")
        return EventId(int(attempt), int(seq))

    @property
    def is_terminal(self) -> bool:
        return self.seq == SEQ_TERMINAL

    def precedes(self, other: EventId) -> bool:
        """Whether `other` is the direct successor within the same attempt (no event lies between)."""
        return self.attempt == other.attempt and other.seq == self.seq + 1


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One candidate token: its text, log-probability (natural log) and the bytes it stands for."""

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()


class PositionLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one output position: the chosen token, then the top candidates, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


class ChoiceDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one choice gained: its token ids, and the text that may be shown (held-back text comes later)."""

    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()


class Started(msgspec.Struct, frozen=True, tag="started"):
    """An attempt was claimed by a worker."""

    worker: str = ""
    at_ms: int = 0


class Delta(msgspec.Struct, frozen=True, tag="delta"):
    """New tokens, of one or more choices of the job."""

    choices: tuple[ChoiceDelta, ...]


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The job ended with an answer. `after_seq`: the last sequence number before this one, so that a reader which has
    that event knows that nothing lies between; None: unknown."""

    usage: Usage
    after_seq: int | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job ended without a (whole) answer. `code` names a class of scheduler/errors.py."""

    code: str
    message: str
    param: str | None = None


TokenEvent = Started | Delta | Finished | Failed

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(TokenEvent)


def encode_event(event: TokenEvent) -> bytes:
    return _encoder.encode(event)


def decode_event(payload: bytes) -> TokenEvent:
    """The inverse of `encode_event`; raises msgspec.ValidationError on a payload this version cannot read."""
    return _decoder.decode(payload)


def merge_deltas(first: Delta, second: Delta) -> Delta:
    """One Delta that says what `first` then `second` said, choice by choice."""
    merged = {choice.index: choice for choice in first.choices}
    for choice in second.choices:
        before = merged.get(choice.index)
        merged[choice.index] = choice if before is None else _append(before, choice)
    return Delta(choices=tuple(merged.values()))


def _append(before: ChoiceDelta, after: ChoiceDelta) -> ChoiceDelta:
    return ChoiceDelta(
        index=before.index,
        token_ids=before.token_ids + after.token_ids,
        text=before.text + after.text,
        finish_reason=after.finish_reason,
        logprobs=before.logprobs + after.logprobs,
    )
