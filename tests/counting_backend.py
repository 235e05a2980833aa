"""A backend without a model that counts aloud, a number per step, and goes on where an earlier attempt stopped."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from scheduler.job import ClaimedJob
from scheduler.lifecycle import Lifecycle
from scheduler.model_card import ModelCard
from scheduler.queue.connection import connect
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.request import Usage, decode_request
from scheduler.settings import Settings
from scheduler.tokens import ChoiceDelta
from tests.worker_stage import MODEL
from workers.backend import BackendDied, BackendEvent, BackendStatus, Capacity, ChoiceProgress, JobDone, JobProgress
from workers.consumer import Consumer
from workers.shutdown import Shutdown


class CountingBackend:
    """Every held job gains one number per `step_s`, up to its `max_tokens`; `die` ends it like a lost engine."""

    def __init__(self, *, rows: int = 64, step_s: float = 0.01) -> None:
        self._card = ModelCard(id=MODEL, context_tokens=10_000, max_rows=rows)
        self._step_s = step_s
        self._left: dict[tuple[str, int], range] = {}
        self._dead = False

    def die(self) -> None:
        self._dead = True

    async def start(self) -> ModelCard:
        self._dead = False
        return self._card

    def capacity(self) -> Capacity:
        return Capacity(rows=self._card.max_rows - len(self._left), kv_tokens=10**9)

    def status(self) -> BackendStatus:
        return BackendStatus(pid=os.getpid(), engine_pid=None, kind="counting", busy_rows=len(self._left))

    async def submit(self, job: ClaimedJob, progress: tuple[ChoiceProgress, ...]) -> None:
        limit = decode_request(job.body).sampling.max_tokens
        assert limit is not None
        self._left[job.id, job.attempt] = range(sum(len(choice.token_ids) for choice in progress), limit)

    async def cancel(self, job_id: str, attempt: int) -> None:
        self._left.pop((job_id, attempt), None)

    async def events(self) -> list[BackendEvent]:
        while not self._dead:
            await asyncio.sleep(self._step_s)
            events = [event for key in list(self._left) for event in self._step(*key)]
            if events:
                return events
        raise BackendDied("as told")

    async def close(self) -> None:
        self._left.clear()

    def _step(self, job_id: str, attempt: int) -> list[BackendEvent]:
        left = self._left[job_id, attempt]
        if not left:
            del self._left[job_id, attempt]
            return [JobDone(job_id, attempt, Usage(completion_tokens=left.stop))]
        self._left[job_id, attempt] = left[1:]
        reason = "length" if len(left) == 1 else None
        return [JobProgress(job_id, attempt, (ChoiceDelta(0, (left[0],), f"[{left[0]}]", reason),))]


@asynccontextmanager
async def consuming(backend: CountingBackend, settings: Settings) -> AsyncIterator[Shutdown]:
    """A worker around the backend, with connections of its own; at the end it is asked to drain."""
    redis: Redis = connect(settings, "command")
    queue, shutdown = JobQueue(redis, settings), Shutdown()
    fleet = Fleet(redis, settings)
    consumer = Consumer(backend, Lifecycle(queue, fleet, settings), fleet, settings, shutdown)
    running = asyncio.create_task(consumer.run())
    try:
        yield shutdown
    finally:
        shutdown.at_once()
        async with asyncio.timeout(30):
            await running
        await queue.aclose()
        await redis.aclose()


def counted(limit: int) -> str:
    """What a client of a job with this `max_tokens` reads."""
    return "".join(f"[{number}]" for number in range(limit))
