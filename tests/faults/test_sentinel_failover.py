"""The primary dies or is demoted under load: Sentinel names another, and everything accepted comes to its end there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from arq.connections import ArqRedis
from arq.worker import Worker, func
from redis.asyncio import ConnectionPool, Redis

from scheduler.errors import QueueUnavailable
from scheduler.lifecycle import Lifecycle
from scheduler.loops.sweeper import run_sweeper
from scheduler.queue.connection import connect
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings
from scheduler.tokens import Finished
from tests.conftest import SHARD, wait_until
from tests.counting_backend import CountingBackend, consuming, counted
from tests.queue_cases import POOL, ask, enqueue
from tests.sentinel_stage import SentinelStage, sentinel_stage
from tests.worker_stage import Client

STREAMS, TOKENS = 20, 60


@pytest.fixture
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelStage]:
    with sentinel_stage(tmp_path_factory.mktemp("sentinel")) as stage:
        yield stage


@pytest.fixture
def far(stage: SentinelStage, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, redis_url=stage.url, shard=SHARD, lease_ttl_ms=5000)


@asynccontextmanager
async def clients(settings: Settings) -> AsyncIterator[tuple[Redis, JobQueue, Client]]:
    redis, bus = connect(settings, "command"), TokenBus(settings)
    queue, stop = JobQueue(redis, settings), asyncio.Event()
    await bus.start()
    sweeping = asyncio.create_task(run_sweeper(queue, settings, stop))
    try:
        yield redis, queue, Client(Lifecycle(queue, Fleet(redis, settings), settings), bus, settings)
    finally:
        stop.set()
        await sweeping
        await bus.close()
        await redis.aclose()


async def _is_listed(redis: Redis, settings: Settings) -> bool:
    return bool(await Fleet(redis, settings).models())


async def test_streams_and_waiting_jobs_end_right_on_the_new_primary(stage: SentinelStage, far: Settings) -> None:
    backend = CountingBackend(rows=STREAMS // 2, step_s=0.03)  # the other half waits in the queue
    async with clients(far) as (redis, queue, client), consuming(backend, far), AsyncExitStack() as stack:
        await wait_until(lambda: _is_listed(redis, far))
        running = [
            await stack.enter_async_context(client.stream(str(number), max_tokens=TOKENS)) for number in range(STREAMS)
        ]
        streams = [stream for stream, _ in running]
        await wait_until(lambda: sum(stream.token_count >= 10 for stream in streams) >= STREAMS // 2)
        assert await ask(redis, "WAIT", 1, 5000) == 1
        stage.kill_primary()
        await asyncio.gather(*(following for _, following in running))
        assert stage.replica_is_primary()
        for stream in streams:
            assert isinstance(stream.end, Finished) and stream.text == {0: counted(TOKENS)}
        counts = await queue.counts()
        assert (counts["accepted"], counts["succeeded"]) == (STREAMS, STREAMS)


async def test_an_arq_worker_on_such_a_pool_goes_on_after_a_failover(stage: SentinelStage, far: Settings) -> None:
    """The control plane gives arq the pool of one of our clients."""
    ran: list[int] = []

    async def note(ctx: dict[Any, Any], number: int) -> None:
        ran.append(number)

    async def run(number: int) -> None:
        arq = ArqRedis(cast(ConnectionPool, connect(far, "command").connection_pool), default_queue_name="arq:test")
        await arq.enqueue_job("note", number)
        worker = Worker([func(note, name="note")], redis_pool=arq, queue_name="arq:test", burst=True, poll_delay=0.05)
        await worker.main()
        await worker.pool.aclose(True)

    await run(1)
    stage.kill_primary()
    await wait_until(stage.replica_is_primary)
    await run(2)
    assert ran == [1, 2]


async def test_writes_move_at_once_when_another_was_made_primary_and_blocked_reads_when_theirs_is_demoted(
    stage: SentinelStage, far: Settings
) -> None:
    async with clients(far) as (redis, queue, _):
        waiting = asyncio.create_task(queue.wait_for_work(POOL, 9))
        await wait_until(lambda: _has_blocked_clients(redis))
        await asyncio.to_thread(stage.fail_over)

        async def arrives() -> bool:  # before the old one is demoted, which Sentinel does 8 s later
            job_id = await enqueue(queue, pool="other")
            return stage.replica_has(queue.keys.job(job_id))

        await wait_until(stage.replica_is_primary)
        await wait_until(arrives)
        assert not stage.old_primary_is_replica() and not waiting.done()
        stage.demote_old_primary()
        await enqueue(queue)  # rings the bell that the blocked read listens to on the new primary
        await waiting
        await queue.aclose()


async def _has_blocked_clients(redis: Redis) -> bool:
    return (await redis.info("clients"))["blocked_clients"] > 0


async def test_without_primary_and_sentinel_a_call_is_refused_and_says_what_is_missing(
    stage: SentinelStage, far: Settings
) -> None:
    redis = connect(far, "command")
    await ask(redis, "PING")
    stage.stop()
    with pytest.raises(QueueUnavailable, match=r"no Sentinel \(127.* names a primary of 'main'"):
        await enqueue(JobQueue(redis, far))
    await redis.aclose()
