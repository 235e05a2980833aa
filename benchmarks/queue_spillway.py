"""Spillway under benchmarks/queue: the real lifecycle, consumer and token bus around a backend that ends jobs at once.

On: leases and fencing, the event log with live events, idempotent enqueue, retries and dead letters, the outcome stream
to the recorder, which another process drains (benchmarks/queue starts it).
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from pathlib import Path

from benchmarks.queue_system import ROWS, RoundTrip, shares
from scheduler.job import ClaimedJob, Priority, new_job_id
from scheduler.lifecycle import Lifecycle
from scheduler.loops.sweeper import run_sweeper
from scheduler.model_card import ModelCard
from scheduler.queue.connection import connect
from scheduler.queue.done_log import DoneLog
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.token_bus import TokenBus
from scheduler.request import InferenceRequest, Message, SamplingParams, Usage
from scheduler.settings import Settings
from scheduler.telemetry import configure
from scheduler.tokens import Finished
from workers.backend import BackendEvent, BackendStatus, Capacity, ChoiceProgress, JobDone
from workers.consumer import Consumer
from workers.shutdown import Shutdown

POOL = "noop"
_REQUEST = InferenceRequest(
    model=POOL, messages=(Message(role="user", content="noop"),), sampling=SamplingParams(max_tokens=1)
)


def settings_for(url: str) -> Settings:
    home = Path(tempfile.gettempdir()) / "spillway-bench-queue"
    return Settings(home=home, redis_url=url, queue_depth_cap=1_000_000, log_level="warning")


class NoopBackend:
    """Ends each job when it is submitted. When that was travels in the usage, microseconds as cached tokens."""

    def __init__(self) -> None:
        self._events: list[BackendEvent] = []
        self._ready = asyncio.Event()

    async def start(self) -> ModelCard:
        return ModelCard(id=POOL, context_tokens=1024, max_rows=ROWS, kv_budget_tokens=10**9)

    def capacity(self) -> Capacity:
        return Capacity(ROWS - len(self._events), 10**9)

    def status(self) -> BackendStatus:
        return BackendStatus(os.getpid(), None, "noop", len(self._events))

    async def submit(self, job: ClaimedJob, progress: tuple[ChoiceProgress, ...]) -> None:
        usage = Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=int(time.monotonic() * 1e6))
        self._events.append(JobDone(job.id, job.attempt, usage))
        self._ready.set()

    async def cancel(self, job_id: str, attempt: int) -> None:
        self._events = [event for event in self._events if (event.job_id, event.attempt) != (job_id, attempt)]

    async def events(self) -> list[BackendEvent]:
        await self._ready.wait()
        self._ready.clear()
        events, self._events = self._events, []
        return events

    async def close(self) -> None:
        self._events = []


class SpillwayProducer:
    def __init__(self, url: str) -> None:
        self._settings = settings_for(url)
        self._redis = connect(self._settings, "command")
        self._queue = JobQueue(self._redis, self._settings)
        self._lifecycle = Lifecycle(self._queue, Fleet(self._redis, self._settings), self._settings)
        self._bus = TokenBus(self._settings)

    async def open(self) -> None:
        await self._bus.start()
        fleet = Fleet(self._redis, self._settings)
        while not await fleet.models():  # noqa: ASYNC110 - it happens in Redis
            await asyncio.sleep(0.02)

    async def enqueue(self, count: int) -> None:
        async def some(share: int) -> None:
            for _ in range(share):
                await self._submit(new_job_id(self._settings.shard))

        await asyncio.gather(*(some(share) for share in shares(count)))

    async def unfinished(self) -> int:
        counts = await self._queue.counts()
        return 2 * counts.get("accepted", 0) - sum(counts.values())

    async def round_trip(self) -> RoundTrip:
        began_s = time.monotonic()
        job_id = new_job_id(self._settings.shard)
        async with self._bus.subscribe(job_id, is_new=True) as subscription:
            await self._submit(job_id)
            while True:
                for _, event in await subscription.read(1.0):
                    if isinstance(event, Finished):
                        ran_s = event.usage.cached_tokens / 1e6
                        return RoundTrip(ran_s - began_s, time.monotonic() - began_s)

    async def close(self) -> None:
        await self._bus.close()
        await self._queue.aclose()
        await self._redis.aclose()

    async def _submit(self, job_id: str) -> None:
        await self._lifecycle.submit(_REQUEST, job_id=job_id, tenant="bench", priority=Priority.NORMAL)


class Spillway:
    name = "spillway"
    share = 1.0
    is_foreign = False
    guarantees = "exactly one outcome, fenced attempts, lease 1.5 s, event log, live events, outcome to SQL"

    def producer(self, url: str) -> SpillwayProducer:
        return SpillwayProducer(url)

    def command(self, python: str, url: str) -> list[str] | None:
        return None

    async def work(self, url: str) -> None:
        settings = settings_for(url)
        configure(settings, "worker")
        shutdown = Shutdown()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, shutdown.request)
        redis = connect(settings, "command")
        queue = JobQueue(redis, settings)
        fleet = Fleet(redis, settings)
        over = asyncio.Event()
        consumer = Consumer(NoopBackend(), Lifecycle(queue, fleet, settings), fleet, settings, shutdown)
        async with asyncio.TaskGroup() as group:
            group.create_task(run_sweeper(queue, settings, over))
            await consumer.run()
            over.set()
        await queue.aclose()
        await redis.aclose()


class OutcomeDrain:
    """Reads and acknowledges outcomes as the recorder does; what it would write to SQL is another benchmark's."""

    async def work(self, url: str) -> None:
        settings = settings_for(url)
        redis = connect(settings, "blocking")
        done = DoneLog(redis, settings)
        while True:
            records = await done.read_done("recorder", 500, 500)
            await done.ack_done([record.entry_id for record in records])


SPILLWAY = Spillway()
DRAIN = OutcomeDrain()
