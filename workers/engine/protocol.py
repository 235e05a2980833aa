"""The pipe between a worker and its engine process: length-prefixed msgpack frames, one struct per frame.

Worker → engine on the engine's stdin: Submit | Cancel. End of file means: exit now.
Engine → worker on a private file descriptor: Loading* then Ready | LoadFailed, then Step frames.
"""

from __future__ import annotations

import struct

import msgspec

from scheduler.histogram import Histogram
from scheduler.model_card import ModelCard
from workers.backend import BackendEvent, ChoiceProgress

HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 256 * 2**20


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Run this job. `body` is an encoded InferenceRequest; `priority_rank` 0 is the highest class.

    `isolation`: KV is shared with jobs of the same tag only.
    """

    job_id: str
    attempt: int
    body: bytes
    priority_rank: int = 1
    progress: tuple[ChoiceProgress, ...] = ()
    isolation: str = ""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    job_id: str
    attempt: int


ToEngine = Submit | Cancel


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress of start-up, for the log and the terminal."""

    message: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    card: ModelCard
    pid: int


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The engine cannot serve; `message` is one line for the user. The process exits after it."""

    message: str


class Step(msgspec.Struct, frozen=True, tag="step"):
    """What one step brought, and the engine's room after it. Sent without events every 500 ms as a sign of life.

    `accepted` counts the Submit frames that `free_rows` and `free_kv_tokens` already allow for. `stats` and
    `histograms` count since start; while it works they come a few times a second and are empty in between.
    """

    events: tuple[BackendEvent, ...]
    busy_rows: int
    free_rows: int
    free_kv_tokens: int
    waiting: int = 0
    step_count: int = 0
    stats: dict[str, float] = {}
    accepted: int = 0
    histograms: dict[str, Histogram] = {}


FromEngine = Loading | Ready | LoadFailed | Step

_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)
_encoder = msgspec.msgpack.Encoder()


def frame(message: ToEngine | FromEngine) -> bytes:
    """One frame: little-endian u32 length, then msgpack."""
    payload = _encoder.encode(message)
    return HEADER.pack(len(payload)) + payload


def decode_to_engine(payload: bytes) -> ToEngine:
    return _to_engine.decode(payload)


def decode_from_engine(payload: bytes) -> FromEngine:
    return _from_engine.decode(payload)
