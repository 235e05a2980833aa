"""Outcomes on their way to SQL are read as this version writes them, and as the one before did."""

from __future__ import annotations

import msgspec

from scheduler.job import JobState
from scheduler.queue.records import ended_job

FIELDS = {
    "state": "succeeded",
    "pool": "p",
    "class": "low",
    "tenant": "ann",
    "attempt": "2",
    "created": "5",
    "a:2": "7 w",
}


def test_an_outcome_that_an_older_version_wrote_field_by_field_reads_like_a_packed_one() -> None:
    packed = ended_job({b"id": b"one", b"job": msgspec.msgpack.encode(FIELDS | {"attempt": 2})})
    flat = ended_job({b"id": b"one"} | {name.encode(): value.encode() for name, value in FIELDS.items()})
    assert packed == flat
    assert (flat.state, flat.attempt, flat.attempts[0].worker) == (JobState.SUCCEEDED, 2, "w")
