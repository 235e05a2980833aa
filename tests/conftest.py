"""Fixtures for all tests: one real redis-server per session on a unix socket, emptied and checked for each test."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar, cast

import pytest
import redis as sync_redis
from redis.asyncio import Redis

from scheduler.lifecycle import Lifecycle
from scheduler.queue.connection import connect
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.keys import Keys
from scheduler.settings import Settings

SHARD = "t"

T = TypeVar("T")


async def wait_until(look: Callable[[], T | Awaitable[T]], within_s: float = 20.0, every_s: float = 0.01) -> T:
    """Polls until `look` (plain or async) says something true, and returns that; fails the test after `within_s`."""
    give_up = asyncio.get_running_loop().time() + within_s
    while True:
        seen = look()
        if isinstance(seen, Awaitable):
            seen = await cast("Awaitable[T]", seen)
        if seen:
            return seen
        if asyncio.get_running_loop().time() > give_up:
            raise AssertionError(f"not within {within_s} s: {inspect.getsource(look).strip()}")
        await asyncio.sleep(every_s)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A redis-server of the session's own; each test that uses it finds it empty."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis-home"))
    server.start()
    yield server.url
    server.stop()


@pytest.fixture(autouse=True)
def redis_hygiene(request: pytest.FixtureRequest) -> Iterator[None]:
    """Empties Redis before a test that uses it; after it, every key has a TTL or is a named singleton."""
    if "redis_url" not in request.fixturenames:
        yield
        return
    with sync_redis.Redis.from_url(request.getfixturevalue("redis_url")) as client:
        client.flushall()
        client.config_set("maxmemory", "1gb")
        yield
        leaked = [key for key in client.scan_iter(count=1000) if client.pttl(key) == -1 and not _may_stay(key.decode())]
    assert not leaked, f"keys without TTL that are no named singleton: {leaked}"


def _may_stay(key: str) -> bool:
    shard = key.partition("{")[2].partition("}")[0]
    return Keys(shard).is_singleton(key)


@pytest.fixture
def settings(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"), redis_url=redis_url, shard=SHARD, lease_ttl_ms=1500)


@pytest.fixture
async def redis(settings: Settings) -> AsyncIterator[Redis]:
    client = connect(settings, "command")
    yield client
    await client.aclose()


@pytest.fixture
async def queue(redis: Redis, settings: Settings) -> AsyncIterator[JobQueue]:
    queue = JobQueue(redis, settings)
    yield queue
    await queue.aclose()


@pytest.fixture
def fleet(redis: Redis, settings: Settings) -> Fleet:
    return Fleet(redis, settings)


@pytest.fixture
def lifecycle(queue: JobQueue, fleet: Fleet, settings: Settings) -> Lifecycle:
    return Lifecycle(queue, fleet, settings)
