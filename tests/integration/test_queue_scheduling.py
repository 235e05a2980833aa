"""Who is served next: lanes, class shares, tenants by service received, FIFO inside, and what fits a worker."""

from __future__ import annotations

from collections import Counter

import pytest

from scheduler.job import JobState, Priority
from scheduler.queue.job_queue import JobQueue
from scheduler.request import Usage
from tests.queue_cases import PLENTY, POOL, WORKER, claim, claim_one, enqueue, succeed


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


@pytest.mark.parametrize("costs", [(100, 100, 100), (50, 400, 130), (400, 20, 20)])
async def test_the_service_gap_between_backlogged_tenants_is_bounded(queue: JobQueue, costs: tuple[int, ...]) -> None:
    """The bound of Sheng et al. (OSDI 2024), where jobs use more than was guessed: of all rows, and one in hand."""
    for tenant, cost in enumerate(costs):
        for _ in range(4000 // cost + 5):
            await enqueue(queue, tenant=f"t{tenant}", cost_tokens=cost)
    served: Counter[str] = Counter()
    for number in range(40):
        for job in await claim(queue, rows=3, total=3):
            used = costs[int(job.tenant[1:])] * (1 + number % 2)
            await succeed(queue, job, usage=Usage(prompt_tokens=used, completion_tokens=0))
            served[job.tenant] += used
        assert max(served.values()) - min(served[f"t{tenant}"] for tenant in range(3)) <= 8 * max(costs)
    assert len(served) == len(costs)


async def test_batch_work_progresses_beside_an_endless_flood_of_every_higher_class(queue: JobQueue) -> None:
    batch = await enqueue(queue, priority=Priority.BATCH)
    for served in range(200):
        for priority in (Priority.HIGH, Priority.NORMAL, Priority.LOW):
            await enqueue(queue, priority=priority)
        job = await claim_one(queue)
        await succeed(queue, job)
        if job.id == batch:
            assert served <= 64 + 16 + 4
            return
    raise AssertionError("starved")


async def test_a_poison_job_takes_no_neighbour_beyond_its_second_loss_and_dies_alone(queue: JobQueue) -> None:
    poison = await enqueue(queue, tenant="mallory")
    others = {await enqueue(queue) for _ in range(4)}
    for number in range(1, 8):  # of those that run alone now, a neighbour may come first
        worker = f"w:{number}"
        held = {job.id for job in await claim(queue, worker)}
        await (queue.expire_worker(worker) if poison in held else queue.retire_worker(worker))
    view = await queue.view(poison)
    assert view is not None and (view.state, view.error_code) == (JobState.FAILED, "worker_lost")
    assert [letter.job_id for letter in await queue.dead_letters(10)] == [poison]
    waiting = {job.id: job for job in await queue.list_jobs(10)}
    assert set(waiting) == others
    while jobs := await claim(queue, "w:9"):  # those that it dragged along twice run alone, one after another
        for job in jobs:
            assert job.lost <= 2
            await succeed(queue, job, "w:9")
    assert (await queue.counts())["succeeded"] == 4


async def test_a_claim_says_whether_work_is_left(queue: JobQueue) -> None:
    await enqueue(queue, kv_tokens=100)
    await enqueue(queue, kv_tokens=100)
    first = await queue.claim("a", POOL, 1, 4, 1000, 1000)
    assert len(first.jobs) == 1 and first.is_more_left
    second = await queue.claim("a", POOL, 3, 4, 900, 1000)
    assert len(second.jobs) == 1 and not second.is_more_left
    assert not (await queue.claim("a", POOL, 2, 4, 800, 1000)).is_more_left


async def test_batch_work_that_is_held_back_counts_as_left(queue: JobQueue) -> None:
    await enqueue(queue, kv_tokens=900)
    await queue.claim("a", POOL, 4, 4, 1000, 1000)
    await enqueue(queue, priority=Priority.BATCH, kv_tokens=10)
    held = await queue.claim("a", POOL, 3, 4, 100, 1000)
    assert held.jobs == () and held.is_more_left
