"""A full worker with batch work makes room for people's, hears of it without polling, and goes on with the batch."""

from __future__ import annotations

import asyncio

from scheduler.job import JobState, Priority, new_job_id
from scheduler.lifecycle import Lifecycle
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.request import InferenceRequest, Message
from scheduler.settings import Settings
from scheduler.tokens import EventId
from tests.conftest import SHARD, wait_until
from tests.integration.test_worker_consumer import EchoBackend
from workers.backend import Capacity, ChoiceProgress
from workers.consumer import Consumer
from workers.preemption import Preemption
from workers.shutdown import Shutdown


async def _submit(lifecycle: Lifecycle, priority: Priority) -> str:
    request = InferenceRequest(model="tiny", messages=(Message(role="user", content="x"),))
    return (await lifecycle.submit(request, job_id=new_job_id(SHARD), tenant="ann", priority=priority)).job_id


async def test_batch_work_gives_way_keeps_its_tokens_and_comes_back(
    lifecycle: Lifecycle, fleet: Fleet, queue: JobQueue, settings: Settings
) -> None:
    backend, shutdown = EchoBackend(ends=False, rows=2), Shutdown()
    running = asyncio.create_task(Consumer(backend, lifecycle, fleet, settings, shutdown).run())
    await wait_until(fleet.models)
    batch = [await _submit(lifecycle, Priority.BATCH) for _ in range(2)]

    async def both_said_something() -> bool:
        return all([len(await queue.read_events(job_id, None)) == 2 for job_id in batch])

    await wait_until(both_said_something)
    high = await _submit(lifecycle, Priority.HIGH)
    await wait_until(lambda: (high, 1) in backend.held)
    assert len(backend.held) == 2
    (parked,) = [job_id for job_id in batch if (job_id, 1) not in backend.held]
    view = await queue.view(parked)
    assert view is not None and view.state is JobState.QUEUED

    await lifecycle.cancel(high)
    await wait_until(lambda: (parked, 2) in backend.held)
    assert backend.held[parked, 2] == (ChoiceProgress(0, (1,), "x"),)
    assert EventId(1, 1) in [at for at, _ in await queue.read_events(parked, None)]
    shutdown.at_once()
    await asyncio.wait_for(running, 10)


async def test_batch_work_that_waits_pushes_out_no_batch_work(
    lifecycle: Lifecycle, fleet: Fleet, queue: JobQueue, settings: Settings
) -> None:
    backend, shutdown = EchoBackend(ends=False, rows=1), Shutdown()
    running = asyncio.create_task(Consumer(backend, lifecycle, fleet, settings, shutdown).run())
    await wait_until(fleet.models)
    first = await _submit(lifecycle, Priority.BATCH)
    await wait_until(lambda: (first, 1) in backend.held)
    others = [await _submit(lifecycle, Priority.BATCH) for _ in range(5)]
    await lifecycle.cancel(first)
    await wait_until(lambda: (others[0], 1) in backend.held)
    assert [job_id for job_id, _ in backend.held] == [others[0]]
    shutdown.at_once()
    await asyncio.wait_for(running, 10)


def test_no_more_is_named_until_the_room_that_was_made_shows() -> None:
    preemption, room = Preemption(), Capacity(rows=0, kv_tokens=100)
    assert preemption.is_over(room)
    preemption.begin(["a"], room)
    assert not preemption.is_over(Capacity(rows=1, kv_tokens=900))  # not handed back yet
    preemption.end("a")
    assert preemption.settling and not preemption.is_over(Capacity(rows=1, kv_tokens=100))
    assert preemption.is_over(Capacity(rows=1, kv_tokens=300))
    assert not preemption.settling
