"""Turns of schedules on both databases: one job each, whoever takes it, and none lost over a failure."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from api.dialect import HttpDialect
from scheduler.db.durable import DurableStore
from scheduler.db.schedules import ScheduleSpec, ScheduleStore, ScheduleView
from scheduler.db.session import Database
from scheduler.job import Priority
from scheduler.loops.recurrence import Recurrence
from scheduler.model_card import ModelCard
from scheduler.queue.connection import connect
from scheduler.queue.fleet import Fleet, WorkerView
from scheduler.request import decode_request
from scheduler.schedules import Turns
from scheduler.settings import Settings

MINUTE_MS = 60_000
NOW_MS = 1_795_000_020_000  # at a whole minute
BODY = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "hi"}]}).encode()
SPEC = ScheduleSpec(
    name="nightly",
    cron="* * * * *",
    timezone="UTC",
    endpoint="/v1/chat/completions",
    body=BODY,
    priority=Priority.LOW,
    deadline_after_ms=5000,
    details='{"team":"a"}',
)


@pytest.fixture
async def recurrence(database: Database, migrated: Settings) -> AsyncGenerator[Recurrence]:
    """With a Redis that is away: turns are accepted all the same."""
    redis = connect(migrated.model_copy(update={"redis_url": "unix:///nowhere.sock"}), "command", patience_s=0.2)
    store = ScheduleStore(database)
    yield Recurrence(store, Turns(store, Fleet(redis, migrated), HttpDialect(), "t"), migrated)
    await redis.aclose()


async def create(database: Database, next_ms: int = NOW_MS, **fields: Any) -> ScheduleView:
    return await ScheduleStore(database).create("ann", replace(SPEC, **fields), next_ms, paused=False)


async def jobs_of(database: Database, schedule: ScheduleView) -> list[Any]:
    found = await DurableStore(database).list(schedule_id=schedule.id, limit=100)
    return [await DurableStore(database).get(job.id, with_request=True) for job in found]


async def serve(fleet: Fleet, model: str) -> None:
    worker = WorkerView(
        id=f"w-{model}", pid=1, engine_pid=2, host="here", models=(model,), busy_rows=0, max_rows=4,
    )  # fmt: skip
    await fleet.publish(worker, ModelCard(id=model, context_tokens=512, created_s=1))


async def test_a_turn_makes_a_job_and_moves_on(database: Database, recurrence: Recurrence) -> None:
    schedule = await create(database)
    assert await recurrence.round(NOW_MS - 1) == 0
    assert await recurrence.round(NOW_MS) == 1
    assert await recurrence.round(NOW_MS + 1) == 0
    assert await recurrence.round(NOW_MS + MINUTE_MS) == 1
    later, first = await jobs_of(database, schedule)
    assert (first.tenant, first.model, first.priority, first.details) == ("ann", "demo", Priority.LOW, SPEC.details)
    assert (first.created_ms, first.deadline_ms, first.schedule_id) == (NOW_MS, NOW_MS + 5000, schedule.id)
    seeds = {decode_request(job.request).sampling.seed for job in (first, later)}
    assert len(seeds) == 2
    after = await ScheduleStore(database).get(schedule.id)
    assert after is not None
    assert (after.next_ms, after.last_ms, after.last_job_id) == (NOW_MS + 2 * MINUTE_MS, NOW_MS + MINUTE_MS, later.id)


async def test_of_many_schedulers_one_takes_each_turn(database: Database, recurrence: Recurrence) -> None:
    schedules = [await create(database) for _ in range(3)]
    await asyncio.gather(*(recurrence.round(NOW_MS) for _ in range(4)))
    assert [len(await jobs_of(database, schedule)) for schedule in schedules] == [1, 1, 1]


async def test_missed_turns_are_made_up_for_by_one_job(database: Database, recurrence: Recurrence) -> None:
    schedule = await create(database)
    late_ms = NOW_MS + 100 * MINUTE_MS + 1
    assert await recurrence.round(late_ms) == 1
    assert await recurrence.round(late_ms) == 0
    (job,) = await jobs_of(database, schedule)
    assert job.deadline_ms == late_ms + 5000
    after = await ScheduleStore(database).get(schedule.id)
    assert after is not None and after.next_ms == NOW_MS + 101 * MINUTE_MS


async def test_a_turn_whose_body_is_bad_by_now_is_told_and_the_next_one_comes(
    database: Database, recurrence: Recurrence
) -> None:
    schedule = await create(database, body=b'{"model": "demo"}')
    await recurrence.round(NOW_MS)
    failed = await ScheduleStore(database).get(schedule.id)
    assert failed is not None
    assert "messages" in (failed.last_error or "") and failed.next_ms == NOW_MS + MINUTE_MS
    await ScheduleStore(database).change(schedule.id, SPEC, failed.next_ms, paused=False)
    await recurrence.round(NOW_MS + MINUTE_MS)
    assert len(await jobs_of(database, schedule)) == 1


async def test_a_paused_schedule_takes_no_turn(database: Database, recurrence: Recurrence) -> None:
    schedule = await create(database)
    await ScheduleStore(database).change(schedule.id, SPEC, NOW_MS, paused=True)
    assert await recurrence.round(NOW_MS + MINUTE_MS) == 0
    assert await jobs_of(database, schedule) == []


async def test_a_turn_whose_model_nobody_knows_is_told_and_the_next_one_comes(
    database: Database, migrated: Settings, redis_url: str
) -> None:
    settings = migrated.model_copy(update={"redis_url": redis_url, "shard": "turns"})
    redis = connect(settings, "command")
    fleet, store = Fleet(redis, settings), ScheduleStore(database)
    await serve(fleet, "other")
    recurrence = Recurrence(store, Turns(store, fleet, HttpDialect(), "turns"), settings)
    schedule = await create(database)
    assert await recurrence.round(NOW_MS) == 1
    failed = await store.get(schedule.id)
    assert failed is not None and failed.next_ms == NOW_MS + MINUTE_MS and failed.last_job_id is None
    assert "'demo' does not exist" in (failed.last_error or "")
    await serve(fleet, "demo")
    await recurrence.round(NOW_MS + MINUTE_MS)
    after = await store.get(schedule.id)
    assert after is not None and after.last_error is None and after.last_job_id is not None
    await redis.aclose()


async def test_a_schedule_that_cannot_be_stored_or_read_holds_up_no_other(
    database: Database, recurrence: Recurrence
) -> None:
    """PostgreSQL takes no NUL in a text, SQLite does: there the first one has a job."""
    refused = await create(database, next_ms=NOW_MS - 2, body=BODY.replace(b"demo", b"de\\u0000mo"))
    broken = await create(database, next_ms=NOW_MS - 1, endpoint="/v1/no-such-endpoint")
    good = await create(database)
    assert await recurrence.round(NOW_MS) == 3
    store = ScheduleStore(database)
    for schedule in (refused, broken):
        after = await store.get(schedule.id)
        assert after is not None and after.next_ms == NOW_MS + MINUTE_MS
        assert (after.last_error is None) == (after.last_job_id is not None)
    assert len(await jobs_of(database, good)) == 1
    assert len(await jobs_of(database, broken)) == 0
