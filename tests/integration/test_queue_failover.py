"""A replica that was promoted without its primary's last writes gives no attempt a number that was seen before."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from scheduler.queue.connection import check_server, connect
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.redis_binary import find_redis_binary
from scheduler.settings import Settings
from tests.conftest import SHARD, wait_until
from tests.queue_cases import WORKER, ask, claim, claim_one, emit, enqueue, succeed
from tests.service import free_port

LOCAL = "127.0.0.1"


@asynccontextmanager
async def _server(folder: Path, *arguments: str) -> AsyncIterator[tuple[int, Redis, JobQueue]]:
    port = free_port()
    command = [str(find_redis_binary().path), "--port", str(port), "--bind", LOCAL, "--dir", str(folder), "--save", ""]
    command += ["--repl-diskless-sync-delay", "0", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    settings = Settings(redis_url=f"redis://{LOCAL}:{port}", shard=SHARD, sweep_interval_ms=20, lease_ttl_ms=60_000)
    client = connect(settings, "command")
    try:
        await check_server(client, wait_s=20)
        yield port, client, JobQueue(client, settings)
    finally:
        await client.aclose()
        process.kill()
        await process.wait()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[JobQueue, Redis, JobQueue]]:
    """The primary's queue, and the replica with its own."""
    async with AsyncExitStack() as stack:
        port, _, primary = await stack.enter_async_context(_server(tmp_path))
        _, replica, behind = await stack.enter_async_context(_server(tmp_path, "--replicaof", LOCAL, str(port)))
        yield primary, replica, behind


async def _swept(queue: JobQueue) -> bool:
    return (await queue.sweep()).ran


async def test_attempts_go_on_above_all_that_the_lost_primary_gave_out(
    pair: tuple[JobQueue, Redis, JobQueue],
) -> None:
    primary, replica, behind = pair
    job_id = await enqueue(primary)
    await claim_one(primary)
    await wait_until(lambda: _swept(primary))

    async def caught_up() -> bool:
        return bool(await replica.hget(behind.keys.of("sweep"), "replid")) and bool(await behind.view(job_id))  # pyright: ignore

    await wait_until(caught_up)
    await ask(replica, "REPLICAOF", "NO", "ONE")
    await primary.hand_back(WORKER, job_id, 1)  # from here on, the replica knows of nothing
    tail = await claim_one(primary)
    await emit(primary, tail, 1, "seen")
    assert tail.attempt == 2

    await wait_until(lambda: _swept(behind))
    assert (await emit(behind, tail, 2, "zombie")).fenced == {job_id}
    await behind.expire_worker(WORKER)
    job = await claim_one(behind, "w:2")
    assert (job.id, job.attempt) == (job_id, 1001)
    await wait_until(lambda: _swept(behind))
    await behind.hand_back("w:2", job_id, 1001)
    again = await claim_one(behind, "w:2")
    assert again.attempt == 1002  # one failover, one epoch
    assert await succeed(behind, again, "w:2")


async def test_a_restart_is_no_failover() -> None:
    with tempfile.TemporaryDirectory(prefix="sw-") as home:
        server = EmbeddedRedis(Path(home))
        settings = Settings(redis_url=server.url, shard=SHARD, sweep_interval_ms=20)
        for attempt in (1, 2):
            await asyncio.to_thread(server.start)
            client = connect(settings, "command")
            queue = JobQueue(client, settings)
            try:
                await wait_until(lambda queue=queue: _swept(queue))
                if attempt == 1:
                    await enqueue(queue)
                (job,) = await claim(queue)
                assert job.attempt == attempt
                await queue.hand_back(WORKER, job.id, job.attempt)
            finally:
                await client.aclose()
                await asyncio.to_thread(server.stop)
