"""Durable jobs: accepted once, read, cancelled, opened again; lines of batches. On both databases."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from sqlmodel import col, select, update

from scheduler.db.durable import Accepted, DurableStore, NewDurable, Stage
from scheduler.db.jobs import JobStore
from scheduler.db.models import DurableJob
from scheduler.db.session import Database
from scheduler.errors import IdempotencyMismatch
from scheduler.job import JobState, Priority, new_job_id

NOW_MS = 1_795_000_000_000
HOUR_MS = 3600_000


def new_durable(**fields: object) -> NewDurable:
    job = NewDurable(
        id=new_job_id("0"),
        tenant="ann",
        endpoint="/v1/chat/completions",
        model="demo",
        priority=Priority.NORMAL,
        request=b"request",
        created_ms=NOW_MS,
    )
    return replace(job, **fields)


def line_of(batch_id: str, line: int) -> NewDurable:
    return new_durable(batch_id=batch_id, line=line, custom_id=f"row {line}", priority=Priority.BATCH)


@pytest.fixture
def store(database: Database) -> DurableStore:
    return DurableStore(database)


async def move(database: Database, job_id: str, **values: object) -> None:
    """As the stager and the recorder would."""
    async with database.session() as session:
        await session.exec(update(DurableJob).where(col(DurableJob.id) == job_id).values(values))
        await session.commit()


async def end(database: Database, job_id: str, state: JobState, **values: object) -> None:
    await move(database, job_id, stage="done", state=state.value, finished_ms=NOW_MS + 9, **values)


async def add_lines(database: Database, store: DurableStore, lines: list[NewDurable]) -> None:
    async with database.session() as session:
        await store.add_lines(session, lines)
        await session.commit()


async def test_what_is_accepted_is_read_back_without_its_large_parts(store: DurableStore) -> None:
    job = new_durable(details='{"team":"a"}', deadline_ms=NOW_MS + 5, webhook_id="wh-1", schedule_id="sched-1")
    assert await store.accept([job]) == [Accepted(job.id, created=True)]
    kept = await store.get(job.id)
    assert kept is not None and kept.stage is Stage.HELD and kept.state is JobState.QUEUED
    assert (kept.tenant, kept.details, kept.deadline_ms) == ("ann", '{"team":"a"}', NOW_MS + 5)
    assert (kept.webhook_id, kept.schedule_id, kept.not_before_ms) == ("wh-1", "sched-1", None)
    assert kept.request is None and kept.answer is None
    whole = await store.get(job.id, with_request=True, with_answer=True)
    assert whole is not None and whole.request == b"request" and whole.answer is None
    assert await store.get("job-0-none") is None


async def test_a_job_for_later_is_scheduled(store: DurableStore) -> None:
    later, past = new_durable(not_before_ms=NOW_MS + HOUR_MS), new_durable(not_before_ms=NOW_MS - HOUR_MS)
    await store.accept([later, past])
    found = await store.of_ids([later.id, past.id])
    assert (found[later.id].state, found[later.id].not_before_ms) == (JobState.SCHEDULED, NOW_MS + HOUR_MS)
    assert (found[past.id].state, found[past.id].not_before_ms) == (JobState.QUEUED, None)


async def test_an_idempotency_key_is_answered_by_its_first_job(store: DurableStore) -> None:
    first = new_durable(idempotency_key="k", body_digest="d")
    again = replace(first, id=new_job_id("0"))
    others = replace(again, id=new_job_id("0"), tenant="bob")
    assert await store.accept([first]) == [Accepted(first.id, created=True)]
    plain = new_durable()
    assert await store.accept([again, plain, others]) == [
        Accepted(first.id, created=False),
        Accepted(plain.id, created=True),
        Accepted(others.id, created=True),
    ]
    assert await store.get(again.id) is None


async def test_an_idempotency_key_with_another_body_accepts_none_of_the_call(store: DurableStore) -> None:
    first = new_durable(idempotency_key="k", body_digest="d")
    await store.accept([first])
    plain = new_durable()
    with pytest.raises(IdempotencyMismatch, match=first.id):
        await store.accept([plain, new_durable(idempotency_key="k", body_digest="other")])
    assert await store.get(plain.id) is None


async def test_accepting_again_changes_nothing(store: DurableStore, database: Database) -> None:
    job = new_durable(idempotency_key="k", body_digest="d")
    await store.accept([job])
    await end(database, job.id, JobState.SUCCEEDED)
    assert await store.accept([job]) == [Accepted(job.id, created=True)]
    kept = await store.get(job.id)
    assert kept is not None and kept.state is JobState.SUCCEEDED


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED])
async def test_the_key_of_a_job_without_success_tries_anew(
    store: DurableStore, database: Database, state: JobState
) -> None:
    first, again, third, other = (new_durable(idempotency_key="k", body_digest=digest) for digest in "dddx")
    await store.accept([first])
    await end(database, first.id, state)
    with pytest.raises(IdempotencyMismatch):
        await store.accept([other])
    assert await store.accept([again]) == [Accepted(again.id, created=True)]
    assert await store.accept([third]) == [Accepted(again.id, created=False)]
    await end(database, again.id, JobState.SUCCEEDED)
    assert await store.accept([third]) == [Accepted(again.id, created=False)]


async def test_one_idempotency_key_at_once_makes_one_job(store: DurableStore) -> None:
    jobs = [new_durable(idempotency_key="k", body_digest="d") for _ in range(8)]
    accepted = await asyncio.gather(*(store.accept([job]) for job in jobs))
    assert len({one.job_id for (one,) in accepted}) == 1
    assert [one.created for (one,) in accepted].count(True) == 1


async def test_a_listing_is_newest_first_filtered_and_paged(store: DurableStore) -> None:
    tenants = ["ann", "bob"] * 5
    jobs = [new_durable(id=f"job-0-{n:03}", tenant=tenant, model=f"m{n % 3}") for n, tenant in enumerate(tenants)]
    await store.accept(jobs)
    first = await store.list(tenant="ann", limit=2)
    assert [job.id for job in first] == ["job-0-008", "job-0-006"]
    assert [job.id for job in await store.list(tenant="ann", after=first[-1].id)] == [
        "job-0-004",
        "job-0-002",
        "job-0-000",
    ]
    assert [job.id for job in await store.list(model="m0", tenant="bob")] == ["job-0-009", "job-0-003"]
    assert await store.list(state=JobState.SCHEDULED) == []
    assert len(await store.list(state=JobState.QUEUED, priority=Priority.NORMAL)) == 10


async def test_only_what_is_held_is_cancelled_in_sql(store: DurableStore, database: Database) -> None:
    held, sent = new_durable(), new_durable()
    await store.accept([held, sent])
    await move(database, sent.id, stage="sent")
    ids = (held.id, sent.id, "job-0-none")
    assert [bool(await store.cancel_held(job_id)) for job_id in ids] == [
        True,
        False,
        False,
    ]
    assert not await store.cancel_held(held.id)
    kept, live = await store.get(held.id), await store.get(sent.id)
    assert kept is not None and (kept.stage, kept.state) == (Stage.DONE, JobState.CANCELLED)
    assert kept.error_code == "cancelled" and kept.finished_ms is not None
    assert live is not None and live.stage is Stage.SENT
    finished = await JobStore(database).get(held.id)
    assert finished is not None and finished.state is JobState.CANCELLED
    ids = (held.id, sent.id, "job-0-none")
    assert [bool(await store.cancel_open(job_id)) for job_id in ids] == [
        False,
        True,
        False,
    ]


async def test_what_did_not_succeed_can_be_opened_again(store: DurableStore, database: Database) -> None:
    failed, done, held = new_durable(), new_durable(), new_durable()
    await store.accept([failed, done, held])
    await end(database, failed.id, JobState.FAILED, attempt=3, error_code="engine_failure", deadline_ms=1)
    await end(database, done.id, JobState.SUCCEEDED)
    assert [await store.reopen(job.id) for job in (failed, done, held)] == [True, False, False]
    again = await store.get(failed.id)
    assert again is not None and (again.stage, again.state) == (Stage.SENT, JobState.QUEUED)
    assert (again.attempt, again.error_code, again.finished_ms) == (3, None, None)
    assert again.deadline_ms is None


async def test_a_job_that_redis_forgot_is_opened_again_for_the_stager(store: DurableStore, database: Database) -> None:
    job = new_durable()
    await store.accept([job])
    await end(database, job.id, JobState.FAILED, attempt=3)
    assert await store.reopen(job.id, hold=True)
    again = await store.get(job.id)
    assert again is not None and (again.stage, again.attempt) == (Stage.HELD, 0)


async def test_lines_of_a_batch_are_counted_and_read_in_order(store: DurableStore, database: Database) -> None:
    lines = [line_of("batch-1", number) for number in range(1, 10)]
    await add_lines(database, store, lines[::-1])
    await add_lines(database, store, [line_of("batch-2", 1)])
    for number, line in enumerate(lines[:6]):
        state = JobState.SUCCEEDED if number % 2 == 0 else JobState.FAILED
        await end(database, line.id, state, answer=b"%d" % number)
    await move(database, lines[6].id, stage="sent")
    assert await store.counts("batch-1") == {JobState.SUCCEEDED: 3, JobState.FAILED: 3, JobState.QUEUED: 3}
    good = await store.lines("batch-1", succeeded=True, after_line=1, limit=10)
    assert [(line.line, line.custom_id, line.answer) for line in good] == [(3, "row 3", b"2"), (5, "row 5", b"4")]
    bad = await store.lines("batch-1", succeeded=False, after_line=0, limit=2)
    assert [line.line for line in bad] == [2, 4]
    assert await store.ids_sent("batch-1", 10) == [lines[6].id]
    assert (await store.last_line("batch-1"), await store.last_line("batch-none")) == (9, 0)


async def test_adding_lines_again_changes_nothing(store: DurableStore, database: Database) -> None:
    lines = [line_of("batch-1", number) for number in range(1, 2501)]
    await add_lines(database, store, lines[:2000])
    await end(database, lines[0].id, JobState.SUCCEEDED)
    await add_lines(database, store, lines)
    assert await store.counts("batch-1") == {JobState.SUCCEEDED: 1, JobState.QUEUED: 2499}


async def test_ending_the_held_lines_leaves_the_others(store: DurableStore, database: Database) -> None:
    lines = [line_of("batch-1", number) for number in range(1, 1206)]
    await add_lines(database, store, lines)
    await move(database, lines[0].id, stage="sent")
    await end(database, lines[1].id, JobState.SUCCEEDED)
    assert await store.end_held_lines("batch-1", JobState.CANCELLED, "cancelled", "The batch was cancelled.") == 1203
    assert await store.counts("batch-1") == {JobState.QUEUED: 1, JobState.SUCCEEDED: 1, JobState.CANCELLED: 1203}
    assert await store.end_held_lines("batch-1", JobState.CANCELLED, "cancelled", "again") == 0
    (line,) = await store.lines("batch-1", succeeded=False, after_line=1000, limit=1)
    assert (line.error_code, line.error_message) == ("cancelled", "The batch was cancelled.")


async def test_held_jobs_are_counted_by_tenant_and_without_lines(store: DurableStore, database: Database) -> None:
    await store.accept([new_durable(), new_durable(), new_durable(tenant="bob")])
    await add_lines(database, store, [line_of("batch-1", 1)])
    assert (await store.held_count("ann"), await store.held_count("bob"), await store.held_count("eve")) == (2, 1, 0)


async def test_a_key_of_any_text_is_kept_as_a_hash(store: DurableStore, database: Database) -> None:
    await store.accept([new_durable(idempotency_key="\0 secret €" * 50)])
    async with database.session() as session:
        kept = (await session.exec(select(DurableJob.idempotency))).one()
    assert kept is not None and len(kept) == 64
