"""Calls of one moment share a write and nothing else: each has its own reply, its own refusal, its own cancellation."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from scheduler.errors import QueueFull
from scheduler.job import JobState, Priority
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Enqueued, Outcome
from scheduler.request import Usage
from scheduler.settings import Settings
from scheduler.tokens import Finished, encode_event
from tests.conftest import wait_until
from tests.queue_cases import WORKER, ask, changed, claim, enqueue, new_job, state_of, succeed

DONE = Outcome(JobState.SUCCEEDED, encode_event(Finished(Usage())))


async def _reads(redis: Redis) -> int:
    """How often Redis has read from a client so far."""
    return int((await ask(redis, "INFO", "stats"))["total_reads_processed"])


async def test_jobs_enqueued_at_once_reach_redis_in_one_read(queue: JobQueue, redis: Redis) -> None:
    await enqueue(queue)  # loads the script
    before = await _reads(redis)
    await asyncio.gather(*(enqueue(queue) for _ in range(100)))
    assert await _reads(redis) - before <= 5
    assert (await queue.counts())["accepted"] == 101


async def test_jobs_that_end_at_once_end_in_one_read(queue: JobQueue, redis: Redis) -> None:
    for _ in range(33):
        await enqueue(queue)
    first, *rest = await claim(queue, rows=33, total=33)
    await succeed(queue, first)
    before = await _reads(redis)
    assert await queue.finish_many(WORKER, [(job.id, job.attempt, DONE) for job in rest]) == [True] * 32
    assert await _reads(redis) - before <= 4
    assert (await queue.counts())["succeeded"] == 33


async def test_of_several_ends_the_fenced_one_changes_nothing_and_the_others_stand(queue: JobQueue) -> None:
    for _ in range(3):
        await enqueue(queue)
    one, lost, three = await claim(queue, rows=3)
    await queue.hand_back(WORKER, lost.id, lost.attempt)
    (taken,) = await claim(queue, "mac-2:200")
    replies = await queue.finish_many(WORKER, [(job.id, job.attempt, DONE) for job in (one, taken, three)])
    assert replies == [True, False, True]
    assert await state_of(queue, lost.id) is JobState.RUNNING


async def test_of_several_jobs_each_is_accepted_or_refused_on_its_own(redis: Redis, settings: Settings) -> None:
    queue = JobQueue(redis, changed(settings, queue_depth_cap=1))
    jobs = [new_job(), new_job(), new_job(priority=Priority.HIGH)]
    first, second, third = await queue.enqueue_many(jobs)
    assert first == Enqueued(jobs[0].id, created=True)
    assert isinstance(second, QueueFull)
    assert third == Enqueued(jobs[2].id, created=True)


async def test_a_script_that_redis_forgot_is_sent_again_for_every_call_of_the_write(
    queue: JobQueue, redis: Redis
) -> None:
    await enqueue(queue)
    await ask(redis, "SCRIPT", "FLUSH")
    await asyncio.gather(*(enqueue(queue) for _ in range(10)))
    assert (await queue.counts())["accepted"] == 11


async def test_a_cancelled_caller_leaves_the_others_of_its_write_alone(queue: JobQueue) -> None:
    calls = [asyncio.create_task(enqueue(queue)) for _ in range(5)]
    await asyncio.sleep(0)  # all of them wait for the same write
    calls[2].cancel()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(ended.pop(2), asyncio.CancelledError)
    accepted = {job.id for job in await claim(queue)}
    assert {one for one in ended if isinstance(one, str)} <= accepted and len(ended) == 4


async def test_one_refused_by_memory_leaves_no_body_in_the_error(queue: JobQueue, redis: Redis) -> None:
    await enqueue(queue)
    await ask(redis, "CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(QueueFull) as refused:
        await enqueue(queue, body=b"a secret prompt")
    assert "secret" not in f"{refused.value} {refused.value.__cause__!r}"
    await ask(redis, "CONFIG", "SET", "maxmemory", "0")


async def test_after_redis_cut_the_connection_the_calls_that_wait_are_sent_again(queue: JobQueue, redis: Redis) -> None:
    await enqueue(queue)
    await ask(redis, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await asyncio.gather(*(enqueue(queue) for _ in range(10)))

    async def all_accepted() -> bool:
        return (await queue.counts())["accepted"] == 11

    await wait_until(all_accepted)
