"""Durable jobs on their way: due, sent, lost, ended, removed. On both databases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.batch import NewBatch
from scheduler.db.batches import BatchStore
from scheduler.db.durable import DurableStore, NewDurable, Stage
from scheduler.db.durable_ends import CANCELLED
from scheduler.db.durable_outcomes import DurableEnd, DurableOutcomes
from scheduler.db.durable_retention import DurableRetention
from scheduler.db.jobs import JobStore
from scheduler.db.models import Batch
from scheduler.db.outbox_rows import OutboxRows, SentRow
from scheduler.db.session import Database
from scheduler.job import JobState, JobView, Priority
from scheduler.loops.pruner import DAY_MS, prune_durable_jobs
from scheduler.request import Usage
from scheduler.settings import Settings
from tests.integration.sql.test_durable import NOW_MS, add_lines, end, line_of, move, new_durable


@pytest.fixture
def store(database: Database) -> DurableStore:
    return DurableStore(database)


@pytest.fixture
def rows(database: Database) -> OutboxRows:
    return OutboxRows(database, "0")


async def held(store: DurableStore, *jobs: NewDurable) -> list[str]:
    return [accepted.job_id for accepted in await store.accept(jobs)]


async def add_batch(database: Database, batch_id: str, status: str) -> None:
    async with database.session() as session:
        session.add(
            Batch(
                id=batch_id,
                tenant="ann",
                endpoint="/v1/chat/completions",
                status=status,
                input_file_id="file-1",
                completion_window="24h",
                created_ms=NOW_MS,
                expires_ms=NOW_MS + 1,
            )
        )
        await session.commit()


def ended(job_id: str, attempt: int = 1, **fields: object) -> JobView:
    view = JobView(
        id=job_id,
        state=JobState.SUCCEEDED,
        pool="demo",
        model="demo",
        priority=Priority.NORMAL,
        tenant="ann",
        attempt=attempt,
        created_ms=NOW_MS,
        finished_ms=NOW_MS + attempt,
        usage=Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=4),
        durable=True,
    )
    return replace(view, **fields)


async def test_what_is_due_comes_oldest_first_without_lines_later_ones_and_paused_routes(
    store: DurableStore, rows: OutboxRows, database: Database
) -> None:
    second, first = await held(store, new_durable(created_ms=NOW_MS), new_durable(created_ms=NOW_MS - 5))
    await held(store, new_durable(not_before_ms=NOW_MS + 60_001), new_durable(id="job-1-00000000000aa"))
    await add_lines(database, store, [line_of("batch-1", 1)])
    (other,) = await held(store, new_durable(model="other", created_ms=NOW_MS + 1))
    due = await rows.due(NOW_MS + 60_000, [], 10)
    assert [job.id for job in due] == [first, second, other] and due[0].request == b"request"
    paused = [("demo", Priority.NORMAL), ("other", Priority.HIGH)]
    assert [job.id for job in await rows.due(NOW_MS + 60_000, paused, 10)] == [other]
    assert [job.id for job in await rows.due(NOW_MS + 60_000, [], 1)] == [first]


async def test_only_held_jobs_are_marked_or_ended(store: DurableStore, rows: OutboxRows) -> None:
    first, second = await held(store, new_durable(), new_durable())
    assert await rows.mark_sent([first]) == {first: Priority.NORMAL}
    assert await rows.mark_sent([first, second]) == {second: Priority.NORMAL}
    assert await rows.end_held([first], CANCELLED, NOW_MS) == []
    assert await rows.standing([first]) == {first: (Stage.SENT, Priority.NORMAL)}
    assert await rows.hold_again([first]) == 1 and await rows.hold_again([first]) == 0
    assert await rows.end_held([first], CANCELLED, NOW_MS) == [first]
    assert await rows.standing([first]) == {first: (Stage.DONE, Priority.NORMAL)}


async def test_only_batches_in_progress_run(store: DurableStore, rows: OutboxRows, database: Database) -> None:
    for batch_id, status in (("batch-2", "in_progress"), ("batch-1", "in_progress"), ("batch-3", "cancelling")):
        await add_batch(database, batch_id, status)
    lines = [line_of("batch-1", number) for number in (3, 1, 2)]
    await add_lines(database, store, lines)
    assert await rows.running_batches() == {"batch-1": 0, "batch-2": 0}
    assert [line.line for line in await rows.held_lines("batch-1", [], 2)] == [1, 2]
    await rows.mark_sent([lines[1].id])
    assert await rows.running_batches() == {"batch-1": 1, "batch-2": 0}


async def test_what_expired_is_found_wherever_it_waits(store: DurableStore, rows: OutboxRows) -> None:
    late, _ = await held(
        store, new_durable(deadline_ms=NOW_MS, not_before_ms=NOW_MS + DAY_MS), new_durable(deadline_ms=NOW_MS + 1)
    )
    assert (await rows.expire(NOW_MS, 10), await rows.expire(NOW_MS, 10)) == (1, 0)
    row = await store.get(late)
    assert row is not None and row.state is JobState.EXPIRED


async def test_sent_jobs_are_paged_by_id(store: DurableStore, rows: OutboxRows) -> None:
    ids = await held(store, *(new_durable(id=f"job-0-{number}") for number in range(5)))
    await rows.mark_sent(ids)
    assert await rows.sent("", NOW_MS, 2) == [SentRow("job-0-0", None), SentRow("job-0-1", None)]
    assert [row.id for row in await rows.sent("job-0-2", NOW_MS, 9)] == ["job-0-3", "job-0-4"]
    assert await rows.sent("", NOW_MS - 1, 9) == []


async def test_an_end_is_written_with_its_answer_once(store: DurableStore, database: Database) -> None:
    first, second = await held(store, new_durable(), new_durable())
    outcomes = DurableOutcomes(database)
    failed = ended(second, state=JobState.FAILED, error_code="invalid_request", error_message="no\0" + "x" * 900)
    ends = [DurableEnd(ended(first), b'{"a":1}'), DurableEnd(failed, error_param="model")]
    assert sorted((await outcomes.write(ends)).news) == sorted([first, second])
    assert (await outcomes.write(ends)).news == []
    row, bad = await store.get(first, with_answer=True), await store.get(second)
    assert row is not None and (row.stage, row.state, row.answer) == (Stage.DONE, JobState.SUCCEEDED, b'{"a":1}')
    assert row.usage == Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=4) and row.finished_ms == NOW_MS + 1
    assert bad is not None and bad.error_param == "model" and len(bad.error_message or "") == 500
    finished = await JobStore(database).get(first)
    assert finished is not None and finished.state is JobState.SUCCEEDED
    assert (await outcomes.write([DurableEnd(ended("job-0-unknown"))])).news == [] and (
        await outcomes.write([])
    ).news == []


async def test_ends_are_fenced_by_attempt_stage_and_time(store: DurableStore, database: Database) -> None:
    (job_id,) = await held(store, new_durable())
    outcomes = DurableOutcomes(database)
    await move(database, job_id, attempt=2)
    assert (await outcomes.write([DurableEnd(ended(job_id, attempt=1))])).news == []
    failed = DurableEnd(ended(job_id, attempt=2, state=JobState.FAILED))
    assert (await outcomes.write([failed])).news == [job_id]
    assert await store.reopen(job_id) and (await outcomes.write([failed])).news == []
    assert (await outcomes.write([DurableEnd(ended(job_id, attempt=2, finished_ms=NOW_MS + 99))])).news == [job_id]
    assert (await outcomes.write([DurableEnd(ended(job_id, attempt=3))])).news == []  # it succeeded: that stands


async def test_an_end_that_was_opened_again_is_closed_as_it_was(
    store: DurableStore, rows: OutboxRows, database: Database
) -> None:
    (job_id,) = await held(store, new_durable())
    await end(database, job_id, JobState.EXPIRED)
    await store.reopen(job_id)
    assert await rows.sent("", NOW_MS, 9) == [SentRow(job_id, NOW_MS + 9)]
    assert await rows.close_again({job_id: (JobState.EXPIRED, NOW_MS + 8)}) == 0
    assert await rows.close_again({job_id: (JobState.EXPIRED, NOW_MS + 9)}) == 1
    row = await store.get(job_id)
    assert row is not None and (row.stage, row.state) == (Stage.DONE, JobState.EXPIRED)


async def test_old_jobs_go_and_lines_of_batches_that_go_on_stay(
    store: DurableStore, database: Database, settings: Settings
) -> None:
    old, young, open_ = await held(store, new_durable(), new_durable(), new_durable())
    for batch_id, status in (("batch-1", "in_progress"), ("batch-2", "completed")):
        await add_batch(database, batch_id, status)
    lines = [line_of(batch_id, 1) for batch_id in ("batch-1", "batch-2", "batch-removed")]
    await add_lines(database, store, lines)
    for job_id in (old, *(line.id for line in lines[:2])):
        await end(database, job_id, JobState.SUCCEEDED)
    await end(database, young, JobState.SUCCEEDED)
    await move(database, young, finished_ms=NOW_MS + 10)
    now_ms = NOW_MS + 10 + settings.durable_job_retention_days * DAY_MS
    assert await prune_durable_jobs(DurableRetention(database), settings, now_ms) == 3
    left = {job.id for job in await store.list(limit=100)}
    assert left == {young, open_, lines[0].id}


async def test_an_idempotency_key_lasts_a_day(store: DurableStore, database: Database, settings: Settings) -> None:
    retention = DurableRetention(database)
    first, again = (new_durable(idempotency_key="k", body_digest=digest) for digest in "ab")
    await store.accept([first])
    await prune_durable_jobs(retention, settings, NOW_MS + DAY_MS)
    assert (await store.accept([replace(first, id=again.id)]))[0].job_id == first.id
    await prune_durable_jobs(retention, settings, NOW_MS + DAY_MS + 1)
    assert (await store.accept([again]))[0].created


async def test_an_idempotency_key_of_a_batch_lasts_a_day(database: Database, settings: Settings) -> None:
    batches, retention = BatchStore(database), DurableRetention(database)
    new = NewBatch("ann", "/v1/chat/completions", "file-1", "24h", NOW_MS + 1, idempotency_key="k", body_digest="a")
    first = await batches.create(new, NOW_MS)
    await prune_durable_jobs(retention, settings, NOW_MS + DAY_MS)
    assert (await batches.create(new, NOW_MS + 1)).id == first.id
    await prune_durable_jobs(retention, settings, NOW_MS + DAY_MS + 1)
    assert (await batches.create(replace(new, body_digest="b"), NOW_MS + 2)).id != first.id
