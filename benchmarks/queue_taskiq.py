"""taskiq-redis under benchmarks/queue: its list broker (pops: a killed worker loses them) and its stream broker."""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import os
import time
from typing import Any
from urllib.parse import unquote

from benchmarks.queue_system import ROWS, RoundTrip, shares

URL, KIND = "BENCH_REDIS_URL", "BENCH_TASKIQ"


async def noop() -> float:
    return time.monotonic()


def make_broker(url: str, kind: str) -> Any:
    """The broker with `noop` registered under the same name in producer and worker."""
    from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend, RedisStreamBroker

    plain = "unix://" + unquote(url.removeprefix("unix://"))
    results: Any = RedisAsyncResultBackend(plain, result_ex_time=600)
    broker = (ListQueueBroker if kind == "list" else RedisStreamBroker)(plain).with_result_backend(results)
    broker.register_task(noop, task_name="noop")
    return broker


class TaskiqProducer:
    def __init__(self, url: str, kind: str) -> None:
        from redis.asyncio import Redis

        self._broker = make_broker(url, kind)
        self._task = self._broker.find_task("noop")
        self._redis: Any = Redis(unix_socket_path=unquote(url.removeprefix("unix://")))
        self._accepted = 0
        self._other_keys = 0

    async def open(self) -> None:
        await self._broker.startup()
        await self.round_trip()  # once the worker serves, what Redis holds beside results is constant
        self._accepted = 0
        self._other_keys = int(await self._redis.dbsize())

    async def enqueue(self, count: int) -> None:
        async def some(share: int) -> None:
            for _ in range(share):
                await self._task.kiq()

        self._accepted += count
        await asyncio.gather(*(some(share) for share in shares(count)))

    async def unfinished(self) -> int:
        """There is no counter: one key per result."""
        return self._accepted - (int(await self._redis.dbsize()) - self._other_keys)

    async def round_trip(self) -> RoundTrip:
        self._accepted += 1
        began_s = time.monotonic()
        handle = await self._task.kiq()
        result = await handle.wait_result(check_interval=0.0005)
        return RoundTrip(result.return_value - began_s, time.monotonic() - began_s)

    async def close(self) -> None:
        await self._broker.shutdown()
        await self._redis.aclose()


class Taskiq:
    share = 0.5
    is_foreign = True

    def __init__(self, kind: str, guarantees: str) -> None:
        self.name = f"taskiq ({kind})"
        self._kind = kind
        self.guarantees = guarantees

    def producer(self, url: str) -> TaskiqProducer:
        return TaskiqProducer(url, self._kind)

    def command(self, python: str, url: str) -> list[str] | None:
        os.environ[URL], os.environ[KIND] = url, self._kind
        options = ["--workers", "1", "--max-async-tasks", str(ROWS), "--log-level", "WARNING"]
        return [python, "-m", "taskiq", "worker", "benchmarks.queue_taskiq:broker", *options]

    async def work(self, url: str) -> None:
        raise NotImplementedError("its own command line is the worker")


def __getattr__(name: str) -> Any:
    """`broker`, for taskiq's command line."""
    if name == "broker":
        return make_broker(os.environ[URL], os.environ[KIND])
    raise AttributeError(name)


LIST = Taskiq("list", "at most once: the broker pops, result key")
STREAM = Taskiq("stream", "at least once, unacknowledged jobs after 10 min, result key")
