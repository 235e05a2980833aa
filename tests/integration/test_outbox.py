"""Accepted jobs reach Redis once, whatever is away or full meanwhile; what ends before is never sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from scheduler.db.durable import Stage
from scheduler.db.schema import migrate
from scheduler.errors import QueueFull, UnknownModel
from scheduler.job import JobState, Priority
from scheduler.queue.connection import connect
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.request import decode_request
from scheduler.settings import Settings
from tests.conftest import wait_until
from tests.durable_stage import DurableStage, chat_job, now_ms
from tests.queue_cases import changed, claim, claim_one, state_of, succeed

HOUR_MS = 3_600_000


@pytest.fixture
async def stage(redis: Redis, settings: Settings) -> AsyncGenerator[DurableStage]:
    await asyncio.to_thread(migrate, settings)
    stage = DurableStage(redis, settings)
    yield stage
    await stage.close()


async def publish(stage: DurableStage) -> None:
    """A worker is there, and claims nothing yet."""
    async with stage.working() as worker:
        await worker.publish()


async def test_an_accepted_job_is_sent_at_once_and_its_answer_reaches_sql(stage: DurableStage) -> None:
    async with stage.working() as worker:
        await worker.publish()
        accepted = await stage.acceptance.accept(chat_job("one two three"))
        assert accepted.created and (await stage.row(accepted.job_id)).stage is Stage.SENT
        async with stage.running("recorder"):
            await wait_until(lambda: stage.is_done(accepted.job_id))
    row = await stage.row(accepted.job_id)
    assert row.state is JobState.SUCCEEDED and row.attempt == 1 and row.usage.completion_tokens == 3
    assert await stage.said(accepted.job_id) == "one two three "
    finished = await stage.finished.get(accepted.job_id)
    assert finished is not None and finished.created_ms == row.created_ms


async def test_a_job_accepted_while_redis_is_away_runs_once_it_comes(settings: Settings) -> None:
    home = settings.home / "late"
    server = EmbeddedRedis(home)
    late = changed(settings, redis_url=f"unix://{home}/redis/redis.sock", home=home)
    await asyncio.to_thread(migrate, late)
    redis = connect(late, "command", patience_s=0.2)
    stage = DurableStage(redis, late)
    first = await stage.acceptance.accept(chat_job())
    second = await stage.acceptance.accept(chat_job(model="not known while Redis is away"))
    assert first.created and await stage.state(first.job_id) == (Stage.HELD, JobState.QUEUED)
    await asyncio.to_thread(server.start)
    try:
        async with stage.working(), stage.running("stager", "recorder"):
            await wait_until(lambda: stage.is_done(first.job_id))
        assert (await stage.row(first.job_id)).state is JobState.SUCCEEDED
        assert (await stage.row(second.job_id)).stage is Stage.HELD
    finally:
        await stage.close()
        await redis.aclose()
        await asyncio.to_thread(server.stop)


async def test_an_unknown_model_is_refused_and_nothing_is_kept(stage: DurableStage) -> None:
    await publish(stage)
    with pytest.raises(UnknownModel, match="did you mean 'demo'"):
        await stage.acceptance.accept(chat_job(model="demos"))
    assert await stage.store.list() == []


async def test_a_job_waits_for_the_first_worker(stage: DurableStage) -> None:
    accepted = await stage.acceptance.accept(chat_job())
    assert (await stage.row(accepted.job_id)).stage is Stage.HELD
    async with stage.running("stager", "recorder"), stage.working():
        await wait_until(lambda: stage.is_done(accepted.job_id))
    assert (await stage.row(accepted.job_id)).state is JobState.SUCCEEDED


async def test_a_repeated_acceptance_makes_one_job(stage: DurableStage) -> None:
    await publish(stage)
    job = chat_job(idempotency_key="k", body_digest="d")
    first = await stage.acceptance.accept(job)
    again = await stage.acceptance.accept(chat_job(idempotency_key="k", body_digest="d"))
    assert (again.job_id, again.created) == (first.job_id, False)
    assert (await stage.queue.counts())["accepted"] == 1


async def test_a_tenant_with_too_many_held_jobs_is_told_so(redis: Redis, settings: Settings) -> None:
    await asyncio.to_thread(migrate, settings)
    stage = DurableStage(redis, changed(settings, held_jobs_cap=2))
    await stage.acceptance.accept(chat_job())
    await stage.acceptance.accept(chat_job())
    with pytest.raises(QueueFull, match="2 jobs of yours wait"):
        await stage.acceptance.accept(chat_job())
    assert (await stage.acceptance.accept(chat_job(tenant="bob"))).created
    await stage.close()


async def test_a_job_for_later_stays_in_sql_until_its_time_is_near(stage: DurableStage) -> None:
    await publish(stage)
    far = await stage.acceptance.accept(chat_job(not_before_ms=now_ms() + HOUR_MS))
    near = await stage.acceptance.accept(chat_job(not_before_ms=now_ms() + 30_000))
    await stage.stager.turn()
    assert await stage.state(far.job_id) == (Stage.HELD, JobState.SCHEDULED)
    assert (await stage.row(near.job_id)).stage is Stage.SENT
    assert await state_of(stage.queue, near.job_id) is JobState.SCHEDULED


async def test_a_crash_between_sending_and_marking_sends_once(stage: DurableStage) -> None:
    await publish(stage)
    (job_id,) = await stage.hold(job := chat_job())
    await stage.lifecycle.submit(
        decode_request(job.request), job_id=job_id, tenant="ann", priority=Priority.NORMAL, durable=True
    )
    running = await claim_one(stage.queue)
    await stage.stager.turn()
    assert (await stage.row(job_id)).stage is Stage.SENT
    assert (await stage.queue.counts())["accepted"] == 1 and await claim(stage.queue) == []
    assert await succeed(stage.queue, running)


async def test_a_job_that_ended_before_it_was_marked_is_recorded_all_the_same(stage: DurableStage) -> None:
    (job_id,) = await stage.hold(job := chat_job())
    async with stage.working() as worker:
        await worker.publish()
        await stage.lifecycle.submit(
            decode_request(job.request), job_id=job_id, tenant="ann", priority=Priority.NORMAL, durable=True
        )
        async with stage.running("recorder"):
            await wait_until(lambda: stage.is_done(job_id))
        await stage.stager.turn()
    assert await stage.state(job_id) == (Stage.DONE, JobState.SUCCEEDED)


async def test_a_cancel_that_races_the_stager_wins(stage: DurableStage) -> None:
    await publish(stage)
    (job_id,) = await stage.hold(chat_job())
    rows = await stage.rows.due(now_ms(), [], 10)
    assert await stage.store.cancel_held(job_id)
    await stage.outbox.send(rows)
    assert await state_of(stage.queue, job_id) is JobState.CANCELLED
    assert await claim(stage.queue) == []
    async with stage.running("recorder"):
        await wait_until(lambda: _recorded(stage))
    assert await stage.state(job_id) == (Stage.DONE, JobState.CANCELLED)


async def _recorded(stage: DurableStage) -> bool:
    return await stage.redis.xlen(stage.queue.keys.of("done")) == 0  # pyright: ignore[reportUnknownMemberType]


async def test_an_answer_that_came_too_late_does_not_undo_a_cancel(stage: DurableStage) -> None:
    await stage.add_webhook()
    (job_id,) = await stage.hold(chat_job())
    async with stage.working() as worker:
        await worker.publish()
        (row,) = await stage.rows.due(now_ms(), [], 10)
        assert row.request is not None
        await stage.lifecycle.submit(
            decode_request(row.request), job_id=job_id, tenant="ann", priority=Priority.NORMAL, durable=True
        )
        await wait_until(lambda: _is(stage, job_id, JobState.SUCCEEDED))
    assert await stage.store.cancel_held(job_id)
    async with stage.running("recorder"):
        await wait_until(lambda: _recorded(stage))
    assert await stage.state(job_id) == (Stage.DONE, JobState.CANCELLED)
    finished = await stage.finished.get(job_id)
    assert finished is not None and finished.state is JobState.CANCELLED
    assert await stage.events() == ["job.cancelled"]


async def _is(stage: DurableStage, job_id: str, state: JobState) -> bool:
    return await state_of(stage.queue, job_id) is state


async def test_two_stagers_at_once_send_each_job_once(stage: DurableStage) -> None:
    await publish(stage)
    other = DurableStage(stage.redis, stage.settings)
    ids = await stage.hold(*(chat_job() for _ in range(40)))
    await asyncio.gather(stage.stager.turn(), other.stager.turn())
    assert {(await stage.row(job_id)).stage for job_id in ids} == {Stage.SENT}
    assert (await stage.queue.counts()) == {"accepted": 40}
    await other.close()


async def test_a_full_queue_holds_up_its_own_route_only_and_loses_nothing(redis: Redis, settings: Settings) -> None:
    await asyncio.to_thread(migrate, settings)
    stage = DurableStage(redis, changed(settings, queue_depth_cap=3))
    await publish(stage)
    ids = await stage.hold(*(chat_job() for _ in range(5)))
    (unknown,) = await stage.hold(chat_job(model="gone"))
    with capture_logs() as lines:
        await stage.stager.turn()
        (late,) = await stage.hold(chat_job(priority=Priority.HIGH))
        await stage.stager.turn()
    stages = [(await stage.row(job_id)).stage for job_id in ids]
    assert stages.count(Stage.SENT) == 3 and (await stage.row(late)).stage is Stage.SENT
    assert (await stage.row(unknown)).stage is Stage.HELD
    waiting = [line["model"] for line in lines if line["event"] == "accepted jobs wait"]
    assert sorted(waiting) == ["demo", "gone"]
    async with stage.working(), stage.running("stager", "recorder"):
        for job_id in ids:
            await wait_until(lambda job_id=job_id: stage.is_done(job_id))
    await stage.close()


async def test_a_held_job_expires_at_its_deadline(stage: DurableStage) -> None:
    await stage.add_webhook()
    soon, later_still = await stage.hold(
        chat_job(deadline_ms=now_ms() - 1), chat_job(deadline_ms=now_ms() - 1, not_before_ms=now_ms() + HOUR_MS)
    )
    await stage.stager.turn()
    for job_id in (soon, later_still):
        row = await stage.row(job_id)
        assert (row.stage, row.state, row.error_code) == (Stage.DONE, JobState.EXPIRED, "deadline_exceeded")
        finished = await stage.finished.get(job_id)
        assert finished is not None and finished.state is JobState.EXPIRED
    assert await stage.events() == ["job.expired", "job.expired"]


async def test_a_request_that_cannot_be_read_fails_and_holds_up_nobody(stage: DurableStage) -> None:
    await publish(stage)
    bad, good = await stage.hold(chat_job(request=b"\xc1"), chat_job())
    await stage.stager.turn()
    row = await stage.row(bad)
    assert (row.state, row.error_code) == (JobState.FAILED, "internal_error")
    assert (await stage.row(good)).stage is Stage.SENT


async def test_batches_keep_to_their_windows_and_take_turns(redis: Redis, settings: Settings) -> None:
    await asyncio.to_thread(migrate, settings)
    stage = DurableStage(redis, changed(settings, batch_window=4))
    await publish(stage)
    first, second = await stage.add_batch("batch-1", 9), await stage.add_batch("batch-2", 3)
    await stage.stager.turn()
    await stage.stager.turn()
    assert await stage.rows.running_batches() == {"batch-1": 4, "batch-2": 3}
    jobs = await claim(stage.queue)
    assert {job.id for job in jobs} == {*first[:4], *second}
    assert {job.priority for job in jobs} == {Priority.BATCH}
    async with stage.working(), stage.running("stager", "recorder"):
        await stage.lifecycle.retire("mac-1:100")
        for job_id in (*first, *second):
            await wait_until(lambda job_id=job_id: stage.is_done(job_id))
    assert await stage.store.counts("batch-1") == {JobState.SUCCEEDED: 9}
    lines = await stage.store.lines("batch-1", succeeded=True, after_line=0, limit=20)
    assert [line.custom_id for line in lines] == [f"row-{number}" for number in range(1, 10)]
    await stage.close()


async def test_lines_of_a_batch_that_is_not_in_progress_stay(stage: DurableStage) -> None:
    await publish(stage)
    (line,) = await stage.add_batch("batch-1", 1)
    await stage.change(line, batch_id="batch-other")
    await stage.stager.turn()
    assert (await stage.row(line)).stage is Stage.HELD


async def test_another_shards_jobs_are_left_to_it(stage: DurableStage) -> None:
    await publish(stage)
    (job_id,) = await stage.hold(chat_job(id="job-other-0123456789a00000000000000000000"))
    await stage.stager.turn()
    assert (await stage.row(job_id)).stage is Stage.HELD
