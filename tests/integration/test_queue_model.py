"""The scripts against a model in Python: whatever workers and clients do in whatever order, the invariants hold.

An accepted job reaches exactly one terminal record; nothing of an older attempt follows a newer one; what waits, runs
and has ended adds up to what was accepted; only the owner of an attempt changes a job.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import redis as sync_redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from scheduler.job import ClaimedJob, JobState, Priority
from scheduler.queue.connection import connect
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Outcome
from scheduler.request import Usage
from scheduler.settings import Settings
from scheduler.tokens import SEQ_TERMINAL, EventId, Failed, Finished, encode_event
from tests.queue_cases import POOL, delta, enqueue

WORKERS = ("a:1", "b:1", "c:1")
FINISHED = encode_event(Finished(Usage()))
FAILED = encode_event(Failed(code="internal_error", message="x"))


@dataclass
class Expected:
    """What the model knows of one job."""

    state: JobState = JobState.QUEUED
    attempt: int = 0
    owner: str | None = None
    lost: int = 0
    fails: int = 0
    cancel: bool = False
    ended_by: tuple[str, int] | None = None
    seq: int = 0
    log: list[EventId] = field(default_factory=list[EventId])

    def end(self, state: JobState) -> None:
        self.state, self.owner = state, None
        self.log.append(EventId(self.attempt, SEQ_TERMINAL))

    def go_on(self) -> None:
        """Back to the queue, unless it was cancelled meanwhile."""
        if self.cancel:
            self.end(JobState.CANCELLED)
        else:
            self.state, self.owner = JobState.QUEUED, None


class Model:
    """Runs each operation on the queue and on the model, and compares what they say."""

    def __init__(self, queue: JobQueue, settings: Settings) -> None:
        self.queue = queue
        self.settings = settings
        self.jobs: dict[str, Expected] = {}
        self.handed: list[tuple[str, ClaimedJob]] = []  # every claim ever made: zombies act on old ones

    def held(self, worker: str) -> list[Expected]:
        return [job for job in self.jobs.values() if job.owner == worker]

    def owns(self, worker: str, claimed: ClaimedJob) -> bool:
        job = self.jobs[claimed.id]
        return job.owner == worker and job.attempt == claimed.attempt

    async def enqueue(self, number: int) -> None:
        priority = tuple(Priority)[number % 4]
        self.jobs[await enqueue(self.queue, priority=priority, tenant=f"t{number % 3}")] = Expected()

    async def claim(self, number: int) -> None:
        worker = WORKERS[number % 3]
        held_before = len(self.held(worker))
        rows = 1 + number % 4
        got = (await self.queue.claim(worker, POOL, rows, 8, 10**6)).jobs
        assert len(got) <= rows
        for claimed in got:
            job = self.jobs[claimed.id]
            assert job.state is JobState.QUEUED and claimed.attempt == job.attempt + 1
            assert (claimed.lost, claimed.failures) == (job.lost, job.fails)
            if job.lost >= 2:
                assert len(got) == 1 and held_before == 0
            job.state, job.attempt, job.owner, job.seq = JobState.RUNNING, claimed.attempt, worker, 0
            job.log.append(EventId(claimed.attempt, 0))
            self.handed.append((worker, claimed))

    async def emit(self, number: int) -> None:
        worker, claimed = self.handed[number % len(self.handed)]
        job, mine = self.jobs[claimed.id], self.owns(worker, claimed)
        at = EventId(claimed.attempt, job.seq + 1)
        result = await self.queue.emit(worker, [(claimed.id, at, delta("x"))])
        assert (claimed.id in result.fenced) == (not mine)
        assert result.cancelled == {name for name, other in self.jobs.items() if other.owner == worker and other.cancel}
        if mine:
            job.seq += 1
            job.log.append(at)

    async def finish(self, number: int) -> None:
        worker, claimed = self.handed[number % len(self.handed)]
        job, mine = self.jobs[claimed.id], self.owns(worker, claimed)
        outcome = (
            Outcome(JobState.SUCCEEDED, FINISHED),
            Outcome(JobState.FAILED, FAILED, error_code="internal_error"),
            Outcome(JobState.SCHEDULED, retry_delay_ms=0, error_code="engine_failure"),
        )[number % 3]
        stood = await self.queue.finish(worker, claimed.id, claimed.attempt, outcome)
        assert stood == (mine or job.ended_by == (worker, claimed.attempt))
        if not mine:
            return
        job.ended_by = (worker, claimed.attempt)
        if outcome.retry_delay_ms is None:
            job.end(outcome.state)
        else:
            job.fails += 1
            job.go_on()

    async def hand_back(self, number: int) -> None:
        worker, claimed = self.handed[number % len(self.handed)]
        job, mine = self.jobs[claimed.id], self.owns(worker, claimed)
        stood = await self.queue.hand_back(worker, claimed.id, claimed.attempt)
        assert stood == (mine or job.ended_by == (worker, claimed.attempt))
        if mine:
            job.ended_by = (worker, claimed.attempt)
            job.go_on()

    async def die(self, number: int) -> None:
        worker = WORKERS[number % 3]
        held = self.held(worker)
        assert await self.queue.expire_worker(worker) == len(held)
        for job in held:
            job.lost += 1
            over = job.lost >= self.settings.max_lost or job.lost + job.fails >= self.settings.max_attempts
            if over and not job.cancel:
                job.end(JobState.FAILED)
            else:
                job.go_on()

    async def retire(self, number: int) -> None:
        worker = WORKERS[number % 3]
        await self.queue.retire_worker(worker)
        for job in self.held(worker):
            job.ended_by = (worker, job.attempt)
            job.go_on()

    async def cancel(self, number: int) -> None:
        job_id = list(self.jobs)[number % len(self.jobs)]
        job = self.jobs[job_id]
        if job.state is JobState.QUEUED:
            job.end(JobState.CANCELLED)
        elif job.state is JobState.RUNNING:
            job.cancel = True
        assert await self.queue.cancel(job_id) is job.state

    async def check(self) -> None:
        waiting = sum(job.state is JobState.QUEUED for job in self.jobs.values())
        assert sum((await self.queue.depths()).values()) == waiting
        for job_id, job in self.jobs.items():
            view = await self.queue.view(job_id)
            assert view is not None and (view.state, view.attempt) == (job.state, job.attempt)
            assert [at for at, _ in await self.queue.read_events(job_id, None)] == job.log
            assert job.log == sorted(set(job.log))

    async def drain(self) -> None:
        """Everyone dies, then one worker at a time finishes what is left: every job ends."""
        for number in range(3):
            await self.retire(number)
        number = 0
        while any(not job.state.is_terminal for job in self.jobs.values()):
            before = len(self.handed)
            await self.claim(3 + 12 * number)
            number += 1
            assert len(self.handed) > before, "work is left and nobody gets it"
            for index in range(before, len(self.handed)):
                worker, claimed = self.handed[index]
                assert await self.queue.finish(
                    worker, claimed.id, claimed.attempt, Outcome(JobState.SUCCEEDED, FINISHED)
                )
                self.jobs[claimed.id].end(JobState.SUCCEEDED)

    async def check_end(self) -> None:
        counts = await self.queue.counts()
        assert counts.pop("accepted", 0) == sum(counts.values()) == len(self.jobs)


OPERATIONS = ("enqueue", "claim", "emit", "emit", "finish", "hand_back", "die", "retire", "cancel")


async def play(settings: Settings, steps: list[tuple[str, int]]) -> None:
    client = connect(settings, "command")
    try:
        await client.flushall()
        model = Model(JobQueue(client, settings), settings)
        await model.enqueue(0)
        await model.claim(0)
        for operation, number in steps:
            await getattr(model, operation)(number)
        await model.check()
        await model.drain()
        await model.check()
        await model.check_end()
    finally:
        await client.aclose()


@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 10_000)), max_size=60))
@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_order_of_operations_keeps_the_invariants(settings: Settings, steps: list[tuple[str, int]]) -> None:
    asyncio.run(play(settings, steps))
    with sync_redis.Redis.from_url(settings.redis_url or "") as client:
        left = [key for key in client.scan_iter() if b":q:" in key or b":act:" in key or b":own:" in key]
    assert not left
