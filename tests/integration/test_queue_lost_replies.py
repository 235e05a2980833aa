"""Redis executed a script, its reply got lost: the client asks again, and nothing is done twice or forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from scheduler.job import JobState, Priority
from scheduler.queue import scripts
from scheduler.queue.connection import connect
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Outcome
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings
from scheduler.tokens import Delta, EventId
from tests.conftest import wait_until
from tests.queue_cases import (
    POOL,
    WORKER,
    ask,
    changed,
    claim,
    claim_one,
    delta,
    emit,
    enqueue,
    log_ids,
    state_of,
    succeed,
)
from tests.redis_proxy import RedisProxy, redis_proxy

KEEP_MS = 60_000
DEAD = Outcome(JobState.FAILED, b"", error_code="engine_failure", error_message="x", dead=True)


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[RedisProxy]:
    async with redis_proxy(redis_url) as proxy:
        yield proxy


@pytest.fixture
async def far_queue(proxy: RedisProxy, settings: Settings) -> AsyncIterator[JobQueue]:
    """A queue that reaches Redis through the proxy, over TCP; no reply that gets lost is a NOSCRIPT."""
    far = changed(settings, redis_url=proxy.url)
    client = connect(far, "command")
    for script in vars(scripts).values():
        if isinstance(script, scripts.Script):
            await ask(client, "SCRIPT", "LOAD", script.text)
    queue = JobQueue(client, far)
    yield queue
    await queue.aclose()
    await client.aclose()


async def test_a_lost_reply_of_enqueue_makes_no_second_job(far_queue: JobQueue, proxy: RedisProxy) -> None:
    proxy.lose_next_reply()
    job_id = await enqueue(far_queue)
    assert proxy.lost == 1
    assert [job.id for job in await claim(far_queue)] == [job_id]


async def test_a_lost_reply_of_claim_strands_no_job_and_burns_no_attempt(
    far_queue: JobQueue, proxy: RedisProxy
) -> None:
    ids = [await enqueue(far_queue) for _ in range(3)]
    proxy.lose_next_reply()
    jobs = await claim(far_queue, rows=2)
    assert proxy.lost == 1
    assert [(job.id, job.attempt) for job in jobs] == [(ids[0], 1), (ids[1], 1)]
    assert [job.id for job in await claim(far_queue)] == [ids[2]]


async def test_a_lost_reply_of_emit_logs_the_event_once(far_queue: JobQueue, proxy: RedisProxy) -> None:
    await enqueue(far_queue)
    job = await claim_one(far_queue)
    proxy.lose_next_reply()
    result = await emit(far_queue, job, 1, "a")
    assert proxy.lost == 1 and not result.fenced
    assert await log_ids(far_queue, job.id) == ["1-0", "1-1"]


async def test_a_lost_reply_of_finish_is_still_a_success(far_queue: JobQueue, proxy: RedisProxy) -> None:
    await enqueue(far_queue)
    job = await claim_one(far_queue)
    proxy.lose_next_reply()
    assert await succeed(far_queue, job)
    assert proxy.lost == 1 and (await far_queue.counts())["succeeded"] == 1


async def test_a_lost_reply_of_a_retry_or_hand_back_counts_once(far_queue: JobQueue, proxy: RedisProxy) -> None:
    await enqueue(far_queue)
    job = await claim_one(far_queue)
    proxy.lose_next_reply()
    retry = Outcome(JobState.SCHEDULED, retry_delay_ms=0, error_code="engine_failure", error_message="x")
    assert await far_queue.finish(WORKER, job.id, job.attempt, retry)
    again = await claim_one(far_queue)
    assert (again.attempt, again.failures) == (2, 1)
    proxy.lose_next_reply()
    assert await far_queue.hand_back(WORKER, again.id, again.attempt)
    assert proxy.lost == 2
    assert (await claim_one(far_queue)).failures == 1


async def test_a_lost_reply_of_expire_worker_counts_one_loss(far_queue: JobQueue, proxy: RedisProxy) -> None:
    job_id = await enqueue(far_queue)
    await claim_one(far_queue)
    proxy.lose_next_reply()
    await far_queue.expire_worker(WORKER)
    again = await claim_one(far_queue, "w:2")
    assert proxy.lost == 1 and (again.id, again.attempt, again.lost) == (job_id, 2, 1)


async def test_a_lost_reply_of_cancel_cancels_once(far_queue: JobQueue, proxy: RedisProxy) -> None:
    job_id = await enqueue(far_queue)
    proxy.lose_next_reply()
    assert await far_queue.cancel(job_id) is JobState.CANCELLED
    assert await state_of(far_queue, job_id) is JobState.CANCELLED
    assert proxy.lost == 1 and (await far_queue.counts())["cancelled"] == 1


async def test_a_lost_reply_of_sweep_loses_each_job_once(far_queue: JobQueue, proxy: RedisProxy, redis: Redis) -> None:
    job_id = await enqueue(far_queue)
    await claim_one(far_queue)
    await ask(redis, "ZADD", far_queue.keys.of("lease"), 1, WORKER)  # long expired
    proxy.lose_next_reply()
    assert not (await far_queue.sweep()).ran  # asked again, it says that another was just there
    again = await claim_one(far_queue, "w:2")
    assert proxy.lost == 1 and (again.id, again.attempt, again.lost) == (job_id, 2, 1)


async def test_a_lost_reply_of_retire_worker_hands_back_once(
    far_queue: JobQueue, proxy: RedisProxy, redis: Redis
) -> None:
    job_id = await enqueue(far_queue)
    await claim_one(far_queue)
    proxy.lose_next_reply()
    await far_queue.retire_worker(WORKER)
    assert proxy.lost == 1 and await redis.hget(far_queue.keys.job(job_id), "handed") == b"1"  # pyright: ignore
    again = await claim_one(far_queue, "w:2")
    assert (again.attempt, again.lost, again.failures) == (2, 0, 0)
    assert await claim(far_queue, "w:3") == []


async def test_a_lost_reply_of_reprioritise_moves_and_counts_a_job_once(far_queue: JobQueue, proxy: RedisProxy) -> None:
    job_id = await enqueue(far_queue)
    proxy.lose_next_reply()
    assert await far_queue.reprioritise(job_id, Priority.HIGH) is JobState.QUEUED
    assert proxy.lost == 1 and await far_queue.depths() == {(POOL, Priority.HIGH): 1}
    assert [job.id for job in await claim(far_queue)] == [job_id]


async def test_a_lost_reply_of_pause_and_resume_changes_nothing_more(far_queue: JobQueue, proxy: RedisProxy) -> None:
    job_id = await enqueue(far_queue)
    proxy.lose_next_reply()
    await far_queue.pause(POOL)
    assert await claim(far_queue) == []
    proxy.lose_next_reply()
    await far_queue.resume(POOL)
    assert proxy.lost == 2 and [job.id for job in await claim(far_queue)] == [job_id]


async def test_a_lost_reply_of_replay_queues_a_dead_letter_once(far_queue: JobQueue, proxy: RedisProxy) -> None:
    job_id = await enqueue(far_queue)
    job = await claim_one(far_queue)
    assert await far_queue.finish(WORKER, job_id, job.attempt, DEAD)
    proxy.lose_next_reply()
    assert await far_queue.replay(job_id) is JobState.QUEUED
    assert proxy.lost == 1 and sum((await far_queue.depths()).values()) == 1
    assert [(job.id, job.attempt) for job in await claim(far_queue)] == [(job_id, 2)]


async def test_a_lost_reply_of_release_shortens_lives_once(
    far_queue: JobQueue, proxy: RedisProxy, redis: Redis
) -> None:
    ended, waiting = await enqueue(far_queue, durable=True), await enqueue(far_queue, durable=True)
    job = await claim_one(far_queue)
    assert await succeed(far_queue, job)
    lives = [far_queue.keys.job(ended), far_queue.keys.log(ended)]
    assert [await redis.pttl(key) > KEEP_MS for key in lives] == [True, True]
    proxy.lose_next_reply()
    assert await far_queue.release([(ended, job.attempt), (waiting, 1)], KEEP_MS) == 1
    assert proxy.lost == 1
    assert [0 < await redis.pttl(key) <= KEEP_MS for key in lives] == [True, True]
    assert [job.id for job in await claim(far_queue)] == [waiting]


async def test_a_release_that_comes_again_after_a_replay_takes_nothing_from_it(
    far_queue: JobQueue, proxy: RedisProxy, redis: Redis
) -> None:
    job_id = await enqueue(far_queue, durable=True)
    assert await far_queue.finish(WORKER, job_id, (await claim_one(far_queue)).attempt, DEAD)
    proxy.lose_next_reply()
    assert await far_queue.release([(job_id, 1)], KEEP_MS) == 1
    assert await far_queue.replay(job_id) is JobState.QUEUED
    assert await far_queue.release([(job_id, 1)], KEEP_MS) == 0
    assert proxy.lost == 1 and await redis.pttl(far_queue.keys.job(job_id)) > KEEP_MS
    again = await claim_one(far_queue)
    assert again.attempt == 2 and await succeed(far_queue, again)


async def test_a_lost_reply_of_discard_gives_up_that_dead_letter_only(
    far_queue: JobQueue, proxy: RedisProxy, redis: Redis
) -> None:
    ids = [await enqueue(far_queue) for _ in range(2)]
    for job in await claim(far_queue):
        assert await far_queue.finish(WORKER, job.id, job.attempt, DEAD)
    proxy.lose_next_reply()
    assert not await far_queue.discard(ids[0])  # asked again, it says that there is nothing left to give up
    assert proxy.lost == 1
    assert [letter.job_id for letter in await far_queue.dead_letters(10)] == [ids[1]]
    assert not await redis.exists(far_queue.keys.of("body", ids[0]))
    assert await state_of(far_queue, ids[0]) is JobState.FAILED
    assert await far_queue.replay(ids[1]) is JobState.QUEUED


async def test_a_relay_over_a_line_that_keeps_breaking_shows_everything_once(
    queue: JobQueue, proxy: RedisProxy, settings: Settings
) -> None:
    bus = TokenBus(changed(settings, redis_url=proxy.url))
    await bus.start()
    await enqueue(queue)
    job = await claim_one(queue)

    async def follow() -> str:
        text = ""
        async with bus.subscribe(job.id) as subscription:
            while not subscription.ended:
                for _, event in await subscription.read(1):
                    text += event.choices[0].text if isinstance(event, Delta) else ""
        return text

    follower = asyncio.create_task(follow())
    for seq in range(1, 101):
        await queue.emit(WORKER, [(job.id, EventId(1, seq), delta(f"[{seq}]"))])
        if seq % 25 == 0:
            before = bus.connects
            proxy.cut()
            await wait_until(lambda before=before: bus.connects > before)
    await succeed(queue, job)
    async with asyncio.timeout(30):
        assert await follower == "".join(f"[{seq}]" for seq in range(1, 101))
    await bus.close()
