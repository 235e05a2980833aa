"""Cancelling and handing back, wherever the job is."""

from __future__ import annotations

import time

from redis.asyncio import Redis

from scheduler.job import JobState
from scheduler.lifecycle import Lifecycle
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Outcome
from scheduler.tokens import Failed, decode_event
from tests.queue_cases import WORKER, claim, claim_one, emit, enqueue, log_ids, state_of, succeed


async def test_a_queued_job_is_cancelled_at_once_with_a_terminal_event(queue: JobQueue, redis: Redis) -> None:
    job_id = await enqueue(queue)
    assert await queue.cancel(job_id) is JobState.CANCELLED
    ((at, payload),) = await queue.read_events(job_id, None)
    event = decode_event(payload)
    assert at.is_terminal and isinstance(event, Failed) and event.code == "cancelled"
    assert await claim(queue) == [] and await queue.depths() == {}
    assert await redis.keys(queue.keys.of("queue") + "*") == []
    assert await queue.cancel(job_id) is JobState.CANCELLED


async def test_cancelling_one_of_several_leaves_the_others_in_order(queue: JobQueue) -> None:
    ids = [await enqueue(queue) for _ in range(4)]
    for cancelled in (ids[0], ids[2]):
        await queue.cancel(cancelled)
    assert [job.id for job in await claim(queue)] == [ids[1], ids[3]]


async def test_a_job_for_later_is_cancelled_at_once(queue: JobQueue, redis: Redis) -> None:
    job_id = await enqueue(queue, not_before_ms=int(time.time() * 1000) + 60_000)
    assert await queue.cancel(job_id) is JobState.CANCELLED
    assert await redis.zcard(queue.keys.of("due")) == 0 and await queue.depths() == {}


async def test_the_worker_of_a_running_job_learns_by_its_next_emit(queue: JobQueue, lifecycle: Lifecycle) -> None:
    await enqueue(queue)
    await enqueue(queue)
    job, neighbour = await claim(queue)
    assert await queue.cancel(job.id) is JobState.RUNNING
    assert (await emit(queue, neighbour, 1, "a")).cancelled == {job.id}
    assert await lifecycle.cancelled(WORKER, job)
    assert await state_of(queue, job.id) is JobState.CANCELLED
    event = decode_event((await queue.read_events(job.id, None))[-1][1])
    assert isinstance(event, Failed) and event.code == "cancelled"
    assert (await queue.emit(WORKER, [])).cancelled == frozenset()


async def test_a_job_that_finished_before_it_heard_of_the_cancel_has_its_answer(queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    await queue.cancel(job.id)
    assert await succeed(queue, job)
    assert await state_of(queue, job.id) is JobState.SUCCEEDED
    assert (await queue.emit(WORKER, [])).cancelled == frozenset()
    assert await queue.cancel(job.id) is JobState.SUCCEEDED


async def test_a_cancel_survives_the_death_of_the_worker_and_ends_the_job(queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    await queue.cancel(job.id)
    await queue.expire_worker(WORKER)
    assert await state_of(queue, job.id) is JobState.CANCELLED
    assert (await log_ids(queue, job.id))[-1] == "1-4294967295"


async def test_a_cancel_beats_a_retry_and_a_hand_back(queue: JobQueue) -> None:
    for _ in range(2):
        await enqueue(queue)
    one, two = await claim(queue)
    for job in (one, two):
        await queue.cancel(job.id)
    assert await queue.finish(WORKER, one.id, 1, Outcome(JobState.SCHEDULED, retry_delay_ms=1000, error_code="x"))
    assert await queue.hand_back(WORKER, two.id, 1)
    for job in (one, two):
        assert await state_of(queue, job.id) is JobState.CANCELLED
    assert await queue.depths() == {}


async def test_handing_back_burns_no_attempt_however_often(queue: JobQueue) -> None:
    job_id = await enqueue(queue)
    for attempt in range(1, 13):
        job = await claim_one(queue, f"w:{attempt}")
        assert (job.id, job.attempt, job.lost, job.failures) == (job_id, attempt, 0, 0)
        assert await queue.hand_back(f"w:{attempt}", job_id, attempt)
    assert await state_of(queue, job_id) is JobState.QUEUED


async def test_a_handed_back_job_goes_on_where_it_was(queue: JobQueue) -> None:
    await enqueue(queue)
    first = await claim_one(queue)
    await emit(queue, first, 1, "a")
    assert await queue.hand_back(WORKER, first.id, first.attempt)
    assert await queue.hand_back(WORKER, first.id, first.attempt)  # repeated after a lost reply
    assert (await emit(queue, first, 2, "late")).fenced == {first.id}
    second = await claim_one(queue, "w:2")
    assert second.attempt == 2
    assert await log_ids(queue, first.id) == ["1-0", "1-1", "2-0"]
