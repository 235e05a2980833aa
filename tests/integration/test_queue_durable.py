"""Jobs with a SQL row: what of them stays until the recorder has their outcome, and goes when it is released."""

from __future__ import annotations

from redis.asyncio import Redis

from scheduler.job import ClaimedJob, JobState, new_job_id
from scheduler.queue.done_log import DoneLog
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.keys import DEAD_MS, DURABLE_KEEP_MS
from scheduler.queue.records import Outcome
from scheduler.settings import Settings
from scheduler.tokens import Failed, encode_event
from tests.conftest import SHARD
from tests.queue_cases import WORKER, claim_one, enqueue, new_job, state_of, succeed

KEEP_MS = 60_000


async def _fail(queue: JobQueue, job: ClaimedJob) -> None:
    payload = encode_event(Failed(code="invalid_request", message="no"))
    outcome = Outcome(JobState.FAILED, payload, error_code="invalid_request", error_message="no")
    assert await queue.finish(WORKER, job.id, job.attempt, outcome)


async def test_a_durable_jobs_outcome_stays_until_it_is_released(queue: JobQueue, redis: Redis) -> None:
    job_id = await enqueue(queue, durable=True, batch_id="batch-7")
    await succeed(queue, await claim_one(queue))
    keys = (queue.keys.job(job_id), queue.keys.log(job_id))
    for key in keys:
        assert DURABLE_KEEP_MS - 10_000 < await redis.pttl(key) <= DURABLE_KEEP_MS
    assert await queue.release([(job_id, 1)], KEEP_MS) == 1
    for key in keys:
        assert 0 < await redis.pttl(key) <= KEEP_MS


async def test_the_flag_and_the_batch_reach_the_reader_and_the_recorder(
    queue: JobQueue, redis: Redis, settings: Settings
) -> None:
    plain, durable = await enqueue(queue), await enqueue(queue, durable=True, batch_id="batch-7")
    for job_id, expected in ((plain, (False, None)), (durable, (True, "batch-7"))):
        view = await queue.view(job_id)
        assert view is not None and (view.durable, view.batch_id) == expected
        await queue.cancel(job_id)
    records = await DoneLog(redis, settings).read_done("r", 10, 1)
    assert [(record.job.durable, record.job.batch_id) for record in records] == [(False, None), (True, "batch-7")]


async def test_a_failed_durable_job_keeps_what_a_retry_needs_also_when_released(queue: JobQueue, redis: Redis) -> None:
    job_id = await enqueue(queue, durable=True)
    await _fail(queue, await claim_one(queue))
    await queue.release([(job_id, 1)], KEEP_MS)
    for key in (queue.keys.job(job_id), queue.keys.of("body", job_id)):
        assert DEAD_MS - 10_000 < await redis.pttl(key) <= DEAD_MS
    assert await redis.pttl(queue.keys.log(job_id)) <= KEEP_MS


async def test_release_concerns_only_that_end_of_the_job(queue: JobQueue, redis: Redis) -> None:
    waiting, ended = await enqueue(queue, durable=True), await enqueue(queue, durable=True)
    first = await claim_one(queue)
    await queue.cancel(ended)
    assert await queue.release([(waiting, 1), (ended, 3), (new_job_id(SHARD), 1)], KEEP_MS) == 0
    assert await redis.pttl(queue.keys.job(waiting)) > KEEP_MS
    assert await redis.pttl(queue.keys.job(ended)) > KEEP_MS
    assert await succeed(queue, first)


async def test_a_release_never_lengthens_a_life(queue: JobQueue, redis: Redis) -> None:
    job_id = await enqueue(queue)
    await succeed(queue, await claim_one(queue))
    await queue.release([(job_id, 1)], DURABLE_KEEP_MS)
    assert await redis.pttl(queue.keys.job(job_id)) < DURABLE_KEEP_MS / 2


async def test_known_tells_which_ids_have_a_hash(queue: JobQueue) -> None:
    waiting, ended = await enqueue(queue), await enqueue(queue)
    await queue.cancel(ended)
    assert await queue.known([waiting, new_job_id(SHARD), ended]) == {waiting, ended}
    assert await queue.known([]) == set()


async def test_a_known_id_is_created_again_without_effect_whatever_its_state(queue: JobQueue) -> None:
    job = new_job(durable=True)
    for state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
        assert (await queue.enqueue(job)).created
        assert await state_of(queue, job.id) is state
        if state is JobState.QUEUED:
            claimed = await claim_one(queue)
        elif state is JobState.RUNNING:
            await succeed(queue, claimed)  # pyright: ignore[reportPossiblyUnboundVariable]
    assert (await queue.counts())["accepted"] == 1
