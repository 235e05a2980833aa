"""Answers of durable jobs reach their rows exactly once: after crashes, replays, lost logs, late or old outcomes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from api.dialect import HttpDialect
from scheduler.db.durable import Stage
from scheduler.db.durable_outcomes import DurableEnd, DurableOutcomes
from scheduler.db.schema import migrate
from scheduler.job import ClaimedJob, JobState, JobView
from scheduler.loops.outcome_writer import OutcomeWriter
from scheduler.queue.done_log import DoneLog
from scheduler.settings import Settings
from scheduler.tokens import EventId
from scheduler.webhooks import DELIVER
from tests.conftest import wait_until
from tests.durable_stage import DurableStage, chat_job
from tests.queue_cases import WORKER, ask, claim_one, delta, emit, state_of


@pytest.fixture
async def stage(redis: Redis, settings: Settings) -> AsyncGenerator[DurableStage]:
    await asyncio.to_thread(migrate, settings)
    stage = DurableStage(redis, settings)
    await stage.add_webhook()
    yield stage
    await stage.close()


async def run(stage: DurableStage, script: str = "one two", **fields: Any) -> str:
    """A durable job that ended in Redis and is not recorded yet."""
    async with stage.working() as worker:
        await worker.publish()
        (job_id,) = await stage.hold(chat_job(script, **fields))
        await stage.stager.turn()
        await wait_until(lambda: _ended(stage, job_id))
    return job_id


async def _ended(stage: DurableStage, job_id: str) -> bool:
    return (await state_of(stage.queue, job_id)).is_terminal


async def record(stage: DurableStage) -> None:
    """Let a recorder take all that there is."""
    async with stage.running("recorder"):
        await wait_until(lambda: _all_taken(stage))


async def _all_taken(stage: DurableStage) -> bool:
    return await ask(stage.redis, "XLEN", stage.queue.keys.of("done")) == 0


async def view(stage: DurableStage, job_id: str) -> JobView:
    (found,) = await stage.reader.views([job_id])
    return found


async def claim_sent(stage: DurableStage) -> ClaimedJob:
    """A job that was sent, claimed by a worker of the test."""
    async with stage.working() as worker:
        await worker.publish()
    await stage.hold(chat_job())
    await stage.stager.turn()
    return await claim_one(stage.queue)


async def test_the_answer_is_what_the_endpoint_would_have_sent(stage: DurableStage) -> None:
    job_id = await run(stage, "hello there", n=2)
    await record(stage)
    row = await stage.row(job_id)
    assert row.answer is not None
    body = json.loads(row.answer)
    assert (body["object"], body["model"], body["id"]) == ("chat.completion", "demo", "chatcmpl-" + job_id[4:])
    assert [choice["message"]["content"] for choice in body["choices"]] == ["hello there "] * 2
    assert body["usage"]["completion_tokens"] == row.usage.completion_tokens == 4
    assert await stage.events() == ["job.succeeded"]


async def test_a_recorded_job_may_be_forgotten_and_an_unrecorded_one_not(stage: DurableStage) -> None:
    job_id = await run(stage)
    log, keep_ms = stage.queue.keys.log(job_id), stage.settings.job_retention_s * 1000
    assert await stage.redis.pttl(log) > keep_ms
    await record(stage)
    assert await stage.redis.pttl(log) <= keep_ms


async def test_a_long_log_is_stored_whole(stage: DurableStage) -> None:
    words = [f"w{number}" for number in range(1203)]
    job = await claim_sent(stage)
    events = [(job.id, EventId(job.attempt, seq), delta(f"{word} ")) for seq, word in enumerate(words, 1)]
    for event in events:
        await stage.queue.emit(WORKER, [event])
    await stage.lifecycle.cancel(job.id)
    logs = await stage.reader.logs([job.id])
    (choice,) = logs[job.id].choices()
    assert choice.text.split() == words and not logs[job.id].whole
    await stage.lifecycle.cancelled(WORKER, job)
    assert (await stage.reader.logs([job.id]))[job.id].whole


async def test_a_failed_job_keeps_its_reason(stage: DurableStage) -> None:
    job_id = await run(stage, json.dumps({"say": ["a "], "fail": "context_length_exceeded"}))
    await record(stage)
    row = await stage.row(job_id)
    assert (row.stage, row.state, row.error_code) == (Stage.DONE, JobState.FAILED, "context_length_exceeded")
    assert row.answer is None and await stage.events() == ["job.failed"]


async def test_an_answer_that_cannot_be_rendered_is_an_honest_failure(stage: DurableStage) -> None:
    bad = await run(stage, json.dumps({"say": ["a "], "forget_reason": True}))
    good = await run(stage)
    with capture_logs() as lines:
        await record(stage)
    row = await stage.row(bad)
    assert (row.state, row.error_code, row.answer) == (JobState.FAILED, "internal_error", None)
    assert "could not be rendered" in (row.error_message or "")
    assert (await stage.row(good)).state is JobState.SUCCEEDED
    finished = await stage.finished.get(bad)
    assert finished is not None and finished.state is JobState.FAILED
    assert [line["job"] for line in lines if "cannot be rendered" in line["event"]] == [bad]


async def test_a_log_that_cannot_be_read_is_an_honest_failure(stage: DurableStage) -> None:
    job_id = await run(stage)
    log = stage.queue.keys.log(job_id)
    await ask(stage.redis, "DEL", log)
    await ask(stage.redis, "XADD", log, "1-4294967295", "p", b"\xc1")
    await stage.redis.pexpire(log, 60_000)
    await record(stage)
    assert (await stage.row(job_id)).error_code == "internal_error"


async def test_a_log_that_is_gone_alone_is_an_honest_failure(stage: DurableStage) -> None:
    job_id = await run(stage)
    await stage.redis.delete(stage.queue.keys.log(job_id))
    await record(stage)
    row = await stage.row(job_id)
    assert (row.stage, row.state, row.error_code) == (Stage.DONE, JobState.FAILED, "internal_error")


async def test_what_redis_lost_between_end_and_record_is_left_to_run_again(stage: DurableStage) -> None:
    job_id = await run(stage)
    await stage.redis.delete(stage.queue.keys.log(job_id), stage.queue.keys.job(job_id))
    await record(stage)
    assert (await stage.row(job_id)).stage is Stage.SENT and await stage.events() == []


async def test_webhooks_of_an_end_are_kicked_when_it_is_committed_and_not_again(stage: DurableStage) -> None:
    job_id = await run(stage)
    kicked: list[tuple[str, int, Stage]] = []

    async def kick(name: str, *args: str) -> None:
        kicked.append((name, len(args), (await stage.row(job_id)).stage))

    writer = OutcomeWriter(stage.reader, DurableOutcomes(stage.database), HttpDialect(), kick)
    for _ in range(2):
        await writer.write([await view(stage, job_id)])
    assert kicked == [(DELIVER, 1, Stage.DONE)]


async def test_a_recorder_killed_before_it_acknowledged_records_once(stage: DurableStage) -> None:
    job_id = await run(stage)
    job = await view(stage, job_id)
    (taken,) = await DoneLog(stage.redis, stage.settings).read_done("recorder", 10, 1)
    await stage.writer.write([job])
    first = await stage.row(job_id)
    done = stage.queue.keys.of("done")
    await ask(stage.redis, "XCLAIM", done, "recorder", "recorder", 0, taken.entry_id, "IDLE", 60_000)
    await record(stage)
    assert await stage.row(job_id) == first and await stage.events() == ["job.succeeded"]


async def test_a_recorder_killed_between_log_and_commit_leaves_nothing_half_done(stage: DurableStage) -> None:
    job_id = await run(stage)
    job = await view(stage, job_id)
    async with stage.database.session() as other:
        await (await other.connection()).exec_driver_sql("BEGIN IMMEDIATE")
        killed = asyncio.create_task(stage.writer.write([job]))
        await wait_until(lambda: stage.database.engine.pool.checkedout() == 2)  # pyright: ignore
        killed.cancel()
        await asyncio.sleep(0)  # it is gone, and SQLite's own wait for the lock is not
        await other.rollback()
    await asyncio.gather(killed, return_exceptions=True)
    assert killed.cancelled()
    assert (await stage.row(job_id)).stage is Stage.SENT and await stage.finished.get(job_id) is None
    await record(stage)
    assert (await stage.row(job_id)).state is JobState.SUCCEEDED and await stage.events() == ["job.succeeded"]


async def test_an_older_attempt_does_not_end_a_job(stage: DurableStage) -> None:
    job_id = await run(stage)
    job = await view(stage, job_id)
    await stage.change(job_id, attempt=2)
    outcomes = DurableOutcomes(stage.database)
    assert (await outcomes.write([DurableEnd(replace(job, attempt=1, state=JobState.FAILED))])).news == []
    assert (await stage.row(job_id)).stage is Stage.SENT
    assert (await outcomes.write([DurableEnd(replace(job, attempt=3), b"{}")])).news == [job_id]
    assert (await stage.row(job_id)).attempt == 3


async def test_a_job_tried_again_keeps_its_new_end_and_not_the_old_one(stage: DurableStage) -> None:
    job_id = await run(stage, json.dumps({"fail": "context_length_exceeded"}))
    await record(stage)
    old = await view(stage, job_id)
    assert await stage.store.reopen(job_id)
    await stage.writer.write([old])  # its outcome comes once more, late
    assert (await stage.row(job_id)).stage is Stage.SENT
    assert await stage.lifecycle.replay(job_id) is JobState.QUEUED
    await stage.writer.write([old])
    assert (await stage.row(job_id)).stage is Stage.SENT
    again = await claim_one(stage.queue)
    await emit(stage.queue, again, 1, "now")
    await stage.lifecycle.fail(WORKER, again, "invalid_request", "no")
    await record(stage)
    row = await stage.row(job_id)
    assert (row.stage, row.attempt, row.error_code) == (Stage.DONE, 2, "invalid_request")
    assert await stage.events() == ["job.failed", "job.failed"]


async def test_a_dead_letter_replayed_behind_sqls_back_is_recorded_again(stage: DurableStage) -> None:
    job_id = await run(stage, json.dumps({"fail": "context_length_exceeded"}))
    await record(stage)
    assert await stage.lifecycle.replay(job_id) is JobState.QUEUED
    again = await claim_one(stage.queue)
    await stage.lifecycle.fail(WORKER, again, "invalid_request", "no")
    await record(stage)
    row = await stage.row(job_id)
    assert (row.attempt, row.error_code) == (2, "invalid_request")


async def test_an_end_that_was_replayed_before_it_was_recorded_does_not_count(stage: DurableStage) -> None:
    job_id = await run(stage, json.dumps({"fail": "context_length_exceeded"}))
    assert await stage.lifecycle.replay(job_id) is JobState.QUEUED
    await record(stage)
    assert (await stage.row(job_id)).stage is Stage.SENT and await stage.events() == []


async def test_a_durable_job_without_a_row_does_not_stop_the_recorder(stage: DurableStage) -> None:
    async with stage.working() as worker:
        await worker.publish()
        lost = chat_job()
        await stage.outbox.send([])
        (job_id,) = await stage.hold(lost)
        await stage.stager.turn()
        await stage.change(job_id, id="job-t-elsewhere")
        await wait_until(lambda: _ended(stage, job_id))
    await record(stage)
    finished = await stage.finished.get(job_id)
    assert finished is not None and finished.state is JobState.SUCCEEDED
