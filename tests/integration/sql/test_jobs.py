"""Finished jobs, on both databases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.db.jobs import JobStore
from scheduler.db.session import Database
from scheduler.job import JobState, JobView, Priority
from scheduler.request import Usage

DONE = JobView(
    id="job-0-1",
    state=JobState.SUCCEEDED,
    pool="demo",
    model="demo",
    priority=Priority.HIGH,
    tenant="default",
    attempt=1,
    created_ms=1_795_000_000_000,
    started_ms=1_795_000_000_010,
    first_token_ms=1_795_000_000_020,
    finished_ms=1_795_000_000_030,
    usage=Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=4),
)


async def test_what_is_recorded_is_read_back(database: Database) -> None:
    store = JobStore(database)
    failed = replace(DONE, id="job-0-2", state=JobState.FAILED, error_code="engine_failure", error_message="why")
    await store.record([DONE, failed])
    assert await store.get("job-0-1") == DONE
    assert await store.get("job-0-2") == failed
    assert await store.get("job-0-3") is None


async def test_an_older_attempt_never_overwrites_a_newer_one(database: Database) -> None:
    store = JobStore(database)
    newer, older = replace(DONE, attempt=2), replace(DONE, attempt=1, state=JobState.FAILED)
    await store.record([newer, older])
    assert await store.get(DONE.id) == newer
    await store.record([older])
    assert await store.get(DONE.id) == newer
    newest = replace(DONE, attempt=3, state=JobState.CANCELLED)
    await store.record([newest])
    assert await store.get(DONE.id) == newest


async def test_recording_again_is_harmless(database: Database) -> None:
    store = JobStore(database)
    await store.record([DONE])
    await store.record([DONE, DONE])
    assert await store.recent(10) == [DONE]


async def test_a_batch_larger_than_one_statement_is_recorded_whole(database: Database) -> None:
    store = JobStore(database)
    await store.record([replace(DONE, id=f"job-0-{number}") for number in range(1203)])
    assert len(await store.recent(2000)) == 1203


async def test_long_text_and_nul_are_bounded_rather_than_refused(database: Database) -> None:
    store = JobStore(database)
    await store.record([replace(DONE, error_code="x", error_message="a\0" + "b" * 5000, model="m" * 999)])
    kept = await store.get(DONE.id)
    assert kept is not None and kept.error_message is not None
    assert kept.error_message.startswith("a\ufffdb") and len(kept.error_message) == 500 and len(kept.model) == 255


async def test_a_job_that_still_runs_is_not_recorded(database: Database) -> None:
    with pytest.raises(ValueError, match="only finished jobs"):
        await JobStore(database).record([replace(DONE, state=JobState.RUNNING)])


async def test_recent_is_newest_first_and_of_one_tenant(database: Database) -> None:
    store = JobStore(database)
    jobs = [replace(DONE, id=f"job-0-{n}", finished_ms=n, tenant=f"t{n % 2}") for n in range(1, 7)]
    await store.record(jobs)
    assert [job.finished_ms for job in await store.recent(3)] == [6, 5, 4]
    assert [job.finished_ms for job in await store.recent(9, tenant="t1")] == [5, 3, 1]


async def test_prune_removes_only_what_is_older_and_no_more_than_its_limit(database: Database) -> None:
    store = JobStore(database)
    await store.record([replace(DONE, id=f"job-0-{n}", finished_ms=n) for n in range(1, 11)])
    assert await store.prune(before_ms=6, limit=3) == 3
    assert await store.prune(before_ms=6, limit=3) == 2
    assert await store.prune(before_ms=6, limit=3) == 0
    assert sorted(job.finished_ms or 0 for job in await store.recent(20)) == [6, 7, 8, 9, 10]
