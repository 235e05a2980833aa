"""What a job no longer is must not stay in its hash: an earlier error, a cancel that is over, attempts long past."""

from __future__ import annotations

from redis.asyncio import Redis

from scheduler.job import JobState
from scheduler.queue.done_log import DoneLog
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Outcome
from scheduler.settings import Settings
from tests.queue_cases import POOL, WORKER, ask, claim_one, enqueue, new_job, state_of, succeed

AGAIN = Outcome(JobState.FAILED, retry_delay_ms=0, error_code="engine_failed", error_message="it failed")
CANCELLED = Outcome(JobState.CANCELLED)


async def test_an_error_of_an_earlier_try_is_not_told_of_a_job_that_succeeded(
    queue: JobQueue, redis: Redis, settings: Settings
) -> None:
    job_id = await enqueue(queue)
    await queue.finish(WORKER, job_id, (await claim_one(queue)).attempt, AGAIN)
    await succeed(queue, await claim_one(queue))
    view = await queue.view(job_id)
    assert view is not None and (view.state, view.error_code) == (JobState.SUCCEEDED, None)
    (record,) = await DoneLog(redis, settings).read_done("recorder", 10, 10)
    assert (record.job.state, record.job.error_code) == (JobState.SUCCEEDED, None)


async def test_a_cancel_that_is_over_does_not_end_the_replayed_job(queue: JobQueue) -> None:
    job_id = await enqueue(queue, durable=True)
    job = await claim_one(queue)
    await queue.cancel(job_id)
    await queue.finish(WORKER, job_id, job.attempt, CANCELLED)
    assert await state_of(queue, job_id) is JobState.CANCELLED
    assert await queue.replay(job_id) is JobState.QUEUED
    again = await claim_one(queue)
    assert await queue.hand_back(WORKER, job_id, again.attempt)
    assert await state_of(queue, job_id) is JobState.QUEUED


async def test_a_cancel_that_came_too_late_leaves_the_key_to_the_job_that_succeeded(queue: JobQueue) -> None:
    first = new_job(idempotency_key="k", body_digest="d")
    await queue.enqueue(first)
    job = await claim_one(queue)
    await queue.cancel(first.id)
    await succeed(queue, job)
    answer = await queue.enqueue(new_job(idempotency_key="k", body_digest="d"))
    assert (answer.job_id, answer.created) == (first.id, False)


async def test_a_job_keeps_the_places_of_its_last_sixteen_attempts(queue: JobQueue) -> None:
    job_id = await enqueue(queue)
    for _ in range(20):
        job = await claim_one(queue)
        assert await queue.hand_back(WORKER, job_id, job.attempt)
    view = await queue.view(job_id)
    assert view is not None and [attempt.attempt for attempt in view.attempts] == list(range(5, 21))


async def test_a_job_that_an_older_version_enqueued_is_run(queue: JobQueue, redis: Redis) -> None:
    job_id = await enqueue(queue, durable=True)
    key = queue.keys.job(job_id)
    old = (
        "pool",
        POOL,
        "tenant",
        "ann",
        "model",
        "demo",
        "cost",
        100,
        "kv",
        100,
        "rows",
        1,
        "qttl",
        1000,
        "durable",
        1,
    )
    await ask(redis, "HSET", key, *old, "lane", "normal", "attempt", 0, "deadline", 0, "batch", "")
    await ask(redis, "HDEL", key, "spec")
    view = await queue.view(job_id)
    assert view is not None and (view.tenant, view.durable, view.batch_id) == ("ann", True, None)
    job = await claim_one(queue)
    assert (job.id, job.rows) == (job_id, 1)
    await succeed(queue, job)
    assert await state_of(queue, job_id) is JobState.SUCCEEDED
