"""Batch work beside people's: held back while the KV cache is well used, handed back for a head that finds no room."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from scheduler.job import Claimed, JobState, Priority
from scheduler.lifecycle import Lifecycle
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import QueueView
from tests.conftest import wait_until
from tests.queue_cases import POOL, WORKER, ask, claim, enqueue, succeed

KV = 1000


async def _claim(queue: JobQueue, rows: int, kv: int = KV, worker: str = WORKER, total: int = 4) -> Claimed:
    return await queue.claim(worker, POOL, rows, total, kv, KV, may_preempt=True)


async def _batch(queue: JobQueue, count: int, **fields: object) -> list[str]:
    fields = {"cost_tokens": 100, "kv_tokens": 100} | fields
    return [await enqueue(queue, priority=Priority.BATCH, **fields) for _ in range(count)]


async def _parked(queue: JobQueue) -> int:
    views: list[QueueView] = await queue.queues()
    return sum(view.parked for view in views)


async def test_batch_work_is_held_back_while_the_cache_is_well_used(queue: JobQueue) -> None:
    await _batch(queue, 2)
    assert (await _claim(queue, 2, kv=300)).jobs == ()
    normal = await enqueue(queue, kv_tokens=100)
    assert [job.id for job in (await _claim(queue, 2, kv=300)).jobs] == [normal]
    assert len((await _claim(queue, 1, kv=301)).jobs) == 1


async def test_batch_work_alone_fills_the_cache_no_further_than_the_threshold(queue: JobQueue) -> None:
    await _batch(queue, 10)
    assert len((await _claim(queue, 10, total=10)).jobs) == 7


async def test_batch_work_that_waited_for_a_whole_cache_of_others_is_held_back_no_longer(queue: JobQueue) -> None:
    await _batch(queue, 1)
    await _serve_normal(queue, tokens=16 * (KV + 1))
    assert (await _claim(queue, 1, kv=200)).jobs == ()
    await _serve_normal(queue, tokens=1)
    (job,) = (await _claim(queue, 1, kv=200)).jobs
    assert job.priority is Priority.BATCH


async def _serve_normal(queue: JobQueue, tokens: int) -> None:
    await enqueue(queue, cost_tokens=tokens, kv_tokens=1)
    (job,) = (await _claim(queue, 1, kv=200, worker="w:9")).jobs
    assert job.priority is Priority.NORMAL
    await succeed(queue, job, "w:9")


async def test_a_full_worker_is_told_to_hand_back_its_newest_batch_job(queue: JobQueue, redis: Redis) -> None:
    ids = await _batch(queue, 4)
    for _ in ids:
        await _claim(queue, 1)
    for number, job_id in enumerate(ids):
        await ask(redis, "HSET", queue.keys.job(job_id), "a:1", f"{1000 + number} {WORKER}")
    high = await enqueue(queue, priority=Priority.HIGH, kv_tokens=100)
    claimed = await _claim(queue, 0, kv=600)
    assert claimed == Claimed(jobs=(), preempt=(ids[3],), is_more_left=True)
    assert await _claim(queue, 0, kv=600) == claimed  # asking again changes nothing
    assert await queue.hand_back(WORKER, ids[3], 1, preempted=True)
    assert [job.id for job in (await _claim(queue, 1, kv=700)).jobs] == [high]


async def test_just_enough_is_handed_back_by_rows_and_by_cache(queue: JobQueue) -> None:
    await _batch(queue, 3, rows=1, kv_tokens=200)
    held = (await _claim(queue, 3)).jobs
    await enqueue(queue, priority=Priority.HIGH, rows=1, kv_tokens=700)
    assert len((await _claim(queue, 1, kv=400)).preempt) == 2  # 400 + 200 + 200 ≥ 700
    await enqueue(queue, priority=Priority.NORMAL)
    assert len(held) == 3


async def test_nobody_is_handed_back_where_all_of_them_would_not_do(queue: JobQueue) -> None:
    await _batch(queue, 2)
    await _claim(queue, 2)
    other = await enqueue(queue, priority=Priority.NORMAL, kv_tokens=100)
    assert [job.id for job in (await _claim(queue, 1, kv=800)).jobs] == [other]
    await enqueue(queue, priority=Priority.HIGH, rows=4, kv_tokens=100)
    assert await _claim(queue, 1, kv=700) == Claimed(is_more_left=True)


async def test_an_all_batch_worker_empties_itself_for_a_job_larger_than_its_cache(queue: JobQueue) -> None:
    ids = await _batch(queue, 2)
    await _claim(queue, 2)
    await enqueue(queue, priority=Priority.HIGH, kv_tokens=5 * KV)
    assert set((await _claim(queue, 2, kv=800)).preempt) == set(ids)


async def test_batch_work_gives_way_to_nobody_of_its_own_class(queue: JobQueue) -> None:
    await _batch(queue, 6)
    await _claim(queue, 4)
    assert await _claim(queue, 0, kv=600) == Claimed(is_more_left=True)


async def test_only_who_asks_is_told_whom_to_hand_back(queue: JobQueue) -> None:
    await _batch(queue, 1)
    await _claim(queue, 1)
    await enqueue(queue, priority=Priority.HIGH, kv_tokens=950)
    assert await queue.claim(WORKER, POOL, 1, 4, 900, KV) == Claimed(is_more_left=True)


async def test_a_preempted_job_is_first_of_its_class_and_burns_nothing(queue: JobQueue) -> None:
    first, second, third = await _batch(queue, 3)
    await _claim(queue, 2)
    assert await queue.hand_back(WORKER, second, 1, preempted=True)
    assert await _parked(queue) == 1
    high = [await enqueue(queue, priority=Priority.HIGH, kv_tokens=1) for _ in range(2)]
    jobs = (await _claim(queue, 4, worker="w:2")).jobs
    assert [job.id for job in jobs] == [*high, second, third]
    assert (jobs[2].attempt, jobs[2].lost, jobs[2].failures) == (2, 0, 0)
    assert await _parked(queue) == 0
    for job in jobs:
        await succeed(queue, job, "w:2")
    assert await queue.expire_worker(WORKER) == 1
    assert [job.id for job in await claim(queue)] == [first]


async def test_a_parked_job_is_cancelled_reprioritised_and_lost_like_any_other(queue: JobQueue, redis: Redis) -> None:
    gone, moved, lost = await _batch(queue, 3)
    await _claim(queue, 3)
    for job_id in (gone, moved, lost):
        await queue.hand_back(WORKER, job_id, 1, preempted=True)
    assert await queue.cancel(gone) is JobState.CANCELLED
    await queue.reprioritise(moved, Priority.NORMAL)
    assert await queue.depths() == {(POOL, Priority.NORMAL): 1, (POOL, Priority.BATCH): 1}
    assert [job.id for job in (await _claim(queue, 2)).jobs] == [moved, lost]
    assert await queue.expire_worker(WORKER) == 2
    for job in await claim(queue):
        assert job.lost == 1
        await succeed(queue, job)
    assert not [key async for key in redis.scan_iter() if b":q:" in key or b":act:" in key]


async def test_batch_work_progresses_on_a_full_worker_under_a_flood(queue: JobQueue) -> None:
    """One row; people's work never ends. Each batch job is handed back at most once, and they all finish."""
    batch = set(await _batch(queue, 3))
    await _claim(queue, 1, total=1)
    done: list[Priority] = []
    handed_back = 0
    running = None
    for _ in range(400):
        await enqueue(queue, cost_tokens=100, kv_tokens=1)
        claimed = await _claim(queue, 0 if running or not done else 1, total=1)
        for job_id in claimed.preempt:
            view = await queue.view(job_id)
            assert view is not None
            await queue.hand_back(WORKER, job_id, view.attempt, preempted=True)
            handed_back += 1
            running = None
        claimed = claimed if claimed.jobs else await _claim(queue, 0 if running else 1, total=1)
        if claimed.jobs:
            running = claimed.jobs[0]
        elif running:
            await succeed(queue, running)
            done.append(running.priority)
            running = None
        if done.count(Priority.BATCH) == len(batch):
            break
    assert done.count(Priority.BATCH) == 3 and handed_back <= 3
    assert done.count(Priority.NORMAL) >= 32


async def test_a_full_worker_is_rung_for_higher_work_only(queue: JobQueue, lifecycle: Lifecycle, redis: Redis) -> None:
    alarm = queue.keys.of("alarm", POOL)
    await enqueue(queue, priority=Priority.HIGH)
    assert not await redis.exists(alarm)  # nobody listens
    waiting = asyncio.create_task(lifecycle.wait_for_work(POOL, 9.0, full=True))
    await wait_until(lambda: redis.exists(queue.keys.of("full", POOL)))
    await enqueue(queue, priority=Priority.BATCH)
    assert not waiting.done() and not await redis.exists(alarm)
    await enqueue(queue, priority=Priority.HIGH)
    await asyncio.wait_for(waiting, 5)
    assert await redis.exists(queue.keys.bell(POOL))  # it took nobody's bell


async def test_an_alarm_that_got_lost_is_rung_again_by_the_sweep(queue: JobQueue, redis: Redis) -> None:
    await enqueue(queue, priority=Priority.HIGH)
    await ask(redis, "SET", queue.keys.of("full", POOL), "1", "PX", 10_000)
    await queue.sweep()
    assert await redis.exists(queue.keys.of("alarm", POOL))
