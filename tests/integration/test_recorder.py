"""Outcomes of jobs reach SQL exactly once, whatever fails on the way; old ones leave it again."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import msgspec
import pytest
from redis.asyncio import Redis
from sqlalchemy import event
from structlog.testing import capture_logs

from api.dialect import HttpDialect
from scheduler.db.durable_outcomes import DurableOutcomes
from scheduler.db.jobs import JobStore
from scheduler.db.schema import migrate
from scheduler.db.session import Database
from scheduler.job import JobState
from scheduler.loops import recorder as recorder_module
from scheduler.loops.control_plane import HOUR_S, ControlPlane
from scheduler.loops.outcome_writer import OutcomeWriter
from scheduler.loops.pruner import DAY_MS, prune_finished_jobs
from scheduler.loops.recorder import Recorder
from scheduler.queue.connection import connect
from scheduler.queue.done_log import DoneLog
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.outcome_reader import OutcomeReader
from scheduler.settings import Settings
from tests.conftest import wait_until
from tests.queue_cases import claim, claim_one, enqueue, succeed


@pytest.fixture
def migrated(settings: Settings) -> Settings:
    migrate(settings)
    return settings


@pytest.fixture
async def database(migrated: Settings) -> AsyncIterator[Database]:
    database = Database(migrated)
    yield database
    await database.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


@asynccontextmanager
async def recording(settings: Settings, store: JobStore) -> AsyncIterator[None]:
    stop = asyncio.Event()
    blocking, commands = connect(settings, "blocking"), connect(settings, "command")
    database = Database(settings)
    writer = OutcomeWriter(OutcomeReader(commands, settings), DurableOutcomes(database), HttpDialect())
    recorder = Recorder(DoneLog(blocking, settings), store, writer, JobQueue(commands, settings), settings)
    async with asyncio.TaskGroup() as group:
        group.create_task(recorder.run(stop))
        yield
        stop.set()
    await database.close()
    await blocking.aclose()
    await commands.aclose()


@pytest.fixture
def locked(migrated: Settings) -> Iterator[sqlite3.Connection]:
    """Another program in the middle of a write to the database."""
    connection = sqlite3.connect(migrated.home / "spillway.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    yield connection
    connection.close()


async def unrecorded(redis: Redis, queue: JobQueue) -> int:
    return cast(int, await cast(Any, redis.xlen(queue.keys.of("done"))))


async def test_a_finished_job_reaches_sql_as_redis_had_it(
    redis: Redis, queue: JobQueue, migrated: Settings, store: JobStore
) -> None:
    async with recording(migrated, store):
        job_id = await enqueue(queue)
        await succeed(queue, await claim_one(queue))
        kept = await wait_until(lambda: store.get(job_id))
        assert kept is not None and kept == replace(await queue.view(job_id) or kept, attempts=())
        assert kept.state is JobState.SUCCEEDED and kept.usage is not None and kept.usage.completion_tokens == 4
        await wait_until(lambda: _empty(redis, queue))


async def _empty(redis: Redis, queue: JobQueue) -> bool:
    return await unrecorded(redis, queue) == 0


async def test_jobs_that_ended_while_no_recorder_ran_are_recorded_later(
    redis: Redis, queue: JobQueue, migrated: Settings, store: JobStore
) -> None:
    ids = [await enqueue(queue) for _ in range(20)]
    for job in await claim(queue):
        await succeed(queue, job)
    cancelled = await enqueue(queue)
    await queue.cancel(cancelled)
    assert await unrecorded(redis, queue) == 21
    async with recording(migrated, store):
        await wait_until(lambda: _empty(redis, queue))
    states = {job.id: job.state for job in await store.recent(100)}
    assert states == dict.fromkeys(ids, JobState.SUCCEEDED) | {cancelled: JobState.CANCELLED}


async def test_a_locked_database_delays_records_and_loses_none(
    redis: Redis, queue: JobQueue, migrated: Settings, database: Database, store: JobStore, locked: sqlite3.Connection
) -> None:
    event.listen(database.engine.sync_engine, "connect", _wait_briefly)
    with capture_logs() as lines:
        async with recording(migrated, store):
            job_id = await enqueue(queue)
            await succeed(queue, await claim_one(queue))
            await wait_until(lambda: any("was locked" in line.get("error", "") for line in lines))
            assert await unrecorded(redis, queue) == 1
            locked.execute("ROLLBACK")
            await wait_until(lambda: store.get(job_id))
            await wait_until(lambda: _empty(redis, queue))


def _wait_briefly(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA busy_timeout=50")


async def test_a_row_that_sql_refuses_does_not_hold_up_its_batch(
    redis: Redis, queue: JobQueue, migrated: Settings, store: JobStore
) -> None:
    good, bad = await enqueue(queue), await enqueue(queue)
    for job in await claim(queue):
        await succeed(queue, job)
    done = queue.keys.of("done")
    entries = await cast(Any, redis.xrange(done))
    await cast(Any, redis.xtrim(done, maxlen=0, approximate=False))
    for _, fields in entries:
        before, changed = msgspec.msgpack.decode(fields[b"job"])
        if fields[b"id"].decode() == bad:
            changed["state"] = "running"
        await cast(Any, redis.xadd(done, fields | {b"job": msgspec.msgpack.encode((before, changed))}))
    with capture_logs() as lines:
        async with recording(migrated, store):
            await wait_until(lambda: _empty(redis, queue))
    assert await store.get(good) is not None and await store.get(bad) is None
    assert [line["job"] for line in lines if "is not recorded" in line["event"]] == [bad]


async def test_the_recorder_outlives_a_redis_that_drops_its_connections(
    redis: Redis, queue: JobQueue, migrated: Settings, store: JobStore
) -> None:
    async with recording(migrated, store):
        for _ in range(3):
            await cast(Any, redis.client_kill_filter(_type="normal", skipme=True))
            job_id = await enqueue(queue)
            await succeed(queue, await claim_one(queue))
            await wait_until(lambda job_id=job_id: store.get(job_id))


async def test_periodic_jobs_run_at_start_and_prune_old_jobs_only(
    queue: JobQueue, migrated: Settings, store: JobStore
) -> None:
    ids = [await enqueue(queue) for _ in range(2)]
    for job in await claim(queue):
        await succeed(queue, job)
    async with recording(migrated, store):
        await wait_until(lambda: store.get(ids[1]))
    old = await store.get(ids[0])
    assert old is not None and old.finished_ms is not None
    now_ms = old.finished_ms + migrated.finished_job_retention_days * DAY_MS
    await store.record([replace(old, finished_ms=old.finished_ms - 1)])
    control = ControlPlane(migrated)
    control.every(HOUR_S, "prune", lambda: prune_finished_jobs(store, migrated, now_ms))
    cron = asyncio.create_task(control.run())
    await wait_until(lambda: _is_gone(store, ids[0]))
    assert await store.get(ids[1]) is not None
    cron.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cron


async def _remove(redis: Redis, pattern: str) -> int:
    names = [name async for name in redis.scan_iter(pattern)]
    return await cast(Any, redis.delete(*names)) if names else 0


async def _is_gone(store: JobStore, job_id: str) -> bool:
    return await store.get(job_id) is None


async def test_a_periodic_job_that_fails_is_tried_again_and_redis_may_go_away(redis: Redis, migrated: Settings) -> None:
    calls: list[int] = []

    async def fail_once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("database unreachable")

    control = ControlPlane(migrated)
    control.every(HOUR_S, "flaky", fail_once)
    cron = asyncio.create_task(control.run())
    await wait_until(lambda: len(calls) >= 1)
    await cast(Any, redis.client_kill_filter(_type="normal", skipme=True))
    # arq keeps a minute's mark on a cron job that ran; as if the minute were over:
    await wait_until(lambda: _remove(redis, "arq:in-progress:flaky*"))
    await wait_until(lambda: len(calls) >= 2)
    assert not cron.done()
    cron.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cron


def test_the_recorder_waits_less_than_its_connection_does() -> None:
    assert recorder_module.READ_WAIT_MS <= 9000
