"""What the queue must do, in Python: each operation runs on the real scripts and on this model, which compares answers.

Time does not pass here: leases, due times and deadlines are made past by writing their scores, then a sweep acts.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from redis.asyncio import Redis

from scheduler.job import ClaimedJob, JobState, Priority
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Outcome, ended_job
from scheduler.request import Usage
from scheduler.settings import Settings
from scheduler.tokens import SEQ_TERMINAL, EventId, Failed, Finished, encode_event
from tests.queue_cases import POOL, ask, delta, enqueue

WORKERS = ("a:1", "b:1", "c:1")
ROWS, KV = 6, 1000
HOUR_MS = 3_600_000
FINISHED = encode_event(Finished(Usage()))
FAILED = encode_event(Failed(code="internal_error", message="x"))
_WAITING = (JobState.QUEUED, JobState.SCHEDULED)
OUTCOMES = (
    Outcome(JobState.SUCCEEDED, FINISHED),
    Outcome(JobState.FAILED, FAILED, error_code="internal_error"),
    Outcome(JobState.FAILED, FAILED, error_code="engine_failure", dead=True),
    Outcome(JobState.CANCELLED),
    Outcome(JobState.SCHEDULED, retry_delay_ms=0, error_code="engine_failure"),
    Outcome(JobState.SCHEDULED, retry_delay_ms=HOUR_MS // 4, error_code="engine_failure"),
)


@dataclass
class Expected:
    """What the model knows of one job; `ends`: attempt and state of each terminal record."""

    priority: Priority
    durable: bool
    deadline: bool
    state: JobState = JobState.QUEUED
    attempt: int = 0
    owner: str | None = None
    lost: int = 0
    fails: int = 0
    cancel: JobState | None = None
    reclaimed: bool = False
    parked: bool = False
    dead: bool = False
    body: bool = True
    ended_by: tuple[str, int] | None = None
    seq: int = 0
    log: list[EventId] = field(default_factory=list[EventId])

    @property
    def waits(self) -> bool:
        return self.state in _WAITING

    @property
    def lane(self) -> str:
        """Where a queued job stands."""
        if self.lost >= 2:
            return "solo"
        if self.parked:
            return f"parked:{self.priority.value}"
        return "resume" if self.reclaimed else self.priority.value


class Model:
    """One shard, one pool. Operations take a number that chooses among what there is."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis
        self.queue = JobQueue(redis, settings)
        self.settings = settings
        self.jobs: dict[str, Expected] = {}
        self.handed: list[tuple[str, ClaimedJob]] = []  # every claim ever made: zombies act on old ones
        self.paused: set[Priority | None] = set()
        self.ends: Counter[tuple[str, int, JobState]] = Counter()
        self.accepted = 0

    def held(self, worker: str) -> dict[str, Expected]:
        return {job_id: job for job_id, job in self.jobs.items() if job.owner == worker}

    def pick(self, number: int) -> tuple[str, Expected]:
        job_id = list(self.jobs)[number % len(self.jobs)]
        return job_id, self.jobs[job_id]

    def _end(self, job_id: str, state: JobState, *, dead: bool = False) -> None:
        job = self.jobs[job_id]
        job.state, job.owner, job.cancel, job.dead = state, None, None, dead
        job.body = dead or (job.durable and state is not JobState.SUCCEEDED)
        job.log.append(EventId(job.attempt, SEQ_TERMINAL))
        self.ends[job_id, job.attempt, state] += 1

    def _go_on(self, job_id: str, *, preempted: bool = False) -> None:
        """Back to the queue, unless somebody ended it meanwhile."""
        job = self.jobs[job_id]
        if job.cancel is not None:
            self._end(job_id, job.cancel)
            return
        job.state, job.owner = JobState.QUEUED, None
        job.parked, job.reclaimed = preempted, job.lost >= 2 or not preempted

    async def enqueue(self, priority: Priority, tenant: int, *, due: bool, deadline: bool, durable: bool) -> None:
        now = int(time.time() * 1000)
        job_id = await enqueue(
            self.queue, priority=priority, tenant=f"t{tenant}", durable=durable, rows=1 + tenant, kv_tokens=150,
            not_before_ms=None if due else now + HOUR_MS // 4, deadline_ms=now + HOUR_MS if deadline else None,
        )  # fmt: skip
        self.jobs[job_id] = Expected(priority, durable, deadline, JobState.QUEUED if due else JobState.SCHEDULED)
        self.accepted += 1

    async def claim(self, worker: str, rows: int, kv: int) -> None:
        held_before = self.held(worker)
        got = await self.queue.claim(worker, POOL, rows, ROWS, kv, KV, may_preempt=True)
        assert sum(min(job.rows, ROWS) for job in got.jobs) <= rows
        for claimed in got.jobs:
            self._claimed(worker, claimed, alone=len(got.jobs) == 1 and not held_before)
        for job_id in got.preempt:
            assert held_before[job_id].priority is Priority.BATCH
            await self.hand_back(worker, self._last_claim(job_id), preempted=True)

    def _claimed(self, worker: str, claimed: ClaimedJob, *, alone: bool) -> None:
        job = self.jobs[claimed.id]
        assert job.state is JobState.QUEUED and claimed.attempt == job.attempt + 1
        assert (claimed.lost, claimed.failures, claimed.priority) == (job.lost, job.fails, job.priority)
        assert None not in self.paused and (job.priority not in self.paused or job.reclaimed)
        assert job.lost < 2 or alone
        job.state, job.attempt, job.owner, job.seq = JobState.RUNNING, claimed.attempt, worker, 0
        job.log.append(EventId(claimed.attempt, 0))
        self.handed.append((worker, claimed))

    def _last_claim(self, job_id: str) -> ClaimedJob:
        return next(claimed for _, claimed in reversed(self.handed) if claimed.id == job_id)

    def _owns(self, worker: str, claimed: ClaimedJob) -> bool:
        job = self.jobs[claimed.id]
        return job.owner == worker and job.attempt == claimed.attempt

    async def emit(self, worker: str, claimed: ClaimedJob) -> None:
        job, mine = self.jobs[claimed.id], self._owns(worker, claimed)
        at = EventId(claimed.attempt, job.seq + 1)
        result = await self.queue.emit(worker, [(claimed.id, at, delta("x"))])
        assert (claimed.id in result.fenced) == (not mine)
        assert result.cancelled == {job_id for job_id, other in self.held(worker).items() if other.cancel is not None}
        if mine:
            job.seq += 1
            job.log.append(at)

    async def finish(self, worker: str, claimed: ClaimedJob, outcome: Outcome) -> None:
        job, mine = self.jobs[claimed.id], self._owns(worker, claimed)
        stood = await self.queue.finish(worker, claimed.id, claimed.attempt, outcome)
        assert stood == (mine or job.ended_by == (worker, claimed.attempt))
        if not mine:
            return
        job.ended_by = (worker, claimed.attempt)
        if outcome.retry_delay_ms is None:
            ended = outcome.state
            if ended is JobState.CANCELLED and job.cancel is not None:
                ended = job.cancel
            self._end(claimed.id, ended, dead=outcome.dead)
            return
        job.fails += 1
        self._go_on(claimed.id)
        if job.state is JobState.QUEUED and outcome.retry_delay_ms:
            job.state = JobState.SCHEDULED

    async def hand_back(self, worker: str, claimed: ClaimedJob, *, preempted: bool = False) -> None:
        job, mine = self.jobs[claimed.id], self._owns(worker, claimed)
        stood = await self.queue.hand_back(worker, claimed.id, claimed.attempt, preempted=preempted)
        assert stood == (mine or job.ended_by == (worker, claimed.attempt))
        if mine:
            job.ended_by = (worker, claimed.attempt)
            self._go_on(claimed.id, preempted=preempted)

    def _lose(self, worker: str) -> None:
        for job_id, job in self.held(worker).items():
            job.lost += 1
            over = job.lost >= self.settings.max_lost or job.lost + job.fails >= self.settings.max_attempts
            if over and job.cancel is None:
                self._end(job_id, JobState.FAILED, dead=True)
            else:
                self._go_on(job_id)

    async def die(self, worker: str) -> None:
        assert await self.queue.expire_worker(worker) == len(self.held(worker))
        self._lose(worker)

    async def lapse(self, worker: str) -> None:
        """Its lease runs out, and a sweep sees it."""
        await ask(self.redis, "ZADD", self.queue.keys.of("lease"), "XX", 1, worker)
        await self._sweep()
        self._lose(worker)

    async def retire(self, worker: str) -> None:
        await self.queue.retire_worker(worker)
        for job_id, job in self.held(worker).items():
            job.ended_by = (worker, job.attempt)
            self._go_on(job_id)

    async def come_due(self, job_id: str) -> None:
        job = self.jobs[job_id]
        await ask(self.redis, "ZADD", self.queue.keys.of("due"), "XX", 1, job_id)
        await self._sweep()
        if job.state is JobState.SCHEDULED:
            job.state, job.reclaimed = JobState.QUEUED, job.attempt > 0 or job.lost >= 2

    async def pass_deadline(self, job_id: str) -> None:
        """Its deadline passes or, while it is queued without one, the queue's TTL, which ends no durable job."""
        job = self.jobs[job_id]
        if job.state.is_terminal or not (job.deadline or job.state is JobState.QUEUED):
            return
        if job.deadline:
            await ask(self.redis, "HSET", self.queue.keys.job(job_id), "deadline", 1)
        await ask(self.redis, "ZADD", self.queue.keys.of("deadlines"), 1, job_id)
        await self._sweep()
        if job.waits and job.durable and not job.deadline:
            return
        if job.waits:
            self._end(job_id, JobState.EXPIRED)
            view = await self.queue.view(job_id)
            assert view is not None
            assert view.error_code == ("deadline_exceeded" if job.deadline else "queue_timeout")
        elif job.cancel is None:
            job.cancel = JobState.EXPIRED

    async def _sweep(self) -> None:
        await ask(self.redis, "HDEL", self.queue.keys.of("sweep"), "at")  # as if it were time for one
        assert (await self.queue.sweep()).ran

    async def cancel(self, job_id: str) -> None:
        job = self.jobs[job_id]
        if job.waits:
            self._end(job_id, JobState.CANCELLED)
        elif job.state is JobState.RUNNING and job.cancel is None:
            job.cancel = JobState.CANCELLED
        assert await self.queue.cancel(job_id) is job.state

    async def reprioritise(self, job_id: str, priority: Priority) -> None:
        job = self.jobs[job_id]
        assert await self.queue.reprioritise(job_id, priority) is job.state
        if not job.state.is_terminal:
            job.priority = priority

    async def pause(self, what: Priority | None, on: bool) -> None:
        if on:
            await self.queue.pause(POOL, what)
            self.paused.add(what)
        else:
            await self.queue.resume(POOL, what)
            self.paused.discard(what)

    async def replay(self, job_id: str) -> None:
        job = self.jobs[job_id]
        if job.state.is_terminal and job.state is not JobState.SUCCEEDED and job.body:
            self.accepted += 1
            job.state, job.lost, job.fails, job.reclaimed, job.dead = JobState.QUEUED, 0, 0, False, False
            job.parked = False
            job.log.clear()
            job.deadline = job.deadline and int(await self._field(job_id, "deadline")) > 1
        assert await self.queue.replay(job_id) is job.state

    async def discard(self, job_id: str) -> None:
        job = self.jobs[job_id]
        kept = job.state.is_terminal and (job.body or job.dead)
        assert await self.queue.discard(job_id) == kept
        if kept:
            job.body = job.dead = False

    async def _field(self, job_id: str, name: str) -> bytes:
        return await ask(self.redis, "HGET", self.queue.keys.job(job_id), name)

    async def check_sums(self) -> None:
        """What waits, runs and has ended adds up to what was accepted, and depth counts to what the lanes hold."""
        waiting = Counter((POOL, job.priority) for job in self.jobs.values() if job.waits)
        assert await self.queue.depths() == waiting
        live = sum(not job.state.is_terminal for job in self.jobs.values())
        counts = await self.queue.counts()
        assert counts.pop("accepted", 0) == self.accepted == live + sum(counts.values())
        views = await self.queue.queues()
        due = Counter(job.priority for job in self.jobs.values() if job.state is JobState.SCHEDULED)
        scheduled = sum(due.values())
        assert Counter({view.priority: view.scheduled for view in views}) == due
        assert scheduled == await ask(self.redis, "ZCARD", self.queue.keys.of("due"))
        running = Counter(job.priority for job in self.jobs.values() if job.state is JobState.RUNNING)
        assert Counter({view.priority: view.running for view in views}) == running
        assert await self._entries() == (sum(waiting.values()) - scheduled, sum(running.values()))

    async def _entries(self) -> tuple[int, int]:
        """Undelivered and pending entries of all ready streams."""
        keys = [key async for key in self.redis.scan_iter(match=self.queue.keys.of("queue") + "*", count=1000)]
        async with self.redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.xlen(key)
                pipe.xpending(key, "workers")
            found = await pipe.execute()
        pending = sum(one["pending"] for one in found[1::2])
        return sum(found[0::2]) - pending, pending

    async def check_lanes(self) -> None:
        """Each queued job has one entry, in the lane that it belongs to by its class and by what became of it."""
        prefix = self.queue.keys.of("queue")
        found: dict[str, list[str]] = {}
        async for key in self.redis.scan_iter(match=prefix + "*", count=1000):
            lane = key.decode().removeprefix(f"{prefix}{POOL}:").rpartition(":")[0]
            for _, fields in await ask(self.redis, "XRANGE", key, "-", "+"):
                found.setdefault(next(iter(fields.values())).decode(), []).append(lane)
        queued = {job_id: [job.lane] for job_id, job in self.jobs.items() if job.state is JobState.QUEUED}
        assert {job_id: found.get(job_id) for job_id in queued} == queued

    async def check_jobs(self) -> None:
        for job_id, job in self.jobs.items():
            view = await self.queue.view(job_id)
            assert view is not None
            assert (view.state, view.attempt, view.priority) == (job.state, job.attempt, job.priority)
            assert [at for at, _ in await self.queue.read_events(job_id, None)] == job.log
            assert job.log == sorted(set(job.log))
        letters = {letter.job_id for letter in await self.queue.dead_letters(1000)}
        assert letters == {job_id for job_id, job in self.jobs.items() if job.dead}

    async def check_records(self) -> None:
        """One terminal record for the recorder per end, and nothing else."""
        seen: Counter[tuple[str, int, JobState]] = Counter()
        for _, fields in await ask(self.redis, "XRANGE", self.queue.keys.of("done"), "-", "+"):
            job = ended_job(fields)
            seen[job.id, job.attempt, job.state] += 1
        assert seen == self.ends

    async def drain(self) -> None:
        """Everyone leaves and nothing is paused; then workers finish what is left: every job ends."""
        for what in list(self.paused):
            await self.pause(what, False)
        for worker in WORKERS:
            await self.retire(worker)
        for job_id, job in self.jobs.items():
            if job.state is JobState.SCHEDULED:
                await self.come_due(job_id)
        while any(not job.state.is_terminal for job in self.jobs.values()):
            before = len(self.handed)
            await self.claim(WORKERS[0], ROWS, KV)
            assert len(self.handed) > before, "work is left and nobody gets it"
            for worker, claimed in self.handed[before:]:
                if self._owns(worker, claimed):
                    await self.finish(worker, claimed, OUTCOMES[0])
