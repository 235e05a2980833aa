"""A job's way through the queue: accepted, claimed, visible step by step, sealed, reported to the recorder."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from scheduler.job import ClaimedJob, JobState, Priority, new_job_id
from scheduler.lifecycle import Lifecycle
from scheduler.queue.connection import check_server, connect
from scheduler.queue.done_log import DoneLog
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Outcome
from scheduler.request import InferenceRequest, Message, SamplingParams, Usage, decode_request
from scheduler.settings import Settings
from scheduler.tokens import SEQ_TERMINAL, Delta, EventId, Failed, Finished, Started, decode_event, encode_event
from tests.conftest import wait_until
from tests.integration.test_queue_fleet import CARD, VIEW
from tests.queue_cases import (
    POOL,
    WORKER,
    ask,
    claim,
    claim_one,
    delta,
    emit,
    enqueue,
    log_ids,
    new_job,
    state_of,
    succeed,
)


async def test_a_job_is_claimed_emitted_and_finished_with_its_whole_log(queue: JobQueue) -> None:
    job_id = await enqueue(queue, body=b"the request", tenant="team: a|b {x}", priority=Priority.HIGH, rows=2)
    assert await queue.depths() == {(POOL, Priority.HIGH): 1}

    (job,) = await claim(queue)
    assert (job.id, job.attempt, job.body, job.tenant) == (job_id, 1, b"the request", "team: a|b {x}")
    assert (job.priority, job.rows, job.lost, job.failures) == (Priority.HIGH, 2, 0, 0)
    assert await queue.depths() == {}

    for seq, text in enumerate(("Hello", ", ", "world"), start=1):
        result = await emit(queue, job, seq, text)
        assert not (result.fenced or result.cancelled or result.lease_lost)
    assert await succeed(queue, job)

    events = [(at, decode_event(payload)) for at, payload in await queue.read_events(job_id, None)]
    assert [at for at, _ in events] == [EventId(1, seq) for seq in (0, 1, 2, 3, SEQ_TERMINAL)]
    assert isinstance(events[0][1], Started) and events[0][1].worker == WORKER
    assert "".join(event.choices[0].text for _, event in events if isinstance(event, Delta)) == "Hello, world"
    assert events[-1][1] == Finished(Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=1))


async def test_the_view_shows_timings_attempts_usage_and_outlives_the_job_by_its_retention(
    queue: JobQueue, redis: Redis, settings: Settings
) -> None:
    job_id = await enqueue(queue)
    job = await claim_one(queue)
    await emit(queue, job, 1, "x")
    await succeed(queue, job)

    view = await queue.view(job_id)
    assert view is not None and view.state is JobState.SUCCEEDED
    assert view.started_ms is not None and view.first_token_ms is not None and view.finished_ms is not None
    assert view.created_ms <= view.started_ms <= view.first_token_ms <= view.finished_ms
    assert [(one.attempt, one.worker) for one in view.attempts] == [(1, WORKER)]
    assert view.usage == Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=1)
    for key in (queue.keys.job(job_id), queue.keys.log(job_id)):
        assert 0 < await redis.pttl(key) <= settings.job_retention_s * 1000
    assert not await redis.exists(queue.keys.of("body", job_id))


async def test_nothing_of_a_finished_job_stays_in_the_streams(queue: JobQueue, redis: Redis) -> None:
    for _ in range(3):
        await enqueue(queue)
    for job in await claim(queue):
        await succeed(queue, job)
    assert await redis.keys(queue.keys.of("queue") + "*") == []
    assert await ask(redis, "HLEN", queue.keys.of("own", WORKER)) == 0
    assert await redis.zcard(queue.keys.of("live")) == 0


async def test_the_native_pending_list_shows_what_runs_where(queue: JobQueue, redis: Redis) -> None:
    await enqueue(queue)
    await enqueue(queue)
    await claim_one(queue)
    (stream,) = await redis.keys(queue.keys.of("queue") + "*")
    pending = await redis.xpending(stream, "workers")
    assert pending["pending"] == 1
    assert pending["consumers"][0]["name"] == WORKER.encode()


async def test_an_unknown_job_has_no_view_no_events_and_cannot_be_cancelled(queue: JobQueue) -> None:
    unknown = new_job_id("t")
    assert await queue.view(unknown) is None
    assert await queue.read_events(unknown, None) == []
    assert await queue.cancel(unknown) is None


async def test_list_jobs_shows_live_jobs_newest_first(queue: JobQueue) -> None:
    ids = [await enqueue(queue) for _ in range(3)]
    job = await claim_one(queue)
    assert {view.id for view in await queue.list_jobs(10)} == set(ids)
    await succeed(queue, job)
    listed = await queue.list_jobs(10)
    assert {view.id for view in listed} == set(ids) - {job.id}
    assert [view.id for view in listed] == sorted((view.id for view in listed), reverse=True)
    assert len(await queue.list_jobs(1)) == 1


async def test_every_accepted_job_is_counted_once_where_it_ended(queue: JobQueue) -> None:
    for _ in range(4):
        await enqueue(queue)
    jobs = await claim(queue, rows=3)
    await succeed(queue, jobs[0])
    failure = encode_event(Failed(code="invalid_request", message="no"))
    await queue.finish(WORKER, jobs[1].id, 1, Outcome(JobState.FAILED, failure, error_code="invalid_request"))
    await queue.cancel(jobs[2].id)
    await queue.finish(WORKER, jobs[2].id, 1, Outcome(JobState.CANCELLED))
    assert await queue.counts() == {"accepted": 4, "succeeded": 1, "failed": 1, "cancelled": 1}
    assert sum((await queue.depths()).values()) == 1


async def test_outcomes_reach_the_recorder_until_they_are_acknowledged(
    queue: JobQueue, redis: Redis, settings: Settings
) -> None:
    job_id = await enqueue(queue, tenant="ann", priority=Priority.LOW)
    await succeed(queue, await claim_one(queue))
    blocking = connect(settings, "blocking")
    log = DoneLog(blocking, settings)

    (record,) = await log.read_done("rec-1", 10, 100)
    assert (record.job.id, record.job.state, record.job.tenant) == (job_id, JobState.SUCCEEDED, "ann")
    assert record.job.usage is not None and record.job.usage.completion_tokens == 4
    assert record.job.priority is Priority.LOW and record.job.model == "demo"
    assert await log.read_done("rec-1", 10, 1) == []
    assert (await redis.xpending(queue.keys.of("done"), "recorder"))["pending"] == 1

    await log.ack_done([record.entry_id])
    assert (await redis.xpending(queue.keys.of("done"), "recorder"))["pending"] == 0
    assert await redis.xlen(queue.keys.of("done")) == 0
    await blocking.aclose()


async def test_outcomes_left_by_a_dead_recorder_come_to_the_next_one(
    queue: JobQueue, redis: Redis, settings: Settings
) -> None:
    job_id = await enqueue(queue)
    await succeed(queue, await claim_one(queue))
    blocking = connect(settings, "blocking")
    await DoneLog(blocking, settings).read_done("dead", 10, 100)
    done = queue.keys.of("done")
    (entry,) = await redis.xpending_range(done, "recorder", "-", "+", 10)
    await redis.execute_command("XCLAIM", done, "recorder", "dead", 0, entry["message_id"], "IDLE", 60_000)

    (record,) = await DoneLog(blocking, settings).read_done("alive", 10, 100)
    assert record.job.id == job_id
    await blocking.aclose()


async def test_the_bell_wakes_exactly_one_waiting_worker(queue: JobQueue, redis: Redis) -> None:
    waiting = [asyncio.create_task(queue.wait_for_work(POOL, 8)) for _ in range(3)]

    async def all_blocked() -> bool:
        return (await redis.info("clients"))["blocked_clients"] == 3

    await wait_until(all_blocked)
    await enqueue(queue)
    done, pending = await asyncio.wait(waiting, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1 and len(pending) == 2
    for task in pending:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_claim_that_leaves_work_behind_rings_for_the_next_worker(queue: JobQueue, redis: Redis) -> None:
    for _ in range(2):
        await enqueue(queue)
    await queue.wait_for_work(POOL, 5)
    assert await ask(redis, "ZCARD", queue.keys.bell(POOL)) == 0
    await claim(queue, rows=1)
    assert await ask(redis, "ZCARD", queue.keys.bell(POOL)) == 1
    await queue.wait_for_work(POOL, 5)
    await claim(queue, "other:1", rows=1)
    assert await ask(redis, "ZCARD", queue.keys.bell(POOL)) == 0


async def test_a_bell_that_got_lost_is_rung_again_by_the_sweep(queue: JobQueue, redis: Redis) -> None:
    await enqueue(queue)
    await ask(redis, "DEL", queue.keys.bell(POOL))

    async def rung() -> bool:
        await queue.sweep()
        return await ask(redis, "ZCARD", queue.keys.bell(POOL)) == 1

    await wait_until(rung)


async def test_the_lifecycle_routes_queues_and_completes_a_request(
    lifecycle: Lifecycle, fleet: Fleet, queue: JobQueue
) -> None:
    await fleet.publish(VIEW, CARD)
    request = InferenceRequest(
        model="default", messages=(Message(role="user", content="Hi"),), sampling=SamplingParams(max_tokens=7), n=2
    )
    submitted = await lifecycle.submit(request, job_id=new_job_id("t"), tenant="ann", priority=Priority.NORMAL)
    assert submitted.created and submitted.pool == CARD.id

    (job,) = (await lifecycle.claim(WORKER, submitted.pool, 8, 8, 10_000)).jobs
    assert decode_request(job.body) == request and job.rows == 2
    await lifecycle.emit(WORKER, [(job.id, EventId(1, 1), delta("Hel"))])
    await lifecycle.emit(WORKER, [(job.id, EventId(1, 2), delta("lo"))])
    (choice,) = await lifecycle.progress(job.id)
    assert choice.text == "Hello" and choice.token_ids == tuple(b"Hello")
    assert await lifecycle.complete(WORKER, job, Usage(prompt_tokens=1, completion_tokens=5))
    assert await state_of(queue, job.id) is JobState.SUCCEEDED


async def test_a_failed_engine_row_is_retried_and_a_bad_request_is_not(lifecycle: Lifecycle, queue: JobQueue) -> None:
    first, second = await enqueue(queue), await enqueue(queue)
    jobs = {job.id: job for job in await claim(queue)}
    await lifecycle.fail(WORKER, jobs[first], "engine_failure", "row failed")
    await lifecycle.fail(WORKER, jobs[second], "context_length_exceeded", "too long", param="messages")

    async def claimed_again() -> list[ClaimedJob]:
        await queue.sweep()
        return await claim(queue)

    (again,) = await wait_until(claimed_again)
    assert again.id == first and again.attempt == 2 and (again.failures, again.lost) == (1, 0)
    assert await log_ids(queue, first) == ["1-0", "2-0"]
    view = await queue.view(second)
    assert view is not None and view.state is JobState.FAILED
    assert (view.error_code, view.error_message) == ("context_length_exceeded", "too long")
    (_, _), (_, last) = await queue.read_events(second, None)
    assert decode_event(last) == Failed(code="context_length_exceeded", message="too long", param="messages")


async def test_a_job_that_keeps_failing_becomes_a_dead_letter(
    lifecycle: Lifecycle, queue: JobQueue, redis: Redis, settings: Settings
) -> None:
    job_id = await enqueue(queue)
    for attempt in range(1, settings.max_attempts + 1):

        async def claimed() -> list[ClaimedJob]:
            await queue.sweep()
            return await claim(queue)

        (job,) = await wait_until(claimed)
        assert job.attempt == attempt
        await lifecycle.fail(WORKER, job, "engine_failure", "row failed")
    assert await state_of(queue, job_id) is JobState.FAILED
    ((_, letter),) = await redis.xrange(queue.keys.of("dead"))
    assert letter[b"id"].decode() == job_id and letter[b"code"] == b"engine_failure"
    assert await redis.get(queue.keys.of("body", job_id)) == b"body"  # kept for a replay


async def test_check_server_reports_version_and_policy(redis: Redis) -> None:
    facts = await check_server(redis, owned=True)
    assert facts.version >= (6, 2) and facts.maxmemory_policy == "noeviction" and facts.run_id


async def test_a_repeated_enqueue_of_the_same_id_is_one_job(queue: JobQueue) -> None:
    job = new_job()
    first, second = await queue.enqueue(job), await queue.enqueue(job)
    assert first == second and first.created
    assert (await queue.counts())["accepted"] == 1
    assert len(await claim(queue)) == 1
