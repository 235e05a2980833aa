"""The queue as Python sees it: one method per script, typed in and out. Called by lifecycle.py and by readers.

State lives in Redis only; this object keeps nothing but the number of a worker's claim that got no reply: its next
claim asks the same again, instead of leaving jobs with a worker that does not know of them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from scheduler.errors import IdempotencyMismatch, PoolDraining, QueueFull, QueueUnavailable, SpillwayError
from scheduler.job import Claimed, JobState, NewJob, Priority, created_ms_of
from scheduler.queue import scripts
from scheduler.queue.connection import connect
from scheduler.queue.keys import FULL_MS, idempotency_part, quoted
from scheduler.queue.reader import QueueReader
from scheduler.queue.records import (
    EMITTED,
    EmitResult,
    Enqueued,
    Outcome,
    SweepResult,
    claimed_job,
    packed_spec,
)
from scheduler.settings import Settings
from scheduler.tokens import EventId


class JobQueue(QueueReader):
    """All calls raise QueueUnavailable when Redis cannot be reached, and are safe to repeat after that."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        super().__init__(redis, settings)
        self._settings = settings
        self._keep_ms = settings.job_retention_s * 1000
        self._unanswered: dict[str, str] = {}
        self._blocking: Redis | None = None

    async def aclose(self) -> None:
        """Closes the connection that `wait_for_work` opened; the one passed in stays its owner's."""
        if self._blocking is not None:
            await self._blocking.aclose()
            self._blocking = None

    async def enqueue(self, job: NewJob) -> Enqueued:
        """Accepts a job; raises QueueFull (with `retry_after_s`), IdempotencyMismatch."""
        (reply,) = await self._enqueue([job])
        return _accepted(job, reply)

    async def enqueue_many(self, jobs: Sequence[NewJob]) -> list[Enqueued | SpillwayError]:
        """`enqueue` for several in one round trip; each is accepted or refused on its own, refusals are returned."""
        replies = await self._enqueue(jobs)
        return [_accepted_or_refused(job, reply) for job, reply in zip(jobs, replies, strict=True)]

    async def _enqueue(self, jobs: Sequence[NewJob]) -> list[Any]:
        shared = self._settings.queue_ttl_s * 1000, self._settings.queue_depth_cap
        try:
            return await self._calls.run_each(
                scripts.ENQUEUE, self._prefix, shared, [_words(job, shared[0]) for job in jobs]
            )
        except QueueUnavailable as error:
            if scripts.is_out_of_memory(error.__cause__):
                raise _full("Redis is out of memory", 5000) from error
            raise

    async def claim(
        self,
        worker: str,
        pool: str,
        capacity_rows: int,
        total_rows: int,
        kv_tokens: int,
        total_kv_tokens: int = 0,
        *,
        may_preempt: bool = False,
    ) -> Claimed:
        """Jobs for this worker, best first, as many as fit; renews (or starts) its lease also when there are none.

        `total_kv_tokens` 0: the worker has no KV budget, batch work is not held back for it. `may_preempt`: where
        higher work finds no room, also name the batch jobs to hand back for it.
        """
        nonce = self._unanswered.pop(worker, None) or secrets.token_hex(6)
        room = (capacity_rows, total_rows, kv_tokens, total_kv_tokens)
        rules = (int(may_preempt), self._settings.urgent_slack_ms, self._settings.batch_kv_threshold)
        try:
            reply = await self._run(
                scripts.CLAIM, worker, self._settings.lease_ttl_ms, nonce, quoted(pool), *room, *rules
            )
        except BaseException:
            self._unanswered[worker] = nonce
            raise
        rows, preempt, is_left = reply
        jobs = tuple(claimed_job(row) for row in rows)
        return Claimed(jobs, tuple(job_id.decode() for job_id in preempt), bool(is_left))

    async def wait_for_work(self, pool: str, timeout_s: float, *, full: bool = False) -> None:
        """Returns when the pool's bell rings for this caller (each ring wakes one), or after `timeout_s` (≤ 10 s).

        `full`: the caller has no room, but batch work to hand back; it hears of higher work only.
        """
        if self._blocking is None:
            self._blocking = connect(self._settings, "blocking")
        bell = self.keys.of("alarm" if full else "bell", quoted(pool))
        if full:
            await self._command("SET", self.keys.of("full", quoted(pool)), "1", "PX", FULL_MS)
        call = self._blocking.bzpopmin(bell, min(timeout_s, 9.0))
        await scripts.available(call, "wait_for_work")

    async def emit(self, worker: str, events: Sequence[tuple[str, EventId, bytes]]) -> EmitResult:
        """Logs and publishes at most one event per job, renews the lease; one round trip. No events: a heartbeat."""
        packed = [b"%b %d-%d %b" % (job_id.encode(), at[0], at[1], payload) for job_id, at, payload in events]
        reply = await self._run(scripts.EMIT, worker, self._settings.lease_ttl_ms, *packed)
        if reply == 1:
            return EMITTED
        lost, fenced, cancelled = reply
        return EmitResult(_ids(fenced), _ids(cancelled), bool(lost))

    async def finish(self, worker: str, job_id: str, attempt: int, outcome: Outcome) -> bool:
        """Ends this attempt; False: it was not this worker's any more, and nothing changed."""
        (stands,) = await self.finish_many(worker, [(job_id, attempt, outcome)])
        return stands

    async def finish_many(self, worker: str, endings: Sequence[tuple[str, int, Outcome]]) -> list[bool]:
        """`finish` for several (job id, attempt, outcome) in one round trip; each is fenced on its own.

        After an error some of them may stand already: repeat them all.
        """
        items = [(job_id, attempt, *_end_words(outcome)) for job_id, attempt, outcome in endings]
        replies = await self._calls.run_each(scripts.FINISH, self._prefix, (worker, self._keep_ms), items)
        return [reply == 1 for reply in replies]

    async def hand_back(self, worker: str, job_id: str, attempt: int, *, preempted: bool = False) -> bool:
        """Gives a running job back to be claimed next by anyone; counts as neither loss nor failure.

        `preempted`: it made room for a higher class, and is the first of its own class when that is served next.
        """
        reply = await self._run(scripts.HAND_BACK, worker, job_id, attempt, self._keep_ms, int(preempted))
        return reply == 1

    async def expire_worker(self, worker: str) -> int:
        """The worker's engine died: its jobs go on elsewhere now. Returns how many it held."""
        return int(await self._run(scripts.EXPIRE_WORKER, worker, *self._limits()))

    async def retire_worker(self, worker: str) -> None:
        """A clean exit: lease and traces go; what it still held is handed back."""
        await self._run(scripts.RETIRE_WORKER, worker, self._keep_ms)

    async def sweep(self) -> SweepResult:
        """Time's work; any process may call it at `sweep_interval_ms`, Redis limits the rate."""
        reply = await self._run(
            scripts.SWEEP, self._settings.sweep_interval_ms, self._settings.lease_ttl_ms, *self._limits()
        )
        return SweepResult(ran=False) if reply is None else SweepResult(True, *reply)

    async def cancel(self, job_id: str) -> JobState | None:
        """None: unknown. A waiting job is cancelled at once; RUNNING means that its worker was told."""
        reply = await self._run(scripts.CANCEL, job_id, self._keep_ms)
        return _state(reply)

    async def release(self, ended: Sequence[tuple[str, int]], keep_ms: int) -> int:
        """The outcomes of these (job id, attempt) are in SQL: their logs, and hashes that no retry needs, go after
        `keep_ms`. Returns how many were still at that end.
        """
        if not ended:
            return 0
        return int(await self._run(scripts.RELEASE, keep_ms, *(f"{job_id} {attempt}" for job_id, attempt in ended)))

    async def reprioritise(self, job_id: str, priority: Priority) -> JobState | None:
        """None: unknown. A waiting job goes to its new class's tail; a running one is charged to it from now on."""
        return _state(await self._run(scripts.REPRIORITISE, job_id, priority.value))

    async def pause(self, pool: str, priority: Priority | None = None) -> None:
        """No new work of the pool (or of one class) is claimed; the queue goes on accepting it.

        Reclaimed work of a paused class goes on; in a pool that is paused as a whole nothing is claimed.
        """
        await self._hold_up(pool, _held(priority), True)

    async def resume(self, pool: str, priority: Priority | None = None) -> None:
        """Undoes the same `pause`: that of the pool does not undo that of a class."""
        await self._hold_up(pool, _held(priority), False)

    async def drain(self, pool: str, on: bool) -> None:
        """A draining pool refuses new jobs (PoolDraining) and works off those that it has."""
        await self._hold_up(pool, "drain", on)

    async def replay(self, job_id: str) -> JobState | None:
        """Accepts a job once more that did not succeed: same id, next attempt, all tries, a new log.

        None: unknown. QUEUED: it waits (again). Any other state: it stays there, as it is alive or succeeded, or its
        body is not kept any more. Dead letters and durable jobs keep theirs for a day. Draining does not hinder it.
        """
        return _state(await self._run(scripts.REPLAY, job_id, created_ms_of(job_id)))

    async def discard(self, job_id: str) -> bool:
        """Gives up what a replay would need, also the dead letter; False: there was nothing."""
        return await self._run(scripts.DISCARD, job_id, self._keep_ms) == 1

    async def _hold_up(self, pool: str, what: str, on: bool) -> None:
        await self._run(scripts.HOLD_UP, quoted(pool), what, int(on))

    def _limits(self) -> tuple[int, int, int]:
        return self._keep_ms, self._settings.max_lost, self._settings.max_attempts


def _words(job: NewJob, queue_ttl_ms: int) -> tuple[scripts.Argument, ...]:
    """A job as the enqueue script reads it."""
    idem = "" if job.idempotency_key is None else idempotency_part(job.tenant, job.idempotency_key)
    return (
        job.id,
        quoted(job.pool),
        job.priority.value,
        quoted(job.tenant),
        job.body,
        idem,
        job.body_digest,
        _from_now(job.deadline_ms),
        _from_now(job.not_before_ms),
        created_ms_of(job.id),
        packed_spec(job, queue_ttl_ms),
    )


def _end_words(outcome: Outcome) -> tuple[scripts.Argument, ...]:
    """An outcome as the finish script reads it."""
    usage = outcome.usage
    return (
        outcome.state.value,
        outcome.payload,
        outcome.error_code,
        outcome.error_message[:2000],
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        -1 if outcome.retry_delay_ms is None else outcome.retry_delay_ms,
        int(outcome.dead),
    )


def _accepted(job: NewJob, reply: Any) -> Enqueued:
    match reply:
        case [b"created", _]:
            return Enqueued(job.id, created=True)
        case [b"attached", bytes(other)]:
            return Enqueued(other.decode(), created=False)
        case [b"mismatch", bytes(other)]:
            raise IdempotencyMismatch(
                f"This Idempotency-Key was used with another body (job {other.decode()}); use a new key"
            )
        case [b"memory", int(retry_ms)]:
            raise _full("Redis is short of memory", retry_ms)
        case [b"full", int(retry_ms)]:
            raise _full(f"too many {job.priority} jobs of {job.pool} wait", retry_ms)
        case [b"draining"]:
            raise PoolDraining(f"{job.pool} takes no new jobs, it is being drained; use another model, or retry later")
        case _:
            raise AssertionError(f"unexpected reply of enqueue: {reply!r}")


def _state(reply: bytes | None) -> JobState | None:
    return None if reply is None else JobState(reply.decode())


def _held(priority: Priority | None) -> str:
    return "*" if priority is None else priority.value


def _accepted_or_refused(job: NewJob, reply: Any) -> Enqueued | SpillwayError:
    try:
        return _accepted(job, reply)
    except SpillwayError as error:
        return error


def _from_now(at_ms: int | None) -> int:
    """A time as Redis is told of it: ms from now, as its clock and ours may disagree; 0 where there is none."""
    return 0 if at_ms is None else max(1, at_ms - int(time.time() * 1000))


def _full(why: str, retry_ms: int) -> QueueFull:
    return QueueFull(f"The queue is full ({why}); retry in {retry_ms / 1000:.0f} s", retry_after_s=retry_ms / 1000)


def _ids(names: Sequence[bytes]) -> frozenset[str]:
    return frozenset(name.decode() for name in names)


__all__ = ["EmitResult", "Enqueued", "JobQueue", "Outcome", "SweepResult"]
