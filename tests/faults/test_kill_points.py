"""A worker process is killed with -9 at each point of a job's life: another one goes on, and every stream is exact."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from scheduler.job import JobState
from scheduler.lifecycle import Lifecycle
from scheduler.loops.sweeper import run_sweeper
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings
from scheduler.tokens import Finished
from tests.conftest import wait_until
from tests.counting_backend import CountingBackend, consuming, counted
from tests.dying_worker import POINTS, Point, running
from tests.queue_cases import changed
from tests.worker_stage import Client, Stream

STREAMS, TOKENS = 3, 30


@pytest.fixture
async def hasty(redis: Redis, settings: Settings) -> AsyncIterator[Settings]:
    """Leases of 600 ms, a sweeper that runs, and no time to drain."""
    hasty = changed(settings, lease_ttl_ms=600, sweep_interval_ms=50, drain_s=0.0)
    stop = asyncio.Event()
    sweeping = asyncio.create_task(run_sweeper(JobQueue(redis, hasty), hasty, stop))
    yield hasty
    stop.set()
    await sweeping


@pytest.fixture
async def client(lifecycle: Lifecycle, settings: Settings) -> AsyncIterator[Client]:
    bus = TokenBus(settings)
    await bus.start()
    yield Client(lifecycle, bus, settings)
    await bus.close()


async def _open(stack: AsyncExitStack, client: Client) -> tuple[list[Stream], list[asyncio.Task[None]]]:
    opened = [await stack.enter_async_context(client.stream("x", max_tokens=TOKENS)) for _ in range(STREAMS)]
    return [stream for stream, _ in opened], [following for _, following in opened]


async def _listed(fleet: Fleet) -> bool:
    return bool(await fleet.models())


@pytest.mark.parametrize("point", [point for point in POINTS if point != "never"])
async def test_a_stream_survives_its_worker_killed_at(
    hasty: Settings, client: Client, fleet: Fleet, queue: JobQueue, point: Point
) -> None:
    with running(hasty, point) as dying:
        await wait_until(lambda: _listed(fleet), within_s=60)
        async with AsyncExitStack() as stack:
            streams, following = await _open(stack, client)
            if point == "drain":
                await wait_until(lambda: all(stream.token_count >= 5 for stream in streams))
                dying.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(dying.wait, 30) == -signal.SIGKILL
            async with consuming(CountingBackend(step_s=0.002), hasty):
                await asyncio.gather(*following)
    for stream in streams:
        assert isinstance(stream.end, Finished) and stream.text == {0: counted(TOKENS)}
        view = await queue.view(stream.job_id)
        assert view is not None and view.state is JobState.SUCCEEDED
    assert any(len(stream.attempts) == 2 for stream in streams)
    assert (await queue.counts())["succeeded"] == STREAMS


@pytest.mark.parametrize("clock_s", [-3600, 3600], ids=["behind", "ahead"])
async def test_a_worker_whose_clock_is_an_hour_off_keeps_its_lease_and_its_jobs_their_deadlines(
    hasty: Settings, client: Client, fleet: Fleet, queue: JobQueue, clock_s: int
) -> None:
    patient = changed(hasty, lease_ttl_ms=3000)  # the process is young, the machine may be busy
    with running(patient, "never", clock_s):
        await wait_until(lambda: _listed(fleet), within_s=60)
        (view,) = await fleet.workers()
        assert abs(view.seen_ms - time.time() * 1000 - clock_s * 1000) < 600_000  # it does live in another time
        async with AsyncExitStack() as stack:
            streams, following = await _open(stack, client)
            await asyncio.gather(*following)
        for stream in streams:
            assert isinstance(stream.end, Finished) and len(stream.attempts) == 1
            assert stream.text == {0: counted(TOKENS)}
