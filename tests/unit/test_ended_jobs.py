"""Outcomes on their way to SQL: the job as it was before its end, and what the end changed."""

from __future__ import annotations

import msgspec

from scheduler.job import JobState, NewJob, Priority
from scheduler.queue.records import ended_job, packed_spec

JOB = NewJob(
    id="job-p-1",
    pool="a b",
    priority=Priority.LOW,
    tenant="ann",
    cost_tokens=7,
    body=b"",
    model="org/a b",
    batch_id="b1",
)


def test_an_outcome_is_the_job_before_its_end_and_what_that_changed() -> None:
    before = {
        "spec": packed_spec(JOB, 1000).decode(),
        "state": "running",
        "class": "low",
        "attempt": "2",
        "created": "5",
        "code": "timeout",
        "message": "an earlier try",
        "a:2": "7 w",
    }
    flat = [word for pair in before.items() for word in pair]
    changed = {"state": "succeeded", "prompt": "3", "completion": "4", "cached": "0", "code": False, "message": False}
    job = ended_job({b"id": b"job-p-1", b"job": msgspec.msgpack.encode((flat, changed))})
    assert (job.state, job.attempt, job.attempts[0].worker) == (JobState.SUCCEEDED, 2, "w")
    assert (job.pool, job.model, job.tenant, job.batch_id, job.durable) == ("a b", "org/a b", "ann", "b1", False)
    assert (job.error_code, job.error_message) == (None, None)
    assert job.usage is not None and (job.usage.prompt_tokens, job.usage.completion_tokens) == (3, 4)


OLD_FIELDS = {
    "state": "succeeded",
    "pool": "p",
    "class": "low",
    "tenant": "ann",
    "attempt": "2",
    "created": "5",
    "a:2": "7 w",
}


def test_outcomes_that_older_versions_wrote_are_read_too() -> None:
    packed = ended_job({b"id": b"one", b"job": msgspec.msgpack.encode(OLD_FIELDS | {"attempt": 2})})
    flat = ended_job({b"id": b"one"} | {name.encode(): value.encode() for name, value in OLD_FIELDS.items()})
    assert packed == flat
    assert (flat.state, flat.pool, flat.attempt, flat.attempts[0].worker) == (JobState.SUCCEEDED, "p", 2, "w")
