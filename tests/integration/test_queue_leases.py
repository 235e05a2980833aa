"""Leases: who is gone, what becomes of its jobs, and when standing still is no death."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from scheduler.errors import QueueUnavailable
from scheduler.job import ClaimedJob, JobState, Priority
from scheduler.loops.sweeper import run_sweeper
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import SweepResult
from scheduler.settings import Settings
from scheduler.tokens import Failed, decode_event
from tests.conftest import wait_until
from tests.queue_cases import POOL, WORKER, ask, changed, claim, claim_one, emit, enqueue, log_ids, state_of, succeed

OTHER = "mac-2:200"


@pytest.fixture
async def hasty(redis: Redis, settings: Settings) -> AsyncIterator[JobQueue]:
    """A queue whose leases last 600 ms and whose sweeps may follow each other closely."""
    queue = JobQueue(redis, changed(settings, lease_ttl_ms=600, sweep_interval_ms=20))
    yield queue
    await queue.aclose()


async def swept(queue: JobQueue) -> SweepResult:
    """The next sweep that really ran."""

    async def ran() -> SweepResult | None:
        result = await queue.sweep()
        return result if result.ran else None

    result = await wait_until(ran)
    assert result is not None
    return result


async def sweep_until_lost(queue: JobQueue) -> None:
    async def lost() -> bool:
        return (await queue.sweep()).workers > 0

    await wait_until(lost)


async def test_an_expired_lease_moves_the_job_to_another_worker_ahead_of_new_work(hasty: JobQueue) -> None:
    job_id = await enqueue(hasty)
    first = await claim_one(hasty)
    await emit(hasty, first, 1, "a")
    await enqueue(hasty, priority=Priority.HIGH)
    await sweep_until_lost(hasty)
    assert await state_of(hasty, job_id) is JobState.QUEUED

    again = (await claim(hasty, OTHER))[0]
    assert (again.id, again.attempt, again.lost) == (job_id, 2, 1)
    assert await log_ids(hasty, job_id) == ["1-0", "1-1", "2-0"]
    assert (await emit(hasty, first, 2, "zombie")).fenced == {job_id}


async def test_emit_and_claim_and_heartbeats_keep_a_lease(hasty: JobQueue, redis: Redis) -> None:
    await enqueue(hasty)
    job = await claim_one(hasty)
    lease = hasty.keys.of("lease")

    async def expiry() -> float:
        return await redis.zscore(lease, WORKER) or 0.0

    last = await expiry()
    for renew in (
        lambda: hasty.emit(WORKER, []),
        lambda: claim(hasty),
        lambda: emit(hasty, job, 1, "a"),
    ):

        async def later(renew=renew, last=last) -> bool:  # type: ignore[no-untyped-def]
            await renew()
            return await expiry() > last

        await wait_until(later)
        last = await expiry()


async def test_expire_worker_requeues_at_once_what_its_engine_lost(queue: JobQueue, redis: Redis) -> None:
    ids = [await enqueue(queue) for _ in range(3)]
    assert len(await claim(queue)) == 3
    assert await queue.expire_worker(WORKER) == 3
    assert [job.id for job in await claim(queue, OTHER)] == ids
    assert await redis.zscore(queue.keys.of("lease"), WORKER) is None
    assert await redis.exists(queue.keys.of("own", WORKER)) == 0


async def test_retire_leaves_no_trace_and_burns_nothing(queue: JobQueue, redis: Redis) -> None:
    await enqueue(queue)
    await claim_one(queue)
    await queue.retire_worker(WORKER)
    again = await claim_one(queue, OTHER)
    assert (again.attempt, again.lost, again.failures) == (2, 0, 0)
    assert not [key for key in await redis.keys("*") if WORKER.encode() in key]


async def test_a_stopped_redis_costs_no_job_an_attempt(hasty: JobQueue, redis: Redis) -> None:
    ids = [await enqueue(hasty) for _ in range(40)]
    await claim(hasty, rows=40, total=40)
    await swept(hasty)
    await redis.client_pause(1200)
    result = await swept(hasty)
    assert result.graced == 1 and result.workers == 0
    assert not (await hasty.emit(WORKER, [])).lease_lost
    for job_id in ids:
        view = await hasty.view(job_id)
        assert view is not None and (view.attempt, view.state) == (1, JobState.RUNNING)


async def test_grace_extends_a_lease_once_and_the_dead_are_reaped_after_it(hasty: JobQueue, redis: Redis) -> None:
    await enqueue(hasty)
    await claim_one(hasty)
    await swept(hasty)
    await redis.client_pause(1200)
    assert (await swept(hasty)).graced == 1
    await ask(redis, "HSET", hasty.keys.of("sweep"), "at", 1)  # the sweeper is late again, the worker still silent
    result = await swept(hasty)
    assert result.graced == 0
    if result.workers == 0:
        await sweep_until_lost(hasty)


async def test_only_one_of_many_sweepers_sweeps_per_interval(queue: JobQueue) -> None:
    results = await asyncio.gather(*(queue.sweep() for _ in range(10)))
    assert sum(result.ran for result in results) == 1


async def test_the_sweep_loop_reaps_while_it_runs_and_ends_on_demand(
    redis: Redis, settings: Settings, hasty: JobQueue
) -> None:
    job_id = await enqueue(hasty)
    await claim_one(hasty)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(run_sweeper(hasty, changed(settings, sweep_interval_ms=20), stop))

        async def requeued() -> bool:
            return await state_of(hasty, job_id) is JobState.QUEUED

        await wait_until(requeued)
        stop.set()


async def lose(queue: JobQueue, worker: str) -> ClaimedJob:
    """The worker claims one job and dies of it."""
    (job,) = await claim(queue, worker)
    await queue.expire_worker(worker)
    return job


async def test_after_two_losses_a_job_is_claimed_only_by_an_idle_worker_and_alone(queue: JobQueue) -> None:
    poison = await enqueue(queue)
    assert (await lose(queue, "a:1")).id == poison
    assert (await lose(queue, "b:1")).id == poison
    await enqueue(queue)

    (alone,) = await claim(queue, "c:1")
    assert (alone.id, alone.lost) == (poison, 2)
    assert await claim(queue, "c:1") == []  # while it holds the job
    (neighbour,) = await claim(queue, "d:1")
    assert neighbour.id != poison
    await succeed(queue, alone, "c:1")
    await enqueue(queue)
    assert len(await claim(queue, "c:1")) == 1


async def test_a_busy_worker_empties_itself_for_a_job_that_must_run_alone(queue: JobQueue) -> None:
    poison = await enqueue(queue)
    for worker in ("a:1", "b:1"):
        await lose(queue, worker)
    job = None
    # c:1 was already busy when the job came to the solo lane
    await enqueue(queue)
    (alone,) = await claim(queue, "d:1")
    (job,) = await claim(queue, "c:1")
    await queue.expire_worker("d:1")  # third loss: dead, the lane is empty again
    assert await state_of(queue, poison) is JobState.FAILED
    assert alone.id == poison and job.id != poison

    second = await enqueue(queue)
    for worker in ("a:2", "b:2"):
        assert (await lose(queue, worker)).id == second
    await enqueue(queue)
    assert await claim(queue, "c:1") == []  # has a job: claims no more, waits to be idle
    await succeed(queue, job, "c:1")
    assert [one.id for one in await claim(queue, "c:1")] == [second]


@pytest.mark.parametrize("leaves", ["expire_worker", "retire_worker"])
async def test_a_worker_that_leaves_while_it_empties_itself_gives_its_place_to_another(
    queue: JobQueue, leaves: str
) -> None:
    await enqueue(queue)
    await claim(queue, "c:1")
    poison = await enqueue(queue)
    for worker in ("a:1", "b:1"):
        assert (await lose(queue, worker)).id == poison
    assert await claim(queue, "c:1") == []  # it has a job, and takes no other until that one ends
    await getattr(queue, leaves)("c:1")
    assert poison in [job.id for job in await claim(queue, "d:1")]


async def test_a_poison_prompt_ends_as_a_dead_letter_and_drags_nobody(
    queue: JobQueue, redis: Redis, settings: Settings
) -> None:
    poison = await enqueue(queue)
    for number in range(settings.max_lost):
        assert (await lose(queue, f"w:{number}")).id == poison
    view = await queue.view(poison)
    assert view is not None and (view.state, view.error_code) == (JobState.FAILED, "worker_lost")
    assert len(view.attempts) == settings.max_lost
    last = (await queue.read_events(poison, None))[-1]
    assert last[0].is_terminal
    event = decode_event(last[1])
    assert isinstance(event, Failed) and event.code == "worker_lost"
    ((_, letter),) = await redis.xrange(queue.keys.of("dead"))
    assert letter[b"id"].decode() == poison
    assert await claim(queue) == [] and await queue.depths() == {}


async def test_an_unreachable_redis_is_queue_unavailable(settings: Settings) -> None:
    from scheduler.queue.connection import connect

    gone = changed(settings, redis_url="unix:///nowhere/redis.sock")
    client = connect(gone, "command")
    with pytest.raises(QueueUnavailable):
        await JobQueue(client, gone).claim(WORKER, POOL, 1, 1, 1)
    await client.aclose()
