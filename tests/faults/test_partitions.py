"""The network between Redis and a worker, or between Redis and the relay, is gone for a while and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from scheduler.lifecycle import Lifecycle
from scheduler.loops.sweeper import run_sweeper
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings
from scheduler.tokens import Finished
from tests.conftest import wait_until
from tests.counting_backend import CountingBackend, consuming, counted
from tests.queue_cases import changed
from tests.redis_proxy import RedisProxy, redis_proxy
from tests.worker_stage import Client

STREAMS, TOKENS = 5, 60


@pytest.fixture
async def hasty(redis: Redis, settings: Settings) -> AsyncIterator[Settings]:
    hasty = changed(settings, lease_ttl_ms=600, sweep_interval_ms=50)
    stop = asyncio.Event()
    sweeping = asyncio.create_task(run_sweeper(JobQueue(redis, hasty), hasty, stop))
    yield hasty
    stop.set()
    await sweeping


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[RedisProxy]:
    async with redis_proxy(redis_url) as proxy:
        yield proxy


async def _ids(fleet: Fleet) -> set[str]:
    return {view.id for view in await fleet.workers()}


async def test_a_worker_that_was_cut_off_past_its_lease_is_fenced_and_comes_back_as_another(
    hasty: Settings, proxy: RedisProxy, lifecycle: Lifecycle, fleet: Fleet, settings: Settings
) -> None:
    bus = TokenBus(settings)
    await bus.start()
    client = Client(lifecycle, bus, settings)
    far = changed(hasty, redis_url=proxy.url)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(bus.close)
        await stack.enter_async_context(consuming(CountingBackend(step_s=0.02), far))
        cut_off = await wait_until(lambda: _ids(fleet))
        opened = [await stack.enter_async_context(client.stream("x", max_tokens=TOKENS)) for _ in range(STREAMS)]
        streams = [stream for stream, _ in opened]
        await wait_until(lambda: all(stream.token_count >= 5 for stream in streams))
        proxy.partition()  # the worker counts on, and its emits arrive when all is over
        async with consuming(CountingBackend(step_s=0.02), hasty):
            await asyncio.gather(*(following for _, following in opened))
        for stream in streams:
            assert isinstance(stream.end, Finished) and stream.text == {0: counted(TOKENS)}
            assert len(stream.attempts) == 2 and stream.attempts[0] in cut_off
        proxy.heal()
        again = await client.answer("y", max_tokens=5)
        assert again.text == {0: counted(5)} and not cut_off & set(again.attempts)


async def test_a_relay_that_was_cut_off_shows_the_rest_when_the_network_is_back(
    hasty: Settings, proxy: RedisProxy, queue: JobQueue, settings: Settings
) -> None:
    far = changed(settings, redis_url=proxy.url)
    bus = TokenBus(far)
    await bus.start()
    fleet = Fleet(queue._redis, settings)  # pyright: ignore[reportPrivateUsage] - on this side of the network
    client = Client(Lifecycle(queue, fleet, settings), bus, settings)

    async def succeeded() -> bool:
        return (await queue.counts()).get("succeeded") == 1

    async with consuming(CountingBackend(step_s=0.005), hasty):
        await wait_until(lambda: _ids(fleet))
        async with client.stream("x", max_tokens=TOKENS) as (stream, following):
            await wait_until(lambda: stream.token_count >= 5)
            proxy.partition()
            await wait_until(succeeded)
            assert stream.end is None
            proxy.heal()
            await following
    assert isinstance(stream.end, Finished) and stream.text == {0: counted(TOKENS)}
    await bus.close()
