"""Dead letters and replays: listed with their reason, accepted once more, or given up."""

from __future__ import annotations

from redis.asyncio import Redis

from scheduler.job import JobState, Priority, new_job_id
from scheduler.lifecycle import Lifecycle
from scheduler.queue.job_queue import JobQueue
from scheduler.tokens import EventId
from tests.conftest import SHARD
from tests.queue_cases import POOL, WORKER, claim, claim_one, emit, enqueue, state_of, succeed


async def _bury(queue: JobQueue, **fields: object) -> str:
    """A job that took three workers with it."""
    job_id = await enqueue(queue, **fields)
    pool = str(fields.get("pool", POOL))
    for number in range(3):
        (job,) = (await queue.claim(f"w:{number}", pool, 1, 1, 10**9)).jobs
        assert job.id == job_id
        await queue.expire_worker(f"w:{number}")
    return job_id


async def test_dead_letters_are_listed_newest_first_with_their_reason(queue: JobQueue) -> None:
    ids = [await _bury(queue, tenant="ann", pool=pool) for pool in ("demo", "other", "demo")]
    letters = await queue.dead_letters(10)
    assert [letter.job_id for letter in letters] == ids[::-1]
    letter = letters[0]
    assert (letter.pool, letter.priority, letter.tenant, letter.attempt) == ("demo", Priority.NORMAL, "ann", 3)
    assert letter.code == "worker_lost" and "died" in letter.message and letter.replayable
    assert [one.job_id for one in await queue.dead_letters(1, letters[0].entry_id)] == [ids[1]]
    assert [one.job_id for one in await queue.dead_letters(10, pool="other")] == [ids[1]]


async def test_a_replayed_dead_letter_waits_in_its_class_with_all_its_tries(queue: JobQueue) -> None:
    job_id = await _bury(queue, body=b"the request", priority=Priority.HIGH)
    before = await enqueue(queue, priority=Priority.HIGH)
    assert await queue.replay(job_id) is JobState.QUEUED
    assert await queue.dead_letters(10) == []
    jobs = await claim(queue)
    assert [job.id for job in jobs] == [before, job_id]
    job = jobs[1]
    assert (job.attempt, job.body, job.lost, job.failures) == (4, b"the request", 0, 0)
    await emit(queue, job, 1, "x")
    assert [at for at, _ in await queue.read_events(job_id, None)] == [EventId(4, 0), EventId(4, 1)]
    assert await succeed(queue, job)
    view = await queue.view(job_id)
    assert view is not None and (view.state, view.error_code) == (JobState.SUCCEEDED, None)


async def test_a_replay_is_accepted_and_ends_once_more(queue: JobQueue) -> None:
    job_id = await _bury(queue)
    assert await queue.counts() == {"accepted": 1, "failed": 1}
    for _ in range(2):  # a repeated call changes nothing
        assert await queue.replay(job_id) is JobState.QUEUED
    assert await queue.depths() == {(POOL, Priority.NORMAL): 1}
    assert [view.id for view in await queue.list_jobs(10)] == [job_id]
    await succeed(queue, await claim_one(queue))
    assert await queue.counts() == {"accepted": 2, "failed": 1, "succeeded": 1}


async def test_a_cancelled_durable_job_is_tried_again_and_a_plain_one_is_not(queue: JobQueue) -> None:
    durable, plain = await enqueue(queue, durable=True), await enqueue(queue)
    for job_id in (durable, plain):
        await queue.cancel(job_id)
    assert await queue.replay(durable) is JobState.QUEUED
    assert await queue.replay(plain) is JobState.CANCELLED
    assert (await claim_one(queue)).attempt == 1


async def test_what_succeeded_runs_or_is_unknown_is_not_replayed(queue: JobQueue) -> None:
    done, running = await enqueue(queue, durable=True), await enqueue(queue)
    first, _ = await claim(queue)
    await succeed(queue, first)
    assert await queue.replay(done) is JobState.SUCCEEDED
    assert await queue.replay(running) is JobState.RUNNING
    assert await queue.replay(new_job_id(SHARD)) is None


async def test_a_replayed_job_whose_deadline_passed_runs_without_one(queue: JobQueue, redis: Redis) -> None:
    job_id = await enqueue(queue, durable=True, deadline_ms=10**12 * 2)
    await queue.cancel(job_id)
    await redis.hset(queue.keys.job(job_id), "deadline", "1000")  # pyright: ignore[reportGeneralTypeIssues]
    await queue.replay(job_id)
    assert (await claim_one(queue)).deadline_ms is None


async def test_a_discarded_dead_letter_is_gone_and_its_job_still_told_of(queue: JobQueue, redis: Redis) -> None:
    job_id = await _bury(queue)
    assert await queue.discard(job_id)
    assert not await queue.discard(job_id)
    assert await queue.dead_letters(10) == []
    assert await queue.replay(job_id) is JobState.FAILED
    assert not await redis.exists(queue.keys.of("body", job_id))
    assert await state_of(queue, job_id) is JobState.FAILED


async def test_discarding_a_live_job_does_nothing(queue: JobQueue, lifecycle: Lifecycle) -> None:
    job_id = await enqueue(queue)
    assert not await lifecycle.discard(job_id)
    assert (await claim_one(queue, WORKER)).body == b"body"


async def test_a_dead_letter_whose_body_is_gone_says_so(queue: JobQueue, redis: Redis) -> None:
    job_id = await _bury(queue)
    await redis.delete(queue.keys.of("body", job_id))
    (letter,) = await queue.dead_letters(1)
    assert not letter.replayable
