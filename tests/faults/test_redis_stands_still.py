"""redis-server is stopped for 5 s, three times a lease, in mid-stream: no job changes hands, no stream has a gap."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from scheduler.lifecycle import Lifecycle
from scheduler.loops.sweeper import run_sweeper
from scheduler.queue.connection import connect
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings
from scheduler.tokens import Finished
from tests.conftest import SHARD, wait_until
from tests.counting_backend import CountingBackend, consuming, counted
from tests.worker_stage import Client

STREAMS, TOKENS = 40, 80
STOPPED_S = 5.0


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    with tempfile.TemporaryDirectory(prefix="sw-") as home:
        server = EmbeddedRedis(Path(home))
        server.start()
        yield server
        server.stop()


async def test_forty_streams_stay_on_their_first_attempt(server: EmbeddedRedis) -> None:
    settings = Settings(redis_url=server.url, shard=SHARD)
    redis, bus, stop = connect(settings, "command"), TokenBus(settings), asyncio.Event()
    queue, fleet = JobQueue(redis, settings), Fleet(redis, settings)
    client = Client(Lifecycle(queue, fleet, settings), bus, settings)
    await bus.start()
    sweeping = asyncio.create_task(run_sweeper(queue, settings, stop))
    async with consuming(CountingBackend(step_s=0.02), settings), AsyncExitStack() as stack:
        await wait_until(fleet.models)
        opened = [await stack.enter_async_context(client.stream("x", max_tokens=TOKENS)) for _ in range(STREAMS)]
        streams = [stream for stream, _ in opened]
        await wait_until(lambda: all(stream.token_count >= 5 for stream in streams))
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        await asyncio.sleep(STOPPED_S)  # the time itself is what is tested
        os.kill(server.pid, signal.SIGCONT)
        await asyncio.gather(*(following for _, following in opened))
    for stream in streams:
        assert isinstance(stream.end, Finished) and len(stream.attempts) == 1
        assert stream.text == {0: counted(TOKENS)}
    stop.set()
    await sweeping
    await bus.close()
    await redis.aclose()
