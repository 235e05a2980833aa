"""What an operator does to the queue: reprioritise, pause, resume, drain; and what the listings show of it."""

from __future__ import annotations

import time

import pytest
from redis.asyncio import Redis

from scheduler.errors import PoolDraining
from scheduler.job import JobState, Priority, new_job_id
from scheduler.lifecycle import Lifecycle
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import QueueView
from tests.conftest import SHARD
from tests.queue_cases import POOL, WORKER, ask, claim, claim_one, enqueue, succeed


async def _row(queue: JobQueue, priority: Priority, pool: str = POOL) -> QueueView:
    (row,) = [view for view in await queue.queues() if (view.pool, view.priority) == (pool, priority)]
    return row


async def test_a_waiting_job_moves_to_the_tail_of_its_new_class(queue: JobQueue) -> None:
    first, moved, last = [await enqueue(queue, priority=Priority.LOW) for _ in range(3)]
    high = await enqueue(queue, priority=Priority.HIGH)
    assert await queue.reprioritise(moved, Priority.HIGH) is JobState.QUEUED
    assert await queue.depths() == {(POOL, Priority.LOW): 2, (POOL, Priority.HIGH): 2}
    jobs = await claim(queue)
    assert [job.id for job in jobs if job.priority is Priority.HIGH] == [high, moved]
    assert [job.id for job in jobs if job.priority is Priority.LOW] == [first, last]


async def test_a_scheduled_job_waits_for_its_time_in_its_new_class(queue: JobQueue) -> None:
    later = int(time.time() * 1000) + 60_000
    job_id = await enqueue(queue, not_before_ms=later)
    assert await queue.reprioritise(job_id, Priority.BATCH) is JobState.SCHEDULED
    row = await _row(queue, Priority.BATCH)
    assert (row.waiting, row.scheduled, row.oldest_ms) == (1, 1, None)
    assert (await _row(queue, Priority.NORMAL)).waiting == 0
    await queue.cancel(job_id)
    assert await queue.depths() == {} and await queue.queues() == []


async def test_a_running_job_goes_on_and_has_its_new_class_when_it_comes_back(queue: JobQueue) -> None:
    job_id = await enqueue(queue, priority=Priority.LOW)
    job = await claim_one(queue)
    assert await queue.reprioritise(job_id, Priority.HIGH) is JobState.RUNNING
    assert await queue.depths() == {}
    await queue.hand_back(WORKER, job_id, job.attempt)
    assert await queue.depths() == {(POOL, Priority.HIGH): 1}
    again = await claim_one(queue)
    assert again.priority is Priority.HIGH
    assert await succeed(queue, again)


async def test_an_ended_or_unknown_job_keeps_its_class(queue: JobQueue) -> None:
    job_id = await enqueue(queue)
    await queue.cancel(job_id)
    assert await queue.reprioritise(job_id, Priority.HIGH) is JobState.CANCELLED
    assert await queue.reprioritise(new_job_id(SHARD), Priority.HIGH) is None


async def test_reprioritising_does_not_renew_the_queue_ttl(queue: JobQueue, redis: Redis) -> None:
    job_id = await enqueue(queue)
    soon = int(time.time() * 1000) + 5
    await ask(redis, "ZADD", queue.keys.of("deadlines"), soon, job_id)
    await queue.reprioritise(job_id, Priority.HIGH)
    assert await redis.zscore(queue.keys.of("deadlines"), job_id) == soon


async def test_a_paused_class_is_not_claimed_and_goes_on_accepting(queue: JobQueue) -> None:
    held, other = await enqueue(queue, priority=Priority.HIGH), await enqueue(queue, priority=Priority.LOW)
    await queue.pause(POOL, Priority.HIGH)
    assert [job.id for job in await claim(queue)] == [other]
    held_too = await enqueue(queue, priority=Priority.HIGH)
    row = await _row(queue, Priority.HIGH)
    assert row.paused and row.waiting == 2 and not (await _row(queue, Priority.LOW)).paused
    await queue.resume(POOL, Priority.HIGH)
    assert [job.id for job in await claim(queue)] == [held, held_too]


async def test_a_paused_pool_gives_out_nothing_not_even_reclaimed_work(queue: JobQueue, redis: Redis) -> None:
    lost = await enqueue(queue)
    await claim_one(queue)
    await queue.expire_worker(WORKER)
    await enqueue(queue, pool="other")
    await queue.pause(POOL)
    assert await claim(queue) == []
    assert len((await queue.claim("w:2", "other", 1, 1, 10**6)).jobs) == 1
    assert all(view.paused for view in await queue.queues() if view.pool == POOL)
    await redis.delete(queue.keys.bell(POOL))
    await queue.resume(POOL)
    assert await redis.exists(queue.keys.bell(POOL))  # somebody is told
    assert [job.id for job in await claim(queue)] == [lost]


async def test_resuming_the_pool_leaves_a_paused_class_paused(queue: JobQueue) -> None:
    await enqueue(queue)
    await queue.pause(POOL)
    await queue.pause(POOL, Priority.NORMAL)
    await queue.resume(POOL)
    assert await claim(queue) == []
    await queue.resume(POOL, Priority.NORMAL)
    assert len(await claim(queue)) == 1


async def test_a_draining_pool_refuses_new_jobs_and_works_off_the_old_ones(
    queue: JobQueue, lifecycle: Lifecycle
) -> None:
    old = await enqueue(queue)
    await lifecycle.drain(POOL, True)
    with pytest.raises(PoolDraining, match="drained"):
        await enqueue(queue)
    await enqueue(queue, pool="other")
    assert (await _row(queue, Priority.NORMAL)).draining
    assert [job.id for job in await claim(queue)] == [old]
    await lifecycle.drain(POOL, False)
    await enqueue(queue)


async def test_queues_counts_what_waits_and_runs_per_class(queue: JobQueue, redis: Redis) -> None:
    for _ in range(3):
        await enqueue(queue, tenant="a|b:c")
    await enqueue(queue, priority=Priority.HIGH)
    first = await claim(queue, rows=2)
    assert {job.priority for job in first} == {Priority.HIGH, Priority.NORMAL}
    await queue.expire_worker(WORKER)
    (running,) = await claim(queue, "w:2", rows=1)
    row, high = await _row(queue, Priority.NORMAL), await _row(queue, Priority.HIGH)
    assert row.waiting + high.waiting == 3 and row.running + high.running == 1
    assert row.resume == high.resume == 1 and row.solo == row.parked == row.urgent == 0
    assert row.oldest_ms is not None and row.claims_per_s > 0
    await succeed(queue, running, "w:2")
    assert [view.priority for view in await queue.queues()] == list(Priority)


async def test_listed_jobs_page_by_id_without_gap_or_repeat(queue: JobQueue) -> None:
    ids = sorted([await enqueue(queue) for _ in range(25)], reverse=True)
    pages: list[str] = []
    before: str | None = None
    while page := await queue.list_jobs(7, before):
        pages += [view.id for view in page]
        before = pages[-1]
    assert pages == ids


async def test_a_page_goes_on_where_its_cursor_ended_meanwhile(queue: JobQueue) -> None:
    ids = sorted([await enqueue(queue) for _ in range(6)], reverse=True)
    await queue.cancel(ids[2])
    assert [view.id for view in await queue.list_jobs(2, ids[2])] == ids[3:5]


async def test_listed_jobs_are_filtered(queue: JobQueue) -> None:
    await enqueue(queue)
    mine = await enqueue(queue, tenant="bob", priority=Priority.LOW, durable=True, batch_id="b-1")
    other = await enqueue(queue, pool="other")
    (running,) = await claim(queue, rows=1)

    async def ids(**filters: object) -> set[str]:
        return {view.id for view in await queue.list_jobs(10, **filters)}  # pyright: ignore[reportArgumentType]

    assert await ids(tenant="bob") == await ids(batch_id="b-1") == await ids(priority=Priority.LOW) == {mine}
    assert await ids(pool="other") == {other}
    assert await ids(state=JobState.RUNNING) == {running.id}
    assert await ids(state=JobState.RUNNING, pool="other") == set()


async def test_a_filter_finds_a_job_behind_thousands(queue: JobQueue, redis: Redis) -> None:
    mine = await enqueue(queue, tenant="bob")
    now = int(time.time() * 1000)
    async with redis.pipeline(transaction=False) as pipe:
        for _ in range(2500):
            pipe.zadd(queue.keys.of("live"), {new_job_id(SHARD): now + 10})
        await pipe.execute()
    assert [view.id for view in await queue.list_jobs(5, tenant="bob")] == [mine]


async def test_the_time_to_come_again_follows_the_class_and_not_the_pool(queue: JobQueue) -> None:
    for _ in range(40):
        await enqueue(queue, priority=Priority.HIGH)
    for _ in range(40):
        await enqueue(queue, priority=Priority.LOW)
    await queue.pause(POOL, Priority.LOW)
    assert len(await claim(queue, rows=40, total=40)) == 40
    assert (await _row(queue, Priority.HIGH)).claims_per_s > 1 > (await _row(queue, Priority.LOW)).claims_per_s
