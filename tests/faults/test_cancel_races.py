"""A cancel meets a claim, an end, a retry or a takeover at the same moment: one end per job, and the sums are right."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from scheduler.job import ClaimedJob, JobState
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Outcome
from tests.queue_cases import WORKER, claim, enqueue, log_ids, state_of, succeed

JOBS = 40
OTHER = "mac-2:200"
Move = Callable[[], Awaitable[object]]


async def at_once(moves: list[Move]) -> None:
    """All moves over connections of their own, in no particular order."""
    random.Random(7).shuffle(moves)
    await asyncio.gather(*(move() for move in moves))


def cancels(queue: JobQueue, ids: list[str]) -> list[Move]:
    return [lambda job_id=job_id: queue.cancel(job_id) for job_id in ids]


async def end_what_runs(queue: JobQueue) -> None:
    """What a worker does that hears of its cancels; whatever waits is claimed first."""
    for worker in (WORKER, OTHER):
        await claim(queue, worker, rows=2 * JOBS, total=2 * JOBS)
        told = (await queue.emit(worker, [])).cancelled
        for job_id in told:
            view = await queue.view(job_id)
            assert view is not None
            await queue.finish(worker, job_id, view.attempt, Outcome(JobState.CANCELLED))


async def assert_each_ended_once(queue: JobQueue, ids: list[str], state: JobState) -> None:
    for job_id in ids:
        assert await state_of(queue, job_id) is state
        log = await log_ids(queue, job_id)
        assert [at for at in log if at.endswith("-4294967295")] == log[-1:]
    counts = await queue.counts()
    assert counts == {"accepted": JOBS, state.value: JOBS}
    assert await queue.depths() == {} and await queue.list_jobs(1000) == []
    for worker in (WORKER, OTHER):
        assert (await queue.emit(worker, [])).cancelled == frozenset()


async def running_jobs(queue: JobQueue) -> tuple[list[str], list[ClaimedJob]]:
    ids = [await enqueue(queue) for _ in range(JOBS)]
    jobs = await claim(queue, rows=JOBS, total=JOBS)
    assert len(jobs) == JOBS
    return ids, jobs


async def test_a_cancel_and_a_claim(queue: JobQueue) -> None:
    ids = [await enqueue(queue) for _ in range(JOBS)]
    claims: list[Move] = [lambda: claim(queue, WORKER, rows=4, total=2 * JOBS) for _ in range(JOBS // 2)]
    await at_once([*claims, *cancels(queue, ids)])
    await end_what_runs(queue)
    await assert_each_ended_once(queue, ids, JobState.CANCELLED)


async def test_a_cancel_and_the_end_of_the_job(queue: JobQueue) -> None:
    ids, jobs = await running_jobs(queue)
    ends: list[Move] = [lambda job=job: succeed(queue, job) for job in jobs]
    await at_once([*ends, *cancels(queue, ids)])
    await assert_each_ended_once(queue, ids, JobState.SUCCEEDED)


@pytest.mark.parametrize("delay_ms", [0, 60_000], ids=["at-once", "later"])
async def test_a_cancel_and_a_retry(queue: JobQueue, delay_ms: int) -> None:
    ids, jobs = await running_jobs(queue)
    outcome = Outcome(JobState.SCHEDULED, retry_delay_ms=delay_ms, error_code="engine_failure", error_message="x")
    retries: list[Move] = [lambda job=job: queue.finish(WORKER, job.id, 1, outcome) for job in jobs]
    await at_once([*retries, *cancels(queue, ids)])
    await assert_each_ended_once(queue, ids, JobState.CANCELLED)


async def test_a_cancel_and_a_takeover(queue: JobQueue) -> None:
    ids, _ = await running_jobs(queue)
    takeover: list[Move] = [lambda: queue.expire_worker(WORKER)]
    takeover += [lambda: claim(queue, OTHER, rows=4, total=2 * JOBS) for _ in range(JOBS // 2)]
    await at_once([*takeover, *cancels(queue, ids)])
    await end_what_runs(queue)
    await assert_each_ended_once(queue, ids, JobState.CANCELLED)


async def test_two_sweepers_at_once_count_one_loss_per_job(queue: JobQueue) -> None:
    ids, _ = await running_jobs(queue)
    await queue._redis.zadd(queue.keys.of("lease"), {WORKER: 1})  # pyright: ignore - long expired
    await at_once([queue.sweep, queue.sweep, lambda: queue.expire_worker(WORKER), lambda: queue.expire_worker(WORKER)])
    again = await claim(queue, OTHER, rows=JOBS, total=JOBS)
    assert [(job.id, job.attempt, job.lost) for job in again] == [(job_id, 2, 1) for job_id in ids]
