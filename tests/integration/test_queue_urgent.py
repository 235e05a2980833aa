"""The urgent lane: deadlines that come soon go first, within half of a worker's rows; what waited too long ends."""

from __future__ import annotations

import time

import pytest
from redis.asyncio import Redis

from scheduler.job import ClaimedJob, JobState, Priority
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import QueueView
from scheduler.settings import Settings
from scheduler.tokens import Failed, decode_event
from tests.queue_cases import POOL, WORKER, ask, changed, claim, enqueue, state_of, succeed

HOUR_MS = 3_600_000


@pytest.fixture
def patient(redis: Redis, settings: Settings) -> JobQueue:
    """A queue for which a deadline within the hour comes soon, so that no test races against one."""
    return JobQueue(redis, changed(settings, urgent_slack_ms=HOUR_MS))


def _in(minutes: float) -> int:
    return int((time.time() + minutes * 60) * 1000)


def _ids(jobs: list[ClaimedJob]) -> list[str]:
    return [job.id for job in jobs]


async def _urgent(queue: JobQueue) -> int:
    views: list[QueueView] = await queue.queues()
    return views[0].urgent


async def test_the_earliest_deadline_goes_first_whatever_its_class(patient: JobQueue) -> None:
    high = await enqueue(patient, priority=Priority.HIGH)
    later = await enqueue(patient, priority=Priority.NORMAL, deadline_ms=_in(20))
    sooner = await enqueue(patient, priority=Priority.LOW, deadline_ms=_in(10))
    assert await _urgent(patient) == 2
    assert _ids(await claim(patient, rows=2, total=8)) == [sooner, later]
    assert _ids(await claim(patient, "w:2")) == [high]
    assert await _urgent(patient) == 0


async def test_a_deadline_that_is_far_away_waits_its_turn(patient: JobQueue) -> None:
    first = await enqueue(patient)
    relaxed = await enqueue(patient, deadline_ms=_in(180))
    assert _ids(await claim(patient)) == [first, relaxed]


async def test_batch_work_with_a_deadline_is_not_urgent(patient: JobQueue) -> None:
    batch = await enqueue(patient, priority=Priority.BATCH, deadline_ms=_in(10))
    first = await enqueue(patient, priority=Priority.HIGH)
    assert await _urgent(patient) == 0
    assert _ids(await claim(patient)) == [first, batch]


async def test_at_most_half_of_the_rows_go_to_urgent_jobs(patient: JobQueue) -> None:
    plain = [await enqueue(patient, priority=Priority.HIGH) for _ in range(6)]
    urgent = [await enqueue(patient, priority=Priority.LOW, deadline_ms=_in(10 + n)) for n in range(6)]
    assert _ids(await claim(patient, rows=4, total=8)) == urgent[:4]
    assert _ids(await claim(patient, rows=4, total=8)) == plain[:4]


async def test_a_worker_of_one_row_takes_an_urgent_job(patient: JobQueue) -> None:
    await enqueue(patient, priority=Priority.HIGH)
    urgent = await enqueue(patient, priority=Priority.LOW, deadline_ms=_in(10))
    assert _ids(await claim(patient, rows=1, total=1)) == [urgent]


async def test_urgent_jobs_are_charged_to_class_and_tenant(patient: JobQueue) -> None:
    """Else a tenant would double its share by stating deadlines."""
    for _ in range(8):
        await enqueue(patient, tenant="gamer", deadline_ms=_in(10))
        await enqueue(patient, tenant="honest")
    got: list[str] = []
    for _ in range(2):
        jobs = await claim(patient, rows=4, total=4)
        got += [job.tenant for job in jobs]
        for job in jobs:
            await succeed(patient, job)
    assert got.count("gamer") == 4


async def test_an_urgent_job_that_is_lost_or_cancelled_leaves_no_trace(patient: JobQueue, redis: Redis) -> None:
    cancelled = await enqueue(patient, deadline_ms=_in(10))
    await patient.cancel(cancelled)
    assert await _exists(patient, redis, "urgent", POOL) == 0
    urgent = await enqueue(patient, deadline_ms=_in(10))
    (job,) = await claim(patient)
    stream = patient.keys.of("queue", POOL, "urgent", "-")
    pending = await ask(redis, "XPENDING", stream, "workers")
    assert pending["consumers"] == [{"name": WORKER.encode(), "pending": 1}]
    await patient.expire_worker(WORKER)
    (again,) = await claim(patient, "w:2")
    assert (again.id, again.attempt, job.id) == (urgent, 2, urgent)
    await succeed(patient, again, "w:2")
    left = [key async for key in redis.scan_iter() if b":q:" in key or b":act:" in key or b":urg:" in key]
    assert left == []


async def test_an_urgent_job_of_a_paused_class_waits_and_the_next_one_goes(patient: JobQueue) -> None:
    await enqueue(patient, priority=Priority.LOW, deadline_ms=_in(5))
    other = await enqueue(patient, deadline_ms=_in(10))
    await patient.pause(POOL, Priority.LOW)
    assert _ids(await claim(patient)) == [other]


async def test_reprioritising_to_batch_and_back_leaves_and_enters_the_urgent_lane(patient: JobQueue) -> None:
    job_id = await enqueue(patient, deadline_ms=_in(10))
    await patient.reprioritise(job_id, Priority.BATCH)
    assert await _urgent(patient) == 0
    await patient.reprioritise(job_id, Priority.LOW)
    assert await _urgent(patient) == 1


async def test_the_tenants_other_jobs_stay_in_order_around_an_urgent_one(patient: JobQueue) -> None:
    first = await enqueue(patient)
    urgent = await enqueue(patient, deadline_ms=_in(10))
    last = await enqueue(patient)
    assert _ids(await claim(patient)) == [urgent, first, last]


async def test_waiting_out_the_queue_ttl_is_told_apart_from_a_missed_deadline(redis: Redis, settings: Settings) -> None:
    queue = JobQueue(redis, changed(settings, sweep_interval_ms=20))
    patient_one = await enqueue(queue)
    late = await enqueue(queue, deadline_ms=_in(10))
    past = int(time.time() * 1000) - 5
    for job_id in (patient_one, late):
        await ask(redis, "ZADD", queue.keys.of("deadlines"), past, job_id)
    await ask(redis, "HSET", queue.keys.job(late), "deadline", past)
    await queue.sweep()
    for job_id, code in ((patient_one, "queue_timeout"), (late, "deadline_exceeded")):
        view = await queue.view(job_id)
        assert view is not None and (view.state, view.error_code) == (JobState.EXPIRED, code)
        ((at, payload),) = await queue.read_events(job_id, None)
        event = decode_event(payload)
        assert at.is_terminal and isinstance(event, Failed) and event.code == code


async def test_no_queue_ttl_ends_a_durable_job_and_what_it_waits_in_lives_on(redis: Redis, settings: Settings) -> None:
    queue = JobQueue(redis, changed(settings, sweep_interval_ms=20))
    job_id = await enqueue(queue, durable=True)
    deadlines, waiting = queue.keys.of("deadlines"), queue.keys.of("queue", POOL, "normal", "ann")
    kept = [queue.keys.job(job_id), queue.keys.of("body", job_id), waiting, queue.keys.of("active", POOL, "normal")]
    for key in kept:
        assert await ask(redis, "PEXPIRE", key, 60_000) == 1
    await ask(redis, "ZADD", deadlines, int(time.time() * 1000) - 5, job_id)
    await queue.sweep()
    assert await state_of(queue, job_id) is JobState.QUEUED
    assert all([int(await ask(redis, "PTTL", key)) > 24 * 3600 * 1000 for key in kept])
    assert float(await ask(redis, "ZSCORE", deadlines, job_id)) > time.time() * 1000 + 3600 * 1000
    assert _ids(await claim(queue)) == [job_id]


async def _exists(queue: JobQueue, redis: Redis, kind: str, pool: str) -> int:
    return int(await ask(redis, "EXISTS", queue.keys.of(kind, pool)))
