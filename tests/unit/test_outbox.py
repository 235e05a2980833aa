"""A worker's outbox numbers without gap, merges what waits, repeats what is unconfirmed, and lets the end come last."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from scheduler.job import ClaimedJob, Priority
from scheduler.request import Usage
from scheduler.tokens import ChoiceDelta, Delta, EventId, decode_event
from workers.backend import ChoiceProgress, JobDone, JobError, JobProgress
from workers.outbox import Outbox, as_progress


def _job(job_id: str = "job-t-1", attempt: int = 1) -> ClaimedJob:
    return ClaimedJob(job_id, attempt, b"", Priority.NORMAL, "ann")


def _gain(token: int, job_id: str = "job-t-1", attempt: int = 1, **fields: Any) -> JobProgress:
    return JobProgress(job_id, attempt, (ChoiceDelta(0, (token,), f"{token} ", **fields),))


def _tokens(payload: bytes) -> tuple[int, ...]:
    event = decode_event(payload)
    assert isinstance(event, Delta)
    return event.choices[0].token_ids


def test_deltas_that_wait_are_merged_into_one_event() -> None:
    outbox = Outbox()
    outbox.hold(_job())
    for token in (7, 8, 9):
        outbox.take_in(_gain(token))
    ((job_id, at, payload),) = outbox.batch()
    assert (job_id, at, _tokens(payload)) == ("job-t-1", EventId(1, 1), (7, 8, 9))


def test_an_unconfirmed_batch_is_repeated_as_it_was() -> None:
    outbox = Outbox()
    outbox.hold(_job(attempt=3))
    outbox.take_in(_gain(7, attempt=3))
    first = outbox.batch()
    outbox.take_in(_gain(8, attempt=3))
    assert outbox.batch() == first
    outbox.confirm()
    ((_, at, payload),) = outbox.batch()
    assert (at, _tokens(payload)) == (EventId(3, 2), (8,))


def test_the_end_comes_after_the_last_delta_is_confirmed() -> None:
    outbox = Outbox()
    outbox.hold(_job())
    outbox.take_in(_gain(7))
    outbox.batch()
    outbox.take_in(_gain(8))
    outbox.take_in(JobDone("job-t-1", 1, Usage(completion_tokens=2)))
    outbox.confirm()
    assert outbox.ended() == [] and outbox.has_news
    outbox.batch()
    outbox.confirm()
    assert outbox.ended() == [(_job(), JobDone("job-t-1", 1, Usage(completion_tokens=2)))]


def test_what_other_attempts_say_is_ignored() -> None:
    outbox = Outbox()
    outbox.hold(_job(attempt=2))
    outbox.take_in(_gain(7, attempt=1))
    outbox.take_in(_gain(7, job_id="job-t-2"))
    outbox.take_in(JobError("job-t-1", 1, "engine_failure", "x"))
    assert outbox.batch() == [] and not outbox.has_news


def test_a_dropped_job_leaves_the_batch_and_the_others_stay() -> None:
    outbox = Outbox()
    outbox.hold(_job("job-t-1"))
    outbox.hold(_job("job-t-2"))
    outbox.take_in(_gain(1, "job-t-1"))
    outbox.take_in(_gain(2, "job-t-2"))
    outbox.batch()
    outbox.drop("job-t-1")
    assert [event[0] for event in outbox.batch()] == ["job-t-2"]
    assert [job.id for job in outbox.jobs] == ["job-t-2"]


def test_a_job_claimed_again_starts_over_with_its_new_attempt() -> None:
    outbox = Outbox()
    outbox.hold(_job(attempt=1))
    outbox.take_in(_gain(1, attempt=1))
    outbox.batch()
    outbox.hold(_job(attempt=2))
    assert outbox.batch() == []
    outbox.take_in(_gain(5, attempt=2))
    assert outbox.batch()[0][1] == EventId(2, 1)


@given(st.lists(st.sampled_from(["gain", "batch", "confirm"]), max_size=60))
def test_confirmed_events_hold_every_token_once_in_order_without_a_gap(moves: list[str]) -> None:
    outbox = Outbox()
    outbox.hold(_job())
    drawn, seen, sequence = 0, [], []
    for move in [*moves, "batch", "confirm", "batch", "confirm"]:
        if move == "gain":
            outbox.take_in(_gain(drawn))
            drawn += 1
        elif move == "batch":
            outbox.batch()
        else:
            for _, at, payload in outbox.batch():
                seen += _tokens(payload)
                sequence.append(at.seq)
            outbox.confirm()
    assert seen == list(range(drawn))
    assert sequence == list(range(1, len(sequence) + 1))


def test_progress_of_earlier_attempts_keeps_ids_text_and_end() -> None:
    visible = (ChoiceDelta(0, (1, 2), "ab"), ChoiceDelta(1, (3,), "c", "stop"))
    assert as_progress(visible) == (ChoiceProgress(0, (1, 2), "ab", None), ChoiceProgress(1, (3,), "c", "stop"))
