"""Periodic control jobs, run by arq: the only module that imports it. The scheduler process runs `run_cron`.

arq keeps the timetable in Redis, so that of several schedulers exactly one runs each job at each time. Jobs are
msgpack, never pickle. arq's worker ends when Redis goes away; a new one then takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any, cast

import msgspec
from arq.connections import ArqRedis
from arq.cron import CronJob, cron
from arq.worker import Retry, Worker
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError
from sqlalchemy.exc import OperationalError

from scheduler.errors import CapacityError
from scheduler.queue.connection import connect
from scheduler.queue.keys import Keys
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

JOB_TIMEOUT_S = 60
MAX_TRIES = 5
MAX_DEFER_S = 60.0
RECONNECT_S = 1.0
CLOSE_S = 5.0
QUICK_FAILURE_S = 15.0  # a worker that ended sooner met the outage that was told of already

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PeriodicJob:
    """Something to do once an hour at `minute`, and when a scheduler starts."""

    name: str
    run: Callable[[], Awaitable[object]]
    minute: int


async def run_cron(jobs: Sequence[PeriodicJob], settings: Settings) -> None:
    """Run the jobs at their times until cancelled."""
    logging.getLogger("arq").setLevel(logging.WARNING)
    while True:
        worker = _worker(jobs, settings)
        started_s = time.monotonic()
        try:
            await worker.async_run()
        except (RedisError, OSError) as error:
            again = time.monotonic() - started_s < QUICK_FAILURE_S
            tell = log.debug if again else log.warning
            tell("periodic jobs wait for Redis", error=str(error) or type(error).__name__)
        finally:
            await _close(worker)
        await asyncio.sleep(RECONNECT_S)


def _worker(jobs: Sequence[PeriodicJob], settings: Settings) -> Worker:
    queue = Keys(settings.shard).of("cron")
    connections = cast(ConnectionPool, connect(settings, "command").connection_pool)
    pool = ArqRedis(connections, job_serializer=_encode, job_deserializer=_decode, default_queue_name=queue)
    return Worker(
        cron_jobs=[_cron_job(job, settings) for job in jobs],
        queue_name=queue,
        redis_pool=pool,
        handle_signals=False,
        keep_result=0,
        job_timeout=JOB_TIMEOUT_S,
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


def _cron_job(job: PeriodicJob, settings: Settings) -> CronJob:
    async def run(ctx: dict[Any, Any]) -> None:
        try:
            await job.run()
        except (OperationalError, CapacityError, OSError) as error:
            ceiling = min(MAX_DEFER_S, 2.0 ** ctx["job_try"])
            log.warning("periodic job will be tried again", name=job.name, error=str(error))
            # Not before a minute is over: so long arq marks a periodic job as running.
            raise Retry(defer=random.uniform(0, ceiling)) from error

    # arq's job ids begin with this name: two shards in one Redis must not take each other's turns.
    name = f"{job.name}:{settings.shard}"
    return cron(run, name=name, minute=job.minute, run_at_startup=True, max_tries=MAX_TRIES)


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
