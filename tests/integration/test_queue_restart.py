"""A redis-server that dies in mid-stream and comes back from its append-only file costs no event and no attempt."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scheduler.errors import QueueUnavailable
from scheduler.job import JobState
from scheduler.queue.connection import connect
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings
from scheduler.tokens import Delta, EventId
from tests.conftest import SHARD, wait_until
from tests.queue_cases import POOL, WORKER, ask, claim_one, delta, enqueue, state_of, succeed


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedRedis]:
    with tempfile.TemporaryDirectory(prefix="sw-") as home:
        server = EmbeddedRedis(Path(home))
        await asyncio.to_thread(server.start)
        yield server
        await asyncio.to_thread(server.stop)


async def test_streams_go_on_after_redis_was_killed_and_restarted(server: EmbeddedRedis) -> None:
    settings = Settings(redis_url=server.url, shard=SHARD)
    client = connect(settings, "command")
    queue, bus = JobQueue(client, settings), TokenBus(settings)
    await bus.start()
    await enqueue(queue)
    job = await claim_one(queue)

    async def emitted(seq: int) -> bool:
        try:
            return not (await queue.emit(WORKER, [(job.id, EventId(1, seq), delta(f"[{seq}]"))])).fenced
        except QueueUnavailable:
            return False

    async def follow() -> str:
        text = ""
        async with bus.subscribe(job.id) as subscription:
            while not subscription.ended:
                for _, event in await subscription.read(1):
                    text += event.choices[0].text if isinstance(event, Delta) else ""
        return text

    follower = asyncio.create_task(follow())
    for seq in range(1, 101):
        await wait_until(lambda seq=seq: emitted(seq))
        if seq == 50:
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            await wait_until(lambda: not server.alive)
            await asyncio.to_thread(server.start)
    assert await succeed(queue, job)
    async with asyncio.timeout(30):
        assert await follower == "".join(f"[{seq}]" for seq in range(1, 101))
    view = await queue.view(job.id)
    assert view is not None and view.attempt == 1 and await state_of(queue, job.id) is JobState.SUCCEEDED
    await bus.close()
    await client.aclose()


async def test_a_server_that_stood_still_past_the_lease_loses_no_worker(server: EmbeddedRedis) -> None:
    settings = Settings(redis_url=server.url, shard=SHARD, lease_ttl_ms=800, sweep_interval_ms=50)
    client = connect(settings, "command")
    queue = JobQueue(client, settings)
    await enqueue(queue)
    job = await claim_one(queue)

    async def swept() -> bool:
        return (await queue.sweep()).ran

    await wait_until(swept)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    sweeping = asyncio.create_task(queue.sweep())
    await asyncio.sleep(1.6)  # twice the lease: the time itself is what is tested
    os.kill(server.pid, signal.SIGCONT)
    result = await sweeping
    assert result.graced == 1 and result.workers == 0
    assert not (await queue.emit(WORKER, [(job.id, EventId(1, 1), delta("a"))])).fenced
    await client.aclose()


async def test_a_server_that_becomes_a_replica_is_an_outage_and_no_crash(server: EmbeddedRedis) -> None:
    settings = Settings(redis_url=server.url, shard=SHARD)
    client = connect(settings, "command")
    queue = JobQueue(client, settings)
    waiting = asyncio.create_task(queue.wait_for_work(POOL, 9))

    async def blocked() -> bool:
        return (await client.info("clients"))["blocked_clients"] > 0

    await wait_until(blocked)
    await ask(client, "REPLICAOF", "127.0.0.1", 1)
    with pytest.raises(QueueUnavailable):
        await waiting
    with pytest.raises(QueueUnavailable):
        await enqueue(queue)
    await ask(client, "REPLICAOF", "NO", "ONE")
    assert await state_of(queue, await enqueue(queue)) is JobState.QUEUED
    await queue.aclose()
    await client.aclose()
