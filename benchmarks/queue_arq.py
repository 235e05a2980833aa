"""arq under benchmarks/queue: as it comes (polls twice a second), and with the shortest useful poll delay."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any
from urllib.parse import unquote

from arq import create_pool, func
from arq.connections import ArqRedis, RedisSettings
from arq.constants import default_queue_name
from arq.worker import Worker

from benchmarks.queue_system import ROWS, RoundTrip, shares


async def noop(ctx: dict[Any, Any]) -> float:
    return time.monotonic()


class ArqProducer:
    def __init__(self, url: str, poll_s: float) -> None:
        self._url = url
        self._poll_s = poll_s
        self._redis: ArqRedis | None = None

    @property
    def redis(self) -> ArqRedis:
        assert self._redis is not None
        return self._redis

    async def open(self) -> None:
        self._redis = await create_pool(_settings(self._url))

    async def enqueue(self, count: int) -> None:
        async def some(share: int) -> None:
            for _ in range(share):
                await self.redis.enqueue_job("noop")

        await asyncio.gather(*(some(share) for share in shares(count)))

    async def unfinished(self) -> int:
        return int(await self.redis.zcard(default_queue_name))

    async def round_trip(self) -> RoundTrip:
        await asyncio.sleep(random.uniform(0, self._poll_s))  # else the next job comes in step with the polls
        began_s = time.monotonic()
        job = await self.redis.enqueue_job("noop")
        assert job is not None
        ran_s = await job.result(poll_delay=self._poll_s)
        return RoundTrip(ran_s - began_s, time.monotonic() - began_s)

    async def close(self) -> None:
        await self.redis.aclose()


class Arq:
    is_foreign = False
    guarantees = "at least once, lease = job timeout + 10 s, result key"

    def __init__(self, name: str, share: float, poll_s: float | None) -> None:
        self.name = name
        self.share = share
        self._poll_s = poll_s

    def producer(self, url: str) -> ArqProducer:
        return ArqProducer(url, 0.5 if self._poll_s is None else 0.001)

    def command(self, python: str, url: str) -> list[str] | None:
        return None

    async def work(self, url: str) -> None:
        tuned = {} if self._poll_s is None else {"poll_delay": self._poll_s, "max_jobs": ROWS, "log_results": False}
        worker = Worker([func(noop, name="noop")], redis_settings=_settings(url), handle_signals=True, **tuned)
        await worker.async_run()


def _settings(url: str) -> RedisSettings:
    return RedisSettings(unix_socket_path=unquote(url.removeprefix("unix://")))


DEFAULT = Arq("arq (as it comes)", 0.05, None)
TUNED = Arq("arq (poll 5 ms)", 0.5, 0.005)
