"""The queue as Python sees it: one method per script, typed in and out. Called by lifecycle.py and by readers.

State lives in Redis only; this object keeps nothing but the number of a worker's claim that got no reply: its next
claim asks the same again, instead of leaving jobs with a worker that does not know of them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, cast

from redis.asyncio import Redis

from scheduler.errors import IdempotencyMismatch, QueueFull, QueueUnavailable
from scheduler.job import ClaimedJob, JobState, JobView, NewJob, Priority
from scheduler.queue import scripts
from scheduler.queue.connection import connect
from scheduler.queue.keys import Keys, idempotency_part, quoted, unquoted
from scheduler.queue.records import (
    EMITTED,
    EmitResult,
    Enqueued,
    Outcome,
    SweepResult,
    claimed_job,
    job_view,
)
from scheduler.settings import Settings
from scheduler.tokens import EventId, Failed, encode_event

# Terminal events that the queue itself writes, in the order that `ends_from` (ending.lua) reads them.
_ENDS: tuple[str | bytes, ...] = tuple(
    part
    for code, message in (
        ("cancelled", "The job was cancelled."),
        ("deadline_exceeded", "The job's deadline passed before it was done."),
        ("worker_lost", "The job's worker died too often while it ran; it is kept as a dead letter for a day."),
    )
    for part in (code, message, encode_event(Failed(code=code, message=message)))
)


class JobQueue:
    """All calls raise QueueUnavailable when Redis cannot be reached, and are safe to repeat after that."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self._settings = settings
        self.keys = Keys(settings.shard)
        self._prefix = self.keys.prefix
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
        idem = "" if job.idempotency_key is None else idempotency_part(job.tenant, job.idempotency_key)
        try:
            reply = await self._run(
                scripts.ENQUEUE,
                job.id,
                quoted(job.pool),
                job.priority.value,
                quoted(job.tenant),
                job.body,
                idem,
                job.body_digest,
                job.cost_tokens,
                job.kv_tokens or job.cost_tokens,
                job.rows,
                _from_now(job.deadline_ms),
                _from_now(job.not_before_ms),
                self._settings.queue_ttl_s * 1000,
                self._settings.queue_depth_cap,
                job.model,
                int(job.durable),
                job.batch_id,
            )
        except QueueUnavailable as error:
            if scripts.is_out_of_memory(error.__cause__):
                raise _full("Redis is out of memory", 5000) from error
            raise
        return _accepted(job, reply)

    async def claim(
        self, worker: str, pool: str, capacity_rows: int, total_rows: int, kv_tokens: int
    ) -> list[ClaimedJob]:
        """Jobs for this worker, best first, as many as fit; renews (or starts) its lease also when there are none."""
        nonce = self._unanswered.pop(worker, None) or secrets.token_hex(6)
        room = (capacity_rows, total_rows, kv_tokens)
        try:
            reply = await self._run(scripts.CLAIM, worker, self._settings.lease_ttl_ms, nonce, quoted(pool), *room)
        except BaseException:
            self._unanswered[worker] = nonce
            raise
        return [claimed_job(row) for row in reply]

    async def wait_for_work(self, pool: str, timeout_s: float) -> None:
        """Returns when the pool's bell rings for this caller (each ring wakes one), or after `timeout_s` (≤ 10 s)."""
        if self._blocking is None:
            self._blocking = connect(self._settings, "blocking")
        call = self._blocking.bzpopmin(self.keys.bell(pool), min(timeout_s, 9.0))
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
        usage = outcome.usage
        reply = await self._run(
            scripts.FINISH,
            worker,
            job_id,
            attempt,
            outcome.state.value,
            outcome.payload,
            outcome.error_code,
            outcome.error_message[:2000],
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_tokens,
            -1 if outcome.retry_delay_ms is None else outcome.retry_delay_ms,
            int(outcome.dead),
            self._keep_ms,
            *_ENDS,
        )
        return reply == 1

    async def hand_back(self, worker: str, job_id: str, attempt: int) -> bool:
        """Gives a running job back to be claimed next by anyone; counts as neither loss nor failure."""
        return await self._run(scripts.HAND_BACK, worker, job_id, attempt, self._keep_ms, *_ENDS) == 1

    async def expire_worker(self, worker: str) -> int:
        """The worker's engine died: its jobs go on elsewhere now. Returns how many it held."""
        return int(await self._run(scripts.EXPIRE_WORKER, worker, *self._limits(), *_ENDS))

    async def retire_worker(self, worker: str) -> None:
        """A clean exit: lease and traces go; what it still held is handed back."""
        await self._run(scripts.RETIRE_WORKER, worker, self._keep_ms, *_ENDS)

    async def sweep(self) -> SweepResult:
        """Time's work; any process may call it at `sweep_interval_ms`, Redis limits the rate."""
        reply = await self._run(
            scripts.SWEEP, self._settings.sweep_interval_ms, self._settings.lease_ttl_ms, *self._limits(), *_ENDS
        )
        return SweepResult(ran=False) if reply is None else SweepResult(True, *reply)

    async def cancel(self, job_id: str) -> JobState | None:
        """None: unknown. A waiting job is cancelled at once; RUNNING means that its worker was told."""
        reply = await self._run(scripts.CANCEL, job_id, self._keep_ms, *_ENDS)
        return None if reply is None else JobState(reply.decode())

    async def release(self, ended: Sequence[tuple[str, int]], keep_ms: int) -> int:
        """The outcomes of these (job id, attempt) are in SQL: their logs, and hashes that no retry needs, go after
        `keep_ms`. Returns how many were still at that end.
        """
        if not ended:
            return 0
        return int(await self._run(scripts.RELEASE, keep_ms, *(f"{job_id} {attempt}" for job_id, attempt in ended)))

    async def known(self, job_ids: Sequence[str]) -> set[str]:
        """Which of these have a hash: waiting, running, or ended not long ago."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.execute_command("EXISTS", self.keys.job(job_id))  # pyright: ignore[reportUnknownMemberType]
            found = cast(list[int], await scripts.available(pipe.execute(), "known"))
        return {job_id for job_id, exists in zip(job_ids, found, strict=True) if exists}

    async def view(self, job_id: str) -> JobView | None:
        fields = await self._command("HGETALL", self.keys.job(job_id))
        return job_view(job_id, fields) if fields else None

    async def read_events(self, job_id: str, after: EventId | None, limit: int = 1000) -> list[tuple[EventId, bytes]]:
        """The job's log after an id, oldest first; payloads as logged."""
        start = "-" if after is None else f"({after}"
        rows = await self._command("XRANGE", self.keys.log(job_id), start, "+", "COUNT", limit)
        return [(EventId.parse(at), fields[b"p"]) for at, fields in rows]

    async def list_jobs(self, limit: int) -> list[JobView]:
        """Jobs that are not terminal, newest first."""
        ids = [name.decode() for name in await self._command("ZREVRANGE", self.keys.of("live"), 0, max(0, limit - 1))]
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.execute_command("HGETALL", self.keys.job(job_id))  # pyright: ignore[reportUnknownMemberType]
            rows = cast(list[dict[bytes, bytes]], await scripts.available(pipe.execute(), "list_jobs"))
        return [job_view(job_id, fields) for job_id, fields in zip(ids, rows, strict=True) if fields]

    async def depths(self) -> dict[tuple[str, Priority], int]:
        """Waiting jobs (queued and scheduled) per pool and class; what is not listed is 0."""
        found = await self._command("HGETALL", self.keys.of("depth"))
        depths: dict[tuple[str, Priority], int] = {}
        for field, count in found.items():
            pool, _, class_ = field.decode().rpartition("|")
            depths[unquoted(pool), Priority(class_)] = int(count)
        return depths

    async def counts(self) -> dict[str, int]:
        """`accepted`, and one per terminal state, since the shard began."""
        found = await self._command("HGETALL", self.keys.of("count"))
        return {name.decode(): int(count) for name, count in found.items()}

    def _limits(self) -> tuple[int, int, int]:
        return self._keep_ms, self._settings.max_lost, self._settings.max_attempts

    async def _run(self, script: scripts.Script, *args: scripts.Argument) -> Any:
        return await script.run(self._redis, self._prefix, *args)

    async def _command(self, *args: str | int) -> Any:
        return await scripts.available(scripts.raw(self._redis)(*args), str(args[0]))


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
        case _:
            raise AssertionError(f"unexpected reply of enqueue: {reply!r}")


def _from_now(at_ms: int | None) -> int:
    """A time as Redis is told of it: ms from now, as its clock and ours may disagree; 0 where there is none."""
    return 0 if at_ms is None else max(1, at_ms - int(time.time() * 1000))


def _full(why: str, retry_ms: int) -> QueueFull:
    return QueueFull(f"The queue is full ({why}); retry in {retry_ms / 1000:.0f} s", retry_after_s=retry_ms / 1000)


def _ids(names: Sequence[bytes]) -> frozenset[str]:
    return frozenset(name.decode() for name in names)


__all__ = ["EmitResult", "Enqueued", "JobQueue", "Outcome", "SweepResult"]
