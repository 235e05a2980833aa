"""Redis may lose everything: each accepted job still reaches exactly one end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from redis.asyncio import Redis
from sqlmodel import select
from structlog.testing import capture_logs

from scheduler.db.durable import Stage
from scheduler.db.models import FinishedJob
from scheduler.db.schema import migrate
from scheduler.job import JobState
from scheduler.settings import Settings
from tests.conftest import wait_until
from tests.durable_stage import DurableStage, chat_job, now_ms
from tests.queue_cases import ask, claim, state_of

SLOW = json.dumps({"say": ["a ", "b ", "c "], "pause_s": 0.02})


@pytest.fixture
async def stage(redis: Redis, settings: Settings) -> AsyncGenerator[DurableStage]:
    await asyncio.to_thread(migrate, settings)
    stage = DurableStage(redis, settings)
    yield stage
    await stage.close()


async def publish(stage: DurableStage) -> None:
    async with stage.working() as worker:
        await worker.publish()


async def finished_ids(stage: DurableStage) -> list[str]:
    async with stage.database.session() as session:
        return sorted(await session.exec(select(FinishedJob.id)))


async def all_done(stage: DurableStage, ids: list[str]) -> bool:
    return all([await stage.is_done(job_id) for job_id in ids])


async def test_after_a_flushall_every_accepted_job_ends_once(stage: DurableStage) -> None:
    """At that moment some were held, some waited, some ran, some had ended and were not recorded."""
    await stage.add_webhook()
    async with stage.working() as worker:
        await worker.publish()
        ended = await stage.hold(*(chat_job("quick") for _ in range(5)))
        await stage.stager.turn()
        for job_id in ended:
            await wait_until(lambda job_id=job_id: _is(stage, job_id, JobState.SUCCEEDED))
        running = await stage.hold(*(chat_job(SLOW) for _ in range(5)))
        await stage.stager.turn()
        await wait_until(lambda: set(running) <= worker.requests.keys())
        await stage.redis.flushall()
    waiting = await stage.hold(*(chat_job() for _ in range(5)))
    await publish(stage)
    await stage.stager.turn()
    await stage.redis.flushall()
    held = await stage.hold(*(chat_job() for _ in range(5)))
    ids = [*ended, *running, *waiting, *held]
    async with stage.working(), stage.running("stager", "recorder", "reconciler"):
        await wait_until(lambda: all_done(stage, ids))
    assert [await stage.state(job_id) for job_id in ids] == [(Stage.DONE, JobState.SUCCEEDED)] * 20
    assert [await stage.said(job_id) for job_id in running] == ["a b c "] * 5
    assert await finished_ids(stage) == sorted(ids)
    assert await stage.events() == ["job.succeeded"] * 20


async def _is(stage: DurableStage, job_id: str, state: JobState) -> bool:
    return await state_of(stage.queue, job_id) is state


async def test_lines_of_a_batch_come_back_within_its_window(stage: DurableStage) -> None:
    await publish(stage)
    ids = await stage.add_batch("batch-1", 6)
    await stage.stager.turn()
    await stage.redis.flushall()
    await stage.reconciler.turn(now_ms())
    assert {(await stage.row(job_id)).stage for job_id in ids} == {Stage.HELD}
    async with stage.working(), stage.running("stager", "recorder"):
        await wait_until(lambda: all_done(stage, ids))
    assert await stage.store.counts("batch-1") == {JobState.SUCCEEDED: 6}


async def test_what_redis_still_has_is_left_alone(stage: DurableStage) -> None:
    await publish(stage)
    waiting, running = await stage.hold(chat_job(), chat_job())
    await stage.stager.turn()
    await claim(stage.queue, rows=1)
    with capture_logs() as lines:
        await stage.reconciler.turn(now_ms())
        await stage.reconciler.turn(now_ms())
    assert {(await stage.row(job_id)).stage for job_id in (waiting, running)} == {Stage.SENT}
    assert lines == []


async def test_a_job_just_accepted_is_not_looked_at(stage: DurableStage) -> None:
    await publish(stage)
    (job_id,) = await stage.hold(chat_job(created_ms=now_ms()))
    await stage.stager.turn()
    await stage.redis.flushall()
    await stage.reconciler.turn(now_ms() - 5000)
    assert (await stage.row(job_id)).stage is Stage.SENT


async def test_an_end_whose_outcome_was_lost_is_recorded_from_the_job(stage: DurableStage) -> None:
    async with stage.working() as worker:
        await worker.publish()
        (job_id,) = await stage.hold(chat_job("one two"))
        await stage.stager.turn()
        await wait_until(lambda: _is(stage, job_id, JobState.SUCCEEDED))
    await ask(stage.redis, "DEL", stage.queue.keys.of("done"))
    await stage.reconciler.turn(now_ms())
    assert (await stage.row(job_id)).stage is Stage.SENT  # the recorder is given its time
    await stage.reconciler.turn(now_ms())
    assert await stage.state(job_id) == (Stage.DONE, JobState.SUCCEEDED)
    assert await stage.said(job_id) == "one two "


async def test_a_retry_that_never_reached_redis_leaves_the_old_end(stage: DurableStage) -> None:
    async with stage.working() as worker:
        await worker.publish()
        (job_id,) = await stage.hold(chat_job(json.dumps({"fail": "context_length_exceeded"})))
        await stage.stager.turn()
        async with stage.running("recorder"):
            await wait_until(lambda: stage.is_done(job_id))
    assert await stage.store.reopen(job_id)
    await stage.reconciler.turn(now_ms())
    assert (await stage.row(job_id)).stage is Stage.SENT
    await stage.reconciler.turn(now_ms())
    assert await stage.state(job_id) == (Stage.DONE, JobState.FAILED)


async def test_a_job_tried_again_that_redis_lost_starts_from_its_first_attempt(stage: DurableStage) -> None:
    async with stage.working() as worker:
        await worker.publish()
        (job_id,) = await stage.hold(chat_job("one"))
        await stage.stager.turn()
        async with stage.running("recorder"):
            await wait_until(lambda: stage.is_done(job_id))
        await stage.change(job_id, state="failed", attempt=4)
        assert await stage.store.reopen(job_id)
        await stage.redis.flushall()
        await stage.reconciler.turn(now_ms())
        async with stage.running("stager", "recorder"):
            await wait_until(lambda: stage.is_done(job_id))
    row = await stage.row(job_id)
    assert (row.state, row.attempt) == (JobState.SUCCEEDED, 1)
