"""A record that SQL refuses for good is given up and told of; one that meets an outage on that way comes again."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing, contextmanager
from typing import Any, cast

import pytest
import structlog
from redis.asyncio import Redis
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from scheduler.db.durable import Stage
from scheduler.db.schema import migrate
from scheduler.job import JobState
from scheduler.loops.recorder import CONSUMER
from scheduler.queue.keys import RECORDER_GROUP
from scheduler.settings import Settings
from tests.conftest import wait_until
from tests.durable_stage import DurableStage, chat_job
from tests.queue_cases import ask, state_of

REFUSED = "does not fit its table"


@pytest.fixture
async def stage(redis: Redis, settings: Settings) -> AsyncGenerator[DurableStage]:
    await asyncio.to_thread(migrate, settings)
    stage = DurableStage(redis, settings)
    event.listen(stage.database.engine.sync_engine, "connect", _wait_briefly)
    await stage.add_webhook()
    yield stage
    await stage.close()


def _wait_briefly(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA busy_timeout=50")


@pytest.fixture
def other(stage: DurableStage) -> Iterator[sqlite3.Connection]:
    """Another program that has the database open."""
    with closing(sqlite3.connect(stage.settings.home / "spillway.db", isolation_level=None)) as connection:
        yield connection


async def end_in_redis(stage: DurableStage, *scripts: str) -> list[str]:
    """Durable jobs that succeeded in Redis and are not recorded yet."""
    async with stage.working() as worker:
        await worker.publish()
        ids = await stage.hold(*(chat_job(script) for script in scripts))
        await stage.stager.turn()
        await wait_until(lambda: _ended(stage, ids))
    return ids


async def _ended(stage: DurableStage, ids: list[str]) -> bool:
    return all([(await state_of(stage.queue, job_id)).is_terminal for job_id in ids])


async def unrecorded(stage: DurableStage) -> int:
    return await ask(stage.redis, "XLEN", stage.queue.keys.of("done"))


async def _all_taken(stage: DurableStage) -> bool:
    return await unrecorded(stage) == 0


async def age_what_was_read(stage: DurableStage) -> None:
    """As if the recorder that read the records were gone for a minute."""
    done, redis = stage.queue.keys.of("done"), cast(Any, stage.redis)
    ids = [entry_id for entry_id, _ in await redis.xrange(done)]
    assert await redis.xclaim(done, RECORDER_GROUP, CONSUMER, 0, ids, idle=60_000, justid=True) == ids


def refuse_answer(other: sqlite3.Connection, job_id: str) -> None:
    """From now on the database takes no answer of this job, as it would take none that is too large."""
    other.execute(
        f"CREATE TRIGGER refuse BEFORE UPDATE ON durable_jobs WHEN NEW.id = '{job_id}' AND NEW.answer IS NOT NULL "
        "BEGIN SELECT RAISE(ABORT, 'too large'); END"
    )


@contextmanager
def locked_as_soon_as_refused(other: sqlite3.Connection) -> Iterator[None]:
    """The other program takes the database in the moment between a refusal and what is done about it."""

    def lock(_logger: object, _name: str, entry: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if REFUSED in entry["event"]:
            other.execute("BEGIN EXCLUSIVE")
        return entry

    with capture_logs():
        structlog.get_config()["processors"].insert(0, lock)
        yield


async def test_a_refused_answer_ends_its_job_as_failed_and_holds_up_no_other(
    stage: DurableStage, other: sqlite3.Connection
) -> None:
    good, bad = await end_in_redis(stage, "good words", "bad words")
    refuse_answer(other, bad)
    with capture_logs() as lines:
        async with stage.running("recorder"):
            await wait_until(lambda: _all_taken(stage))
    assert await stage.said(good) == "good words "
    row = await stage.row(bad)
    assert (row.stage, row.state, row.error_code, row.answer) == (Stage.DONE, JobState.FAILED, "internal_error", None)
    assert "could not be stored" in (row.error_message or "")
    finished = await stage.finished.get(bad)
    assert finished is not None and finished.state is JobState.FAILED
    assert await stage.events() == ["job.failed", "job.succeeded"]
    assert [line["job"] for line in lines if REFUSED in line["event"]] == [bad]


async def test_an_outage_while_a_record_is_given_up_loses_nothing(
    stage: DurableStage, other: sqlite3.Connection
) -> None:
    (bad,) = await end_in_redis(stage, "bad words")
    refuse_answer(other, bad)
    with locked_as_soon_as_refused(other), pytest.RaisesGroup(OperationalError):
        async with stage.running("recorder"):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()  # until the recorder ends
    assert await unrecorded(stage) == 1
    other.execute("ROLLBACK")
    assert await stage.state(bad) == (Stage.SENT, JobState.QUEUED)
    other.execute("DROP TRIGGER refuse")
    await age_what_was_read(stage)
    async with stage.running("recorder"):
        await wait_until(lambda: _all_taken(stage))
    assert await stage.said(bad) == "bad words "
    assert await stage.events() == ["job.succeeded"]
