"""Celery under benchmarks/queue: Redis broker and results, JSON, one prefork process or the solo pool."""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import os
import time
from typing import Any
from urllib.parse import unquote

from benchmarks.queue_system import RoundTrip

URL = "BENCH_REDIS_URL"


def noop() -> float:
    return time.monotonic()


def make_app(url: str) -> Any:
    """The application, the same in producer and worker."""
    from celery import Celery

    path = unquote(url.removeprefix("unix://"))
    app: Any = Celery("bench", broker=f"redis+socket://{path}", backend=f"redis+socket://{path}")
    app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True, result_expires=600)
    app.task(name="noop")(noop)
    return app


class CeleryProducer:
    """Celery's client is synchronous: one call at a time, as its users have it."""

    def __init__(self, url: str) -> None:
        from redis.asyncio import Redis

        self._app = make_app(url)
        self._task = self._app.tasks["noop"]
        self._redis: Any = Redis(unix_socket_path=unquote(url.removeprefix("unix://")))

    async def open(self) -> None:
        await self.round_trip()

    async def enqueue(self, count: int) -> None:
        for number in range(count):
            self._task.apply_async(ignore_result=False)
            if number % 50 == 0:
                await asyncio.sleep(0)

    async def unfinished(self) -> int:
        """Waiting, and taken but not yet acknowledged."""
        return int(await self._redis.llen("celery")) + int(await self._redis.hlen("unacked"))

    async def round_trip(self) -> RoundTrip:
        began_s = time.monotonic()
        ran_s = self._task.apply_async().get(timeout=60)
        return RoundTrip(ran_s - began_s, time.monotonic() - began_s)

    async def close(self) -> None:
        await self._redis.aclose()


class Celery:
    share = 0.25
    is_foreign = True

    def __init__(self, pool: str) -> None:
        self.name = f"celery ({pool})"
        self._pool = pool
        self.guarantees = "acknowledged at start; visibility timeout 1 h, result key"

    def producer(self, url: str) -> CeleryProducer:
        return CeleryProducer(url)

    def command(self, python: str, url: str) -> list[str] | None:
        os.environ[URL] = url
        options = ["--pool", self._pool, "--concurrency", "1", "--loglevel", "ERROR", "--without-gossip"]
        return [python, "-m", "celery", "-A", "benchmarks.queue_celery:app", "worker", *options]

    async def work(self, url: str) -> None:
        raise NotImplementedError("its own command line is the worker")


def __getattr__(name: str) -> Any:
    """`app`, for celery's command line."""
    if name == "app":
        return make_app(os.environ[URL])
    raise AttributeError(name)


PREFORK = Celery("prefork")
SOLO = Celery("solo")
