"""saq under benchmarks/queue: its Redis queue, results over its pub/sub, as many jobs at once as Spillway has rows."""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import unquote

from benchmarks.queue_system import ROWS, RoundTrip, shares


async def noop(_context: Any) -> float:
    return time.monotonic()


class SaqProducer:
    def __init__(self, url: str) -> None:
        self._queue = _queue(url)

    async def open(self) -> None:
        await self._queue.connect()

    async def enqueue(self, count: int) -> None:
        async def some(share: int) -> None:
            for _ in range(share):
                await self._queue.enqueue("noop")

        await asyncio.gather(*(some(share) for share in shares(count)))

    async def unfinished(self) -> int:
        return int(await self._queue.count("incomplete"))

    async def round_trip(self) -> RoundTrip:
        began_s = time.monotonic()
        job = await self._queue.enqueue("noop")
        while not job.completed:  # `apply` looks twice a second, and waiting for its pub/sub message may miss it
            await asyncio.sleep(0.0005)
            await job.refresh()
        return RoundTrip(job.result - began_s, time.monotonic() - began_s)

    async def close(self) -> None:
        await self._queue.disconnect()


class Saq:
    name = "saq"
    share = 0.5
    is_foreign = True
    guarantees = "at least once, stuck jobs swept each 60 s, result with the job, unique by key"

    def producer(self, url: str) -> SaqProducer:
        return SaqProducer(url)

    def command(self, python: str, url: str) -> list[str] | None:
        return None

    async def work(self, url: str) -> None:
        from saq import Worker

        await Worker(_queue(url), functions=[noop], concurrency=ROWS).start()


def _queue(url: str) -> Any:
    from redis.asyncio import Redis
    from saq.queue.redis import RedisQueue

    return RedisQueue(Redis(unix_socket_path=unquote(url.removeprefix("unix://"))), max_concurrent_ops=64)


SAQ = Saq()
