"""The control plane's jobs, run by arq: the only module that imports it. The scheduler process runs a ControlPlane.

Periodic jobs: arq keeps their timetable in Redis, so that of several schedulers exactly one runs each job at each time.
Named functions: any process may kick one (ControlKick); a kick is a hint that may be lost or doubled, so every function
is idempotent, and a periodic job finds the work of a lost kick. Jobs are msgpack, never pickle. arq's worker ends when
Redis goes away; a new one then takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from datetime import UTC
from types import CoroutineType
from typing import Any, cast

import msgspec
from arq.connections import ArqRedis
from arq.cron import CronJob, cron
from arq.worker import Function, Retry, Worker, func
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError
from sqlalchemy.exc import InterfaceError, OperationalError

from scheduler.errors import CapacityError
from scheduler.queue.connection import connect
from scheduler.queue.keys import Keys
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

JOB_TIMEOUT_S = 60
MAX_TRIES = 5
MAX_DEFER_S = 60.0
MAX_JOBS = 64  # at once in one process; each takes a connection of the pool (80) as it starts and ends
RECONNECT_S = 1.0
CLOSE_S = 5.0
QUICK_FAILURE_S = 15.0  # a worker that ended sooner met the outage that was told of already
KICK_S = 1.0
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400

log = get_logger(__name__)


class ControlKick:
    """Asks for a named function to run soon, in whatever scheduler; may be lost or doubled. Close it."""

    def __init__(self, settings: Settings) -> None:
        self._shard = settings.shard
        self._redis = _arq_redis(settings)

    async def __call__(self, name: str, *args: str) -> None:
        """Never raises. A call of `name` with `args` that already waits or runs stands for this one."""
        job_id = ":".join((name, self._shard, *args))
        try:
            async with asyncio.timeout(KICK_S):
                await self._redis.enqueue_job(name, *args, _job_id=job_id)
        except (RedisError, OSError) as error:  # TimeoutError too
            log.info("a kick was lost; the sweep will find its work", name=name, args=args, error=repr(error))

    async def aclose(self) -> None:
        await self._redis.aclose(True)


class ControlPlane:
    """The jobs of one scheduler process: register them all, then `run`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cron: list[CronJob] = []
        self._functions: list[Function] = []
        self._busy: set[str] = set()

    def every(self, period_s: int, name: str, run: Callable[[], Awaitable[object]], offset_s: int = 0) -> None:
        """Do this each `period_s` (a divisor of a minute, an hour or a day), and when a scheduler starts.

        A turn is left out while the one before it still runs in this process.
        """
        # arq's job ids begin with this name: two shards in one Redis must not take each other's turns.
        times = _times(period_s, offset_s)
        coroutine = self._periodic(name, run, period_s)
        self._cron.append(
            cron(coroutine, name=f"{name}:{self._settings.shard}", run_at_startup=True, max_tries=MAX_TRIES, **times)
        )

    def function(self, name: str, run: Callable[..., Awaitable[object]]) -> None:
        """What a kick of this name calls, with the kick's arguments. It must be safe to repeat."""

        async def call(ctx: dict[Any, Any], *args: str) -> None:
            try:
                await run(*args)
            except _TRANSIENT as error:
                raise _retry(name, ctx, error) from error

        self._functions.append(func(call, name=name))

    async def run(self) -> None:
        """Run what was registered until cancelled."""
        logging.getLogger("arq").setLevel(logging.WARNING)
        while True:
            worker = self._worker()
            started_s = time.monotonic()
            try:
                await worker.async_run()
            except (RedisError, OSError) as error:
                again = time.monotonic() - started_s < QUICK_FAILURE_S
                tell = log.debug if again else log.warning
                tell("control jobs wait for Redis", error=str(error) or type(error).__name__)
            finally:
                await _close(worker)
            await asyncio.sleep(RECONNECT_S)

    def _periodic(
        self, name: str, run: Callable[[], Awaitable[object]], period_s: int
    ) -> Callable[..., CoroutineType[Any, Any, None]]:
        async def turn(ctx: dict[Any, Any]) -> None:
            if name in self._busy:
                return
            self._busy.add(name)
            try:
                await run()
            except _TRANSIENT as error:
                if period_s > MINUTE_S:  # not before a minute is over: so long arq marks a periodic job as running
                    raise _retry(name, ctx, error) from error
                log.warning("control job failed; its next turn comes", name=name, error=_brief(error))
            finally:
                self._busy.discard(name)

        return turn

    def _worker(self) -> Worker:
        pool = _arq_redis(self._settings)
        queue = pool.default_queue_name
        for job in self._cron:
            job.next_run = None  # a new worker begins its timetable anew
        return Worker(
            functions=self._functions,
            cron_jobs=self._cron,
            queue_name=queue,
            redis_pool=pool,
            handle_signals=False,
            keep_result=0,
            job_timeout=JOB_TIMEOUT_S,
            max_jobs=MAX_JOBS,
            max_tries=MAX_TRIES,
            poll_delay=0.1,
            queue_read_limit=1000,
            allow_abort_jobs=False,
            health_check_key=f"{queue}:{socket.gethostname()}:{os.getpid()}",
            health_check_interval=60,
            job_serializer=_encode,
            job_deserializer=_decode,
            timezone=UTC,
            log_results=False,
        )


_TRANSIENT = (OperationalError, InterfaceError, CapacityError, OSError)


def _retry(name: str, ctx: dict[Any, Any], error: Exception) -> Retry:
    """Full jitter: anything up to 2^tries seconds."""
    log.warning("control job will be tried again", name=name, error=_brief(error))
    return Retry(defer=random.uniform(0, min(MAX_DEFER_S, 2.0 ** ctx["job_try"])))


def _times(period_s: int, offset_s: int) -> dict[str, Any]:
    """arq's cron fields for a period: the seconds, minutes and hours of a day at which it runs (UTC)."""
    steps = ((1, MINUTE_S), (MINUTE_S, HOUR_S), (HOUR_S, DAY_S))
    fits = any(period_s > 0 and period_s % step_s == 0 and whole_s % period_s == 0 for step_s, whole_s in steps)
    if not fits or not 0 <= offset_s < period_s:
        raise ValueError(f"a period of {period_s} s from {offset_s} s is no divisor of a minute, an hour or a day")
    turns = range(offset_s, DAY_S, period_s)
    return {
        "hour": _unless_all({turn // HOUR_S for turn in turns}, 24),
        "minute": _unless_all({turn // MINUTE_S % MINUTE_S for turn in turns}, 60),
        "second": _unless_all({turn % MINUTE_S for turn in turns}, 60),
    }


def _unless_all(values: set[int], count: int) -> set[int] | None:
    return None if len(values) == count else values


def _arq_redis(settings: Settings) -> ArqRedis:
    connections = cast(ConnectionPool, connect(settings, "command").connection_pool)
    queue = Keys(settings.shard).of("cron")
    return ArqRedis(connections, job_serializer=_encode, job_deserializer=_decode, default_queue_name=queue)


async def _close(worker: Worker) -> None:
    # Not arq's own close(): a job that Redis failed makes it raise before it has closed its connections.
    tasks = list(worker.tasks.values())
    for task in tasks:
        task.cancel()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await asyncio.gather(*tasks, return_exceptions=True)
    await worker.pool.aclose(True)


def _encode(job: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode(job, enc_hook=_describe)


def _decode(data: bytes) -> dict[str, Any]:
    return msgspec.msgpack.decode(data)


def _describe(value: object) -> str:
    if isinstance(value, BaseException):  # arq stores the exception of a failed job
        return f"{type(value).__name__}: {value}"
    raise NotImplementedError(f"{type(value).__name__} cannot be stored in a control job")


def _brief(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
