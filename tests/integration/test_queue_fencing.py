"""Only the owner of an attempt changes a job: older attempts, other workers and repeated calls do no damage."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from scheduler.job import ClaimedJob, JobState
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Outcome
from scheduler.tokens import EventId
from tests.queue_cases import WORKER, claim, claim_one, delta, emit, enqueue, log_ids, state_of, succeed

OTHER = "mac-2:200"


@pytest.fixture
async def taken_over(queue: JobQueue) -> tuple[ClaimedJob, ClaimedJob]:
    """One job, lost by WORKER after two events, now attempt 2 at OTHER."""
    await enqueue(queue)
    first = await claim_one(queue)
    await emit(queue, first, 1, "a")
    await emit(queue, first, 2, "b")
    assert await queue.expire_worker(WORKER) == 1
    second = await claim_one(queue, OTHER)
    assert (second.id, second.attempt, second.lost) == (first.id, 2, 1)
    return first, second


async def test_a_zombie_emits_nothing_after_a_takeover(
    queue: JobQueue, taken_over: tuple[ClaimedJob, ClaimedJob]
) -> None:
    first, second = taken_over
    result = await emit(queue, first, 3, "zombie")
    assert result.lease_lost and result.fenced == {first.id}
    assert not (await emit(queue, second, 1, "c", OTHER)).fenced
    assert await log_ids(queue, first.id) == ["1-0", "1-1", "1-2", "2-0", "2-1"]


async def test_a_zombie_with_a_new_lease_is_still_fenced(
    queue: JobQueue, taken_over: tuple[ClaimedJob, ClaimedJob]
) -> None:
    first, second = taken_over
    await claim(queue, WORKER)
    for attempt in (first.attempt, second.attempt):
        result = await queue.emit(WORKER, [(first.id, EventId(attempt, 9), delta("zombie"))])
        assert result.fenced == {first.id} and not result.lease_lost
    assert "2-9" not in await log_ids(queue, first.id)


async def test_a_zombie_can_neither_finish_nor_hand_back(
    queue: JobQueue, taken_over: tuple[ClaimedJob, ClaimedJob]
) -> None:
    first, second = taken_over
    assert not await succeed(queue, first, WORKER)
    assert not await succeed(queue, second, WORKER)
    assert not await succeed(queue, first, OTHER)
    assert not await queue.hand_back(WORKER, first.id, first.attempt)
    assert await state_of(queue, first.id) is JobState.RUNNING
    assert await succeed(queue, second, OTHER)


async def test_the_same_worker_is_fenced_for_its_own_older_attempt(queue: JobQueue) -> None:
    await enqueue(queue)
    first = await claim_one(queue)
    await queue.expire_worker(WORKER)
    second = await claim_one(queue)
    assert second.attempt == 2
    assert (await emit(queue, first, 1, "old")).fenced == {first.id}
    assert not await succeed(queue, first)
    assert await succeed(queue, second)


async def test_nothing_is_written_after_the_end(queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    await emit(queue, job, 1, "a")
    assert await succeed(queue, job)
    before = await log_ids(queue, job.id)
    assert (await emit(queue, job, 2, "late")).fenced == {job.id}
    assert not await queue.finish(OTHER, job.id, job.attempt, Outcome(JobState.FAILED, b"x"))
    assert not await queue.finish(WORKER, job.id, job.attempt + 1, Outcome(JobState.FAILED, b"x"))
    assert await log_ids(queue, job.id) == before
    assert await state_of(queue, job.id) is JobState.SUCCEEDED


async def test_a_repeated_finish_reports_the_same_and_changes_nothing(queue: JobQueue, redis: Redis) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    assert await succeed(queue, job)
    assert await succeed(queue, job)
    assert (await queue.counts())["succeeded"] == 1
    assert await redis.xlen(queue.keys.of("done")) == 1


async def test_a_repeated_emit_is_ignored_and_the_rest_of_its_batch_stands(queue: JobQueue) -> None:
    for _ in range(2):
        await enqueue(queue)
    one, two = await claim(queue)
    await emit(queue, one, 1, "a")
    result = await queue.emit(WORKER, [(one.id, EventId(1, 1), delta("again")), (two.id, EventId(1, 1), delta("b"))])
    assert not result.fenced
    assert await log_ids(queue, one.id) == ["1-0", "1-1"]
    assert (await queue.read_events(one.id, EventId(1, 0)))[0][1] == delta("a")
    assert await log_ids(queue, two.id) == ["1-0", "1-1"]


async def test_one_fenced_job_does_not_stop_its_neighbours(
    queue: JobQueue, taken_over: tuple[ClaimedJob, ClaimedJob]
) -> None:
    stale, _ = taken_over
    await enqueue(queue)
    neighbour = await claim_one(queue)
    result = await queue.emit(
        WORKER, [(stale.id, EventId(1, 3), delta("x")), (neighbour.id, EventId(1, 1), delta("y"))]
    )
    assert result.fenced == {stale.id}
    assert await log_ids(queue, neighbour.id) == ["1-0", "1-1"]


async def test_payloads_are_logged_byte_for_byte(queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    payload = bytes(range(256)) + b" 2-2 \r\n\x00"
    await queue.emit(WORKER, [(job.id, EventId(1, 1), payload)])
    assert (await queue.read_events(job.id, EventId(1, 0))) == [(EventId(1, 1), payload)]


async def test_a_claim_whose_reply_got_lost_is_answered_the_same_again(queue: JobQueue, redis: Redis) -> None:
    for _ in range(3):
        await enqueue(queue)
    first = await claim(queue, rows=2)
    last = await redis.get(queue.keys.of("lastclaim", WORKER))
    assert last is not None
    queue._unanswered[WORKER] = last.split()[0].decode()  # pyright: ignore[reportPrivateUsage] - as after a lost reply
    assert await claim(queue, rows=2) == first
    assert len(await claim(queue, rows=2)) == 1


async def test_sixty_four_concurrent_claims_give_each_job_to_one_worker(queue: JobQueue) -> None:
    ids = {await enqueue(queue) for _ in range(100)}
    got = await asyncio.gather(*(claim(queue, f"w:{number}", rows=2) for number in range(64)))
    claimed = [job.id for jobs in got for job in jobs]
    assert len(claimed) == 100 and set(claimed) == ids


async def test_work_goes_on_after_the_server_forgot_all_scripts(queue: JobQueue, redis: Redis) -> None:
    await enqueue(queue)
    await redis.script_flush()
    job = await claim_one(queue)
    await redis.script_flush()
    assert not (await emit(queue, job, 1, "a")).fenced
    await redis.script_flush()
    assert await succeed(queue, job)


async def test_after_flushall_everything_of_a_worker_is_fenced(queue: JobQueue, redis: Redis) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    await redis.flushall()
    result = await emit(queue, job, 1, "a")
    assert result.lease_lost and result.fenced == {job.id}
    assert not await succeed(queue, job)
    assert await queue.view(job.id) is None


async def test_a_burst_of_a_thousand_calls_waits_for_connections_and_loses_none(queue: JobQueue, redis: Redis) -> None:
    await asyncio.gather(*(enqueue(queue) for _ in range(1000)))
    assert sum((await queue.depths()).values()) == 1000
    assert (await redis.info("clients"))["connected_clients"] <= 100
