"""The only module that changes a job's state: submit, claim, emit, end, hand back, cancel.

It joins the pure deciders (routing, retry) to the queue's scripts. The API submits and cancels; consumers do the rest.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler import retry, routing
from scheduler.errors import BY_CODE, NoModelYet, UnknownModel
from scheduler.job import Claimed, ClaimedJob, JobState, NewJob, Priority
from scheduler.model_card import ModelCard
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import NO_USAGE, EmitResult, Outcome
from scheduler.request import InferenceRequest, Usage, encode_request
from scheduler.settings import Settings
from scheduler.tokens import ChoiceDelta, Delta, EventId, Failed, Finished, decode_event, encode_event, merge_deltas

_CARDS_FRESH_S = 1.0
_BYTES_PER_TOKEN = 4
_GUESSED_OUTPUT_TOKENS = 256  # what a job without max_tokens is charged until it ends
_LOG_CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Submitted:
    """`created` False: an earlier job with the same Idempotency-Key answers; follow `job_id`."""

    job_id: str
    created: bool
    pool: str


class Lifecycle:
    """One per process. All calls raise QueueUnavailable when Redis cannot be reached, and may be repeated then."""

    def __init__(self, queue: JobQueue, fleet: Fleet, settings: Settings) -> None:
        self._queue = queue
        self._fleet = fleet
        self._limits = retry.Limits.of(settings)
        self._rng = random.Random()
        self._cards: list[ModelCard] = []
        self._cards_at = float("-inf")

    async def submit(
        self,
        request: InferenceRequest,
        *,
        job_id: str,
        tenant: str,
        priority: Priority,
        deadline_ms: int | None = None,
        not_before_ms: int | None = None,
        idempotency_key: str | None = None,
        body_digest: str = "",
        durable: bool = False,
        batch_id: str = "",
    ) -> Submitted:
        """Routes and queues a request under an id the caller already listens to; times are Unix ms.

        `durable`: the job has a SQL row. An id that is known already stays as it is, and is reported as created.
        Raises UnknownModel, NoModelYet, QueueFull, PoolDraining, IdempotencyMismatch.
        """
        target, body = await self._plan(request.model), encode_request(request)
        prompt_tokens, output_tokens = _expected_tokens(request, len(body))
        job = NewJob(
            id=job_id,
            pool=target.pool,
            priority=priority,
            tenant=tenant,
            cost_tokens=prompt_tokens + 2 * output_tokens,
            kv_tokens=prompt_tokens + output_tokens,
            body=body,
            rows=request.n,
            deadline_ms=deadline_ms,
            not_before_ms=not_before_ms,
            idempotency_key=idempotency_key,
            body_digest=body_digest,
            model=target.card.id,
            durable=durable,
            batch_id=batch_id,
        )
        enqueued = await self._queue.enqueue(job)
        return Submitted(enqueued.job_id, enqueued.created, target.pool)

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
        """Jobs for this worker, and with `may_preempt` its batch jobs to hand back; renews or starts its lease."""
        return await self._queue.claim(
            worker, pool, capacity_rows, total_rows, kv_tokens, total_kv_tokens, may_preempt=may_preempt
        )

    async def wait_for_work(self, pool: str, timeout_s: float, *, full: bool = False) -> None:
        """Until this worker is the one to look for work in the pool, at most `timeout_s` (≤ 9 s).

        `full`: it has no room, but batch work that it would hand back for higher work.
        """
        await self._queue.wait_for_work(pool, timeout_s, full=full)

    async def emit(self, worker: str, events: Sequence[tuple[str, EventId, bytes]]) -> EmitResult:
        """Makes events visible, at most one per job, and renews the lease; without events a heartbeat."""
        return await self._queue.emit(worker, events)

    async def progress(self, job_id: str) -> tuple[ChoiceDelta, ...]:
        """What earlier attempts made visible, merged per choice, by choice index: a takeover continues after it."""
        total = Delta(choices=())
        after: EventId | None = None
        while rows := await self._queue.read_events(job_id, after, _LOG_CHUNK):
            after = rows[-1][0]
            for _, payload in rows:
                event = decode_event(payload)
                if isinstance(event, Delta):
                    total = merge_deltas(total, event)
            if len(rows) < _LOG_CHUNK:
                break
        return tuple(sorted(total.choices, key=lambda choice: choice.index))

    async def complete(self, worker: str, job: ClaimedJob, usage: Usage) -> bool:
        """The job has its answer. False: it was not this worker's any more."""
        return await self._queue.finish(worker, job.id, job.attempt, self.success(usage))

    async def end(self, worker: str, endings: Sequence[tuple[ClaimedJob, Outcome]]) -> None:
        """Several attempts end, by `success` or `failure`, in one round trip; those of other workers stay as they are.

        After QueueUnavailable some of them may have ended: repeat them all.
        """
        await self._queue.finish_many(worker, [(job.id, job.attempt, outcome) for job, outcome in endings])

    def success(self, usage: Usage, after_seq: int | None = None) -> Outcome:
        """How a job ends that has its answer; `after_seq`: the last number that this attempt gave to an event."""
        return Outcome(JobState.SUCCEEDED, encode_event(Finished(usage, after_seq)), usage)

    async def fail(
        self,
        worker: str,
        job: ClaimedJob,
        code: str,
        message: str,
        param: str | None = None,
        usage: Usage = NO_USAGE,
    ) -> bool:
        """The attempt failed: a retry, or the job's end. False: it was not this worker's any more."""
        outcome = self.failure(job, code, message, param, usage)
        return await self._queue.finish(worker, job.id, job.attempt, outcome)

    def failure(
        self, job: ClaimedJob, code: str, message: str, param: str | None = None, usage: Usage = NO_USAGE
    ) -> Outcome:
        """How an attempt ends that failed: a retry, or the job's end."""
        decision = retry.decide(code, job.attempt, job.failures + job.lost, self._limits, self._rng)
        match decision:
            case retry.Retry(delay_ms):
                return Outcome(JobState.SCHEDULED, retry_delay_ms=delay_ms, error_code=code, error_message=message)
            case retry.GiveUp(_, exhausted):
                state = _END_STATES.get(code, JobState.FAILED)
                payload = encode_event(Failed(code=code, message=message, param=param))
                return Outcome(state, payload, usage, error_code=code, error_message=message, dead=exhausted)

    async def cancelled(self, worker: str, job: ClaimedJob, usage: Usage = NO_USAGE) -> bool:
        """The worker stopped a job that emit reported as cancelled (by its client or by its deadline)."""
        return await self._queue.finish(worker, job.id, job.attempt, Outcome(JobState.CANCELLED, usage=usage))

    async def hand_back(self, worker: str, job: ClaimedJob, *, preempted: bool = False) -> bool:
        """A worker that drains, or makes room for a higher class, gives a job back; the attempt is not burnt."""
        return await self._queue.hand_back(worker, job.id, job.attempt, preempted=preempted)

    async def worker_died(self, worker: str) -> int:
        """The worker's engine is gone: its jobs go on elsewhere at once. Returns how many it held."""
        return await self._queue.expire_worker(worker)

    async def retire(self, worker: str) -> None:
        """A worker's clean exit, after hand_back or completion of its jobs."""
        await self._queue.retire_worker(worker)

    async def cancel(self, job_id: str) -> JobState | None:
        """None: unknown job. CANCELLED: it is over. RUNNING: its worker stops it with its next emit."""
        return await self._queue.cancel(job_id)

    async def reprioritise(self, job_id: str, priority: Priority) -> JobState | None:
        """None: unknown job; a terminal state: too late. Else the job has its new class from now on."""
        return await self._queue.reprioritise(job_id, priority)

    async def replay(self, job_id: str) -> JobState | None:
        """Accepts a job that did not succeed once more. QUEUED: it waits again; see JobQueue.replay for the others."""
        return await self._queue.replay(job_id)

    async def discard(self, job_id: str) -> bool:
        """A dead letter, or the body of an ended job, is given up; False: there was none."""
        return await self._queue.discard(job_id)

    async def pause(self, pool: str, priority: Priority | None = None) -> None:
        """Nothing new of the pool (or class) is claimed; it goes on accepting."""
        await self._queue.pause(pool, priority)

    async def resume(self, pool: str, priority: Priority | None = None) -> None:
        """Undoes the same pause."""
        await self._queue.resume(pool, priority)

    async def drain(self, pool: str, on: bool) -> None:
        """The pool refuses new jobs, or takes them again; those that it has are worked off."""
        await self._queue.drain(pool, on)

    async def _plan(self, model: str) -> routing.Target:
        if time.monotonic() - self._cards_at <= _CARDS_FRESH_S:
            try:
                return routing.plan(model, self._cards)
            except (NoModelYet, UnknownModel):
                pass  # its worker may have started since: look again
        self._cards, self._cards_at = await self._fleet.models(), time.monotonic()
        return routing.plan(model, self._cards)


_END_STATES = {
    "cancelled": JobState.CANCELLED,
    "deadline_exceeded": JobState.EXPIRED,
    "queue_timeout": JobState.EXPIRED,
}
assert _END_STATES.keys() <= BY_CODE.keys()


def _expected_tokens(request: InferenceRequest, body_bytes: int) -> tuple[int, int]:
    """Estimates of prompt and output tokens: the worker tokenizes, so a byte count has to do until the job ends."""
    wanted = request.sampling.max_tokens
    each = _GUESSED_OUTPUT_TOKENS if wanted is None else min(wanted, _GUESSED_OUTPUT_TOKENS)
    return max(1, body_bytes // _BYTES_PER_TOKEN), max(1, each) * max(1, request.n)
