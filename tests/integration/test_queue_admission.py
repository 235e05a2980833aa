"""What is accepted: idempotency, depth caps, memory, due times and deadlines."""

from __future__ import annotations

import time

import pytest
from redis.asyncio import Redis

from scheduler.errors import IdempotencyMismatch, QueueFull
from scheduler.job import JobState, Priority
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Outcome
from scheduler.settings import Settings
from scheduler.tokens import Failed, decode_event, encode_event
from tests.conftest import wait_until
from tests.queue_cases import WORKER, changed, claim, claim_one, emit, enqueue, new_job, state_of, succeed


async def test_the_same_key_and_body_attach_to_the_running_and_to_the_finished_job(queue: JobQueue) -> None:
    first = await queue.enqueue(new_job(idempotency_key="k", body_digest="d"))
    job = await claim_one(queue)
    while_running = await queue.enqueue(new_job(idempotency_key="k", body_digest="d"))
    await succeed(queue, job)
    when_finished = await queue.enqueue(new_job(idempotency_key="k", body_digest="d"))
    assert first.created and not while_running.created and not when_finished.created
    assert while_running.job_id == when_finished.job_id == first.job_id
    assert (await queue.counts())["accepted"] == 1


async def test_the_same_key_with_another_body_is_refused(queue: JobQueue) -> None:
    await enqueue(queue, idempotency_key="k", body_digest="d")
    with pytest.raises(IdempotencyMismatch):
        await enqueue(queue, idempotency_key="k", body_digest="other")
    assert (await queue.counts())["accepted"] == 1


async def test_keys_of_two_tenants_do_not_meet(queue: JobQueue) -> None:
    for tenant in ("ann", "bob"):
        assert (await queue.enqueue(new_job(idempotency_key="k", body_digest=tenant, tenant=tenant))).created


@pytest.mark.parametrize("end", ["cancelled", "cancelling", "failed"])
async def test_a_key_whose_job_did_not_succeed_may_be_tried_again(queue: JobQueue, end: str) -> None:
    first = await enqueue(queue, idempotency_key="k", body_digest="d")
    job = await claim_one(queue)
    await queue.cancel(first)
    if end == "cancelled":
        await queue.finish(WORKER, first, job.attempt, Outcome(JobState.CANCELLED))
    elif end == "failed":
        payload = encode_event(Failed(code="internal_error", message="x"))
        await queue.finish(WORKER, first, job.attempt, Outcome(JobState.FAILED, payload, error_code="internal_error"))
    second = await queue.enqueue(new_job(idempotency_key="k", body_digest="d"))
    assert second.created and second.job_id != first


async def test_a_full_class_is_refused_with_a_retry_time_and_the_others_are_not(
    redis: Redis, settings: Settings
) -> None:
    queue = JobQueue(redis, changed(settings, queue_depth_cap=3))
    for _ in range(3):
        await enqueue(queue)
    with pytest.raises(QueueFull) as refused:
        await enqueue(queue)
    assert refused.value.retry_after_s is not None and 1 <= refused.value.retry_after_s <= 60
    await enqueue(queue, priority=Priority.HIGH)
    await claim(queue, rows=2)
    await enqueue(queue)


async def test_the_retry_time_follows_the_drain_rate(redis: Redis, settings: Settings) -> None:
    queue = JobQueue(redis, changed(settings, queue_depth_cap=400))
    for _ in range(400):
        await enqueue(queue)
    with pytest.raises(QueueFull) as unknown:
        await enqueue(queue)
    await claim(queue, rows=100, total=100)
    for _ in range(100):
        await enqueue(queue)
    with pytest.raises(QueueFull) as known:
        await enqueue(queue)
    assert unknown.value.retry_after_s == 10  # nothing is known yet
    assert known.value.retry_after_s == pytest.approx(12, abs=2)  # 40 jobs at 100 in 30 s


async def test_a_repeated_request_is_answered_although_the_queue_is_full(redis: Redis, settings: Settings) -> None:
    queue = JobQueue(redis, changed(settings, queue_depth_cap=1))
    first = await enqueue(queue, idempotency_key="k", body_digest="d")
    assert (await queue.enqueue(new_job(idempotency_key="k", body_digest="d"))).job_id == first


async def test_a_job_for_later_is_claimed_when_it_is_due(redis: Redis, settings: Settings) -> None:
    queue = JobQueue(redis, changed(settings, sweep_interval_ms=20))
    later = await enqueue(queue, not_before_ms=int(time.time() * 1000) + 300)
    assert await claim(queue) == []
    assert await state_of(queue, later) is JobState.SCHEDULED
    assert sum((await queue.depths()).values()) == 1

    async def due() -> bool:
        await queue.sweep()
        return [job.id for job in await claim(queue)] == [later]

    await wait_until(due)
    assert await queue.depths() == {}


async def test_a_waiting_job_expires_at_its_deadline_with_a_terminal_event(redis: Redis, settings: Settings) -> None:
    queue = JobQueue(redis, changed(settings, sweep_interval_ms=20))
    job_id = await enqueue(queue, deadline_ms=int(time.time() * 1000) + 50)

    async def expired() -> bool:
        await queue.sweep()
        return await state_of(queue, job_id) is JobState.EXPIRED

    await wait_until(expired)
    ((at, payload),) = await queue.read_events(job_id, None)
    event = decode_event(payload)
    assert at.is_terminal and isinstance(event, Failed) and event.code == "deadline_exceeded"
    assert await claim(queue) == [] and await queue.depths() == {}
    assert (await queue.counts())["expired"] == 1


async def test_a_running_job_past_its_deadline_is_stopped_and_ends_as_expired(redis: Redis, settings: Settings) -> None:
    queue = JobQueue(redis, changed(settings, sweep_interval_ms=20))
    await enqueue(queue, deadline_ms=int(time.time() * 1000) + 100)
    job = await claim_one(queue)
    await emit(queue, job, 1, "a")

    async def told() -> bool:
        await queue.sweep()
        return (await queue.emit(WORKER, [])).cancelled == {job.id}

    await wait_until(told)
    assert await queue.finish(WORKER, job.id, job.attempt, Outcome(JobState.CANCELLED))
    assert await state_of(queue, job.id) is JobState.EXPIRED


async def test_a_job_that_waited_out_the_queue_ttl_expires(redis: Redis, settings: Settings) -> None:
    queue = JobQueue(redis, changed(settings, queue_ttl_s=1, sweep_interval_ms=20))
    job_id = await enqueue(queue)
    await redis.zadd(queue.keys.of("deadlines"), {job_id: 1})  # the second has passed

    async def expired() -> bool:
        await queue.sweep()
        return await state_of(queue, job_id) is JobState.EXPIRED

    await wait_until(expired)


async def fill_memory(redis: Redis, share: float) -> None:
    """Sets maxmemory so that `share` of it is used now."""
    used = (await redis.info("memory"))["used_memory"]
    await redis.config_set("maxmemory", int(used / share))


async def test_short_memory_refuses_batch_first_then_normal_and_never_running_work(
    redis: Redis, settings: Settings
) -> None:
    queue = JobQueue(redis, changed(settings, sweep_interval_ms=20))
    await enqueue(queue)
    job = await claim_one(queue)

    async def refused(priority: Priority) -> bool:
        await queue.sweep()
        try:
            await enqueue(queue, priority=priority)
        except QueueFull as error:
            return error.retry_after_s == 5
        return False

    await fill_memory(redis, 0.85)
    await wait_until(lambda: refused(Priority.BATCH))
    await enqueue(queue, priority=Priority.LOW)
    await fill_memory(redis, 0.95)
    await wait_until(lambda: refused(Priority.NORMAL))
    await enqueue(queue, priority=Priority.HIGH)
    assert not (await emit(queue, job, 1, "a")).fenced
    await redis.config_set("maxmemory", "1gb")


async def test_at_maxmemory_new_work_is_refused_and_running_work_goes_on_to_its_end(
    redis: Redis, settings: Settings
) -> None:
    queue = JobQueue(redis, changed(settings, sweep_interval_ms=20))
    for _ in range(6):
        await enqueue(queue)
    jobs = await claim(queue, rows=4)
    await redis.config_set("maxmemory", 1)
    with pytest.raises(QueueFull) as refused:
        await enqueue(queue, priority=Priority.HIGH)
    assert refused.value.retry_after_s is not None

    assert not (await emit(queue, jobs[0], 1, "a")).fenced
    assert await succeed(queue, jobs[0])
    assert await queue.cancel(jobs[1].id) is JobState.RUNNING
    assert (await queue.emit(WORKER, [])).cancelled == {jobs[1].id}
    assert await queue.finish(WORKER, jobs[1].id, 1, Outcome(JobState.CANCELLED))
    assert await queue.hand_back(WORKER, jobs[2].id, 1)
    assert await queue.expire_worker(WORKER) == 1
    assert len(await claim(queue, "w:2")) == 4

    async def swept() -> bool:
        return (await queue.sweep()).ran

    await wait_until(swept)
    await queue.retire_worker("w:2")
    await redis.config_set("maxmemory", "1gb")
