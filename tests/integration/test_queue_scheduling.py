"""Who is served next: lanes, class shares, tenants by service received, FIFO inside, and what fits a worker."""

from __future__ import annotations

from collections import Counter

import pytest

from scheduler.job import JobState, Priority
from scheduler.queue.job_queue import JobQueue
from scheduler.request import Usage
from tests.queue_cases import PLENTY, WORKER, claim, claim_one, enqueue, succeed


async def test_jobs_of_one_tenant_and_class_come_in_order(queue: JobQueue) -> None:
    ids = [await enqueue(queue) for _ in range(10)]
    assert [job.id for job in await claim(queue)] == ids


async def test_classes_share_as_sixteen_to_four_to_one_with_batch_below(queue: JobQueue) -> None:
    for priority in Priority:
        for _ in range(340 if priority is Priority.HIGH else 120):
            await enqueue(queue, priority=priority)
    shares: Counter[Priority] = Counter()
    for _ in range(10):
        shares.update(job.priority for job in await claim(queue, rows=34, total=34))
    assert sum(shares.values()) == 340
    assert shares[Priority.HIGH] == pytest.approx(256, abs=4)
    assert shares[Priority.NORMAL] == pytest.approx(64, abs=3)
    assert shares[Priority.LOW] == pytest.approx(16, abs=2)
    assert shares[Priority.BATCH] == pytest.approx(4, abs=1)


async def test_an_idle_class_saves_nothing_up(queue: JobQueue) -> None:
    for _ in range(60):
        await enqueue(queue, priority=Priority.HIGH)
    await claim(queue, rows=40, total=40)
    for _ in range(20):
        await enqueue(queue, priority=Priority.NORMAL)
    after = [job.priority for job in await claim(queue, rows=10, total=10)]
    assert after.count(Priority.NORMAL) == pytest.approx(2, abs=1)


async def test_a_lone_low_class_gets_everything(queue: JobQueue) -> None:
    for _ in range(5):
        await enqueue(queue, priority=Priority.BATCH)
    assert len(await claim(queue)) == 5


async def test_tenants_share_by_tokens_not_by_jobs(queue: JobQueue) -> None:
    for _ in range(60):
        await enqueue(queue, tenant="flood", cost_tokens=100)
    for _ in range(20):
        await enqueue(queue, tenant="long", cost_tokens=400)
    got: Counter[str] = Counter()
    for _ in range(5):
        for job in await claim(queue, rows=10, total=10):
            got[job.tenant] += 100 if job.tenant == "flood" else 400
    assert abs(got["flood"] - got["long"]) <= 400


async def test_a_newcomer_is_served_before_a_flood_but_saved_nothing_up(queue: JobQueue) -> None:
    for _ in range(60):
        await enqueue(queue, tenant="flood")
    await claim(queue, rows=30, total=30)
    for _ in range(20):
        await enqueue(queue, tenant="new")
    got = Counter(job.tenant for job in await claim(queue, rows=10, total=10))
    assert got == {"flood": 5, "new": 5}


async def test_real_usage_settles_what_a_tenant_was_charged(queue: JobQueue) -> None:
    for tenant in ("modest", "greedy"):
        for _ in range(20):
            await enqueue(queue, tenant=tenant, cost_tokens=100)
    for job in await claim(queue, rows=2, total=2):
        tokens = 500 if job.tenant == "greedy" else 20
        await succeed(queue, job, usage=Usage(prompt_tokens=0, completion_tokens=tokens))
    got = Counter(job.tenant for job in await claim(queue, rows=8, total=8))
    assert got == {"modest": 8}


async def test_reclaimed_work_goes_before_the_highest_class(queue: JobQueue) -> None:
    lost = await enqueue(queue, priority=Priority.BATCH)
    await claim_one(queue)
    await enqueue(queue, priority=Priority.HIGH)
    await queue.expire_worker(WORKER)
    assert (await claim_one(queue, "w:2")).id == lost


async def test_a_worker_gets_no_more_rows_than_it_has(queue: JobQueue) -> None:
    for rows in (2, 2, 2):
        await enqueue(queue, rows=rows)
    assert len(await claim(queue, rows=5, total=8)) == 2


async def test_a_head_that_does_not_fit_is_not_skipped(queue: JobQueue) -> None:
    await enqueue(queue)
    wide = await enqueue(queue, rows=4)
    await enqueue(queue)
    (first,) = await claim(queue, rows=3, total=4)
    assert first.rows == 1
    assert await claim(queue, rows=3, total=4) == []
    await succeed(queue, first)
    assert [job.id for job in await claim(queue, rows=4, total=4)] == [wide]


async def test_a_job_with_more_choices_than_rows_goes_to_an_empty_worker(queue: JobQueue) -> None:
    huge = await enqueue(queue, rows=100)
    assert await claim(queue, rows=7, total=8) == []
    assert [job.id for job in await claim(queue, rows=8, total=8)] == [huge]


async def test_the_kv_budget_holds_a_long_prompt_back_until_it_fits(queue: JobQueue) -> None:
    short, long = await enqueue(queue, kv_tokens=100), await enqueue(queue, kv_tokens=900)
    jobs = await claim(queue, kv=950)
    assert [job.id for job in jobs] == [short]
    assert await claim(queue, kv=850) == []
    assert [job.id for job in await claim(queue, kv=950)] == [long]


async def test_an_idle_worker_takes_a_job_however_large_it_was_guessed(queue: JobQueue) -> None:
    await enqueue(queue, kv_tokens=PLENTY)
    assert len(await claim(queue, kv=10)) == 1


async def test_an_entry_whose_job_is_gone_is_dropped(queue: JobQueue) -> None:
    gone, next_one = await enqueue(queue), await enqueue(queue)
    await queue._redis.delete(queue.keys.job(gone))  # pyright: ignore[reportPrivateUsage]
    assert [job.id for job in await claim(queue)] == [next_one]


async def test_every_class_of_a_mixed_backlog_is_finished(queue: JobQueue) -> None:
    ids = [await enqueue(queue, priority=priority, tenant=f"t{n}") for priority in Priority for n in range(5)]
    done: list[str] = []
    while jobs := await claim(queue, rows=3):
        for job in jobs:
            await succeed(queue, job)
            done.append(job.id)
    assert sorted(done) == sorted(ids)
    for job_id in ids:
        view = await queue.view(job_id)
        assert view is not None and view.state is JobState.SUCCEEDED
