"""The consumer over a backend that misbehaves: it restarts it, gives up at last, and lets go of what is not its own."""

from __future__ import annotations

import asyncio
import os

import pytest
from redis.asyncio import Redis

from scheduler.errors import StartupError
from scheduler.job import ClaimedJob, JobState, Priority, new_job_id
from scheduler.lifecycle import Lifecycle
from scheduler.model_card import ModelCard
from scheduler.parent_watch import watch
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.keys import quoted
from scheduler.request import InferenceRequest, Message, Usage
from scheduler.settings import Settings
from scheduler.tokens import ChoiceDelta, EventId, Finished, decode_event
from tests.conftest import SHARD, wait_until
from tests.queue_cases import ask
from workers.backend import BackendDied, BackendEvent, BackendStatus, Capacity, ChoiceProgress, JobDone, JobProgress
from workers.consumer import Consumer
from workers.shutdown import Shutdown


class EchoBackend:
    """A backend that says one token per job and then, as told, ends it, falls silent, or dies with it."""

    def __init__(self, *, dies: bool = False, ends: bool = True, rows: int = 4) -> None:
        self._dies = dies
        self._ends = ends
        self._card = ModelCard(id="tiny", context_tokens=100, max_rows=rows)
        self._events: asyncio.Queue[BackendEvent] = asyncio.Queue(100)
        self.held: dict[tuple[str, int], tuple[ChoiceProgress, ...]] = {}
        self.starts = 0

    async def start(self) -> ModelCard:
        self.starts += 1
        return self._card

    def capacity(self) -> Capacity:
        return Capacity(rows=self._card.max_rows - len(self.held), kv_tokens=10_000)

    def status(self) -> BackendStatus:
        return BackendStatus(pid=os.getpid(), engine_pid=None, kind="echo", busy_rows=len(self.held))

    async def submit(self, job: ClaimedJob, progress: tuple[ChoiceProgress, ...]) -> None:
        self.held[job.id, job.attempt] = progress
        self._events.put_nowait(JobProgress(job.id, job.attempt, (ChoiceDelta(0, (job.attempt,), "x"),)))
        if self._ends:
            self._events.put_nowait(JobDone(job.id, job.attempt, Usage(completion_tokens=1)))

    async def cancel(self, job_id: str, attempt: int) -> None:
        self.held.pop((job_id, attempt), None)

    async def events(self) -> list[BackendEvent]:
        event = await self._events.get()
        if self._dies:
            raise BackendDied("as told")
        if isinstance(event, JobDone):
            del self.held[event.job_id, event.attempt]
        return [event]

    async def close(self) -> None:
        self.held.clear()


async def _submit(lifecycle: Lifecycle) -> str:
    request = InferenceRequest(model="tiny", messages=(Message(role="user", content="x"),))
    submitted = await lifecycle.submit(request, job_id=new_job_id(SHARD), tenant="ann", priority=Priority.NORMAL)
    return submitted.job_id


async def _state(queue: JobQueue, job_id: str) -> JobState | None:
    view = await queue.view(job_id)
    return None if view is None else view.state


async def _listed(fleet: Fleet) -> bool:
    return bool(await fleet.models())


async def test_a_backend_that_dies_each_time_is_given_up_and_its_jobs_are_not_lost(
    lifecycle: Lifecycle, fleet: Fleet, queue: JobQueue, settings: Settings
) -> None:
    backend = EchoBackend(dies=True)
    running = asyncio.create_task(Consumer(backend, lifecycle, fleet, settings, Shutdown()).run())
    await wait_until(lambda: _listed(fleet))
    job_ids = [await _submit(lifecycle) for _ in range(4)]
    with pytest.raises(StartupError, match="died 5 times"):
        async with asyncio.timeout(60):
            while not running.done():
                for job_id in job_ids:
                    if await _state(queue, job_id) is JobState.FAILED:
                        job_ids.append(await _submit(lifecycle))  # the poison ran out: more of it
                        job_ids.remove(job_id)
                await asyncio.sleep(0.05)
            await running
    assert backend.starts == 5
    states = {await _state(queue, job_id) for job_id in job_ids}
    assert states <= {JobState.QUEUED, JobState.FAILED}
    assert await fleet.workers() == []


class KilledWhileLoading(EchoBackend):
    """Dies at its first job, then is killed in its first restart, then works."""

    async def start(self) -> ModelCard:
        card = await super().start()
        self._dies, self._events = self.starts == 1, asyncio.Queue(100)
        if self.starts == 2:
            raise BackendDied("killed while loading")
        return card


async def test_a_backend_that_is_killed_while_it_loads_again_is_started_once_more(
    lifecycle: Lifecycle, fleet: Fleet, queue: JobQueue, settings: Settings
) -> None:
    backend, shutdown = KilledWhileLoading(), Shutdown()
    running = asyncio.create_task(Consumer(backend, lifecycle, fleet, settings, shutdown).run())
    await wait_until(lambda: _listed(fleet))
    job_id = await _submit(lifecycle)

    async def done() -> bool:
        assert not running.done(), running
        return await _state(queue, job_id) is JobState.SUCCEEDED

    await wait_until(done)
    assert backend.starts == 3
    shutdown.request()
    await asyncio.wait_for(running, 10)


async def test_a_job_is_finished_after_its_last_token_and_its_row_is_free(
    lifecycle: Lifecycle, fleet: Fleet, queue: JobQueue, settings: Settings
) -> None:
    backend, shutdown = EchoBackend(), Shutdown()
    running = asyncio.create_task(Consumer(backend, lifecycle, fleet, settings, shutdown).run())
    await wait_until(lambda: _listed(fleet))
    job_ids = [await _submit(lifecycle) for _ in range(10)]

    async def all_done() -> bool:
        return all([await _state(queue, job_id) is JobState.SUCCEEDED for job_id in job_ids])

    await wait_until(all_done)
    for job_id in job_ids:
        ids = [at for at, _ in await queue.read_events(job_id, None)]
        assert ids[:2] == [EventId(1, 0), EventId(1, 1)] and ids[-1].is_terminal and len(ids) == 3
        _, payload = (await queue.read_events(job_id, None))[-1]
        assert decode_event(payload) == Finished(Usage(completion_tokens=1), after_seq=1)
    shutdown.request()
    await asyncio.wait_for(running, 10)
    assert await fleet.workers() == []


class SilentBackend(EchoBackend):
    """Its rows are free as soon as it has a job, but until it is `heard` it tells nobody how any of them ended."""

    def __init__(self, *, rows: int) -> None:
        super().__init__(rows=rows)
        self.heard = asyncio.Event()
        self.taken = 0

    def capacity(self) -> Capacity:
        return Capacity(rows=self._card.max_rows, kv_tokens=10_000)

    async def submit(self, job: ClaimedJob, progress: tuple[ChoiceProgress, ...]) -> None:
        self.taken += 1
        await super().submit(job, progress)

    async def events(self) -> list[BackendEvent]:
        await self.heard.wait()
        return await super().events()


async def test_a_worker_claims_no_further_ahead_of_what_redis_was_told_than_one_batch(
    lifecycle: Lifecycle, fleet: Fleet, queue: JobQueue, settings: Settings
) -> None:
    backend, shutdown = SilentBackend(rows=2), Shutdown()
    running = asyncio.create_task(Consumer(backend, lifecycle, fleet, settings, shutdown).run())
    await wait_until(lambda: _listed(fleet))
    job_ids = [await _submit(lifecycle) for _ in range(10)]
    await wait_until(lambda: backend.taken >= 4)
    (then,) = await fleet.workers()

    async def published_again() -> bool:
        (now,) = await fleet.workers()
        return now.seen_ms > then.seen_ms

    await wait_until(published_again)
    assert backend.taken == 4  # twice its rows
    backend.heard.set()

    async def all_done() -> bool:
        return all([await _state(queue, job_id) is JobState.SUCCEEDED for job_id in job_ids])

    await wait_until(all_done)
    shutdown.request()
    await asyncio.wait_for(running, 10)


async def _first_token_logged(queue: JobQueue, job_id: str) -> bool:
    return len(await queue.read_events(job_id, None)) == 2


async def test_a_lost_lease_ends_the_work_and_a_new_id_takes_the_jobs_up_again(
    lifecycle: Lifecycle, fleet: Fleet, queue: JobQueue, settings: Settings
) -> None:
    backend, shutdown = EchoBackend(ends=False, rows=1), Shutdown()
    running = asyncio.create_task(Consumer(backend, lifecycle, fleet, settings, shutdown).run())
    await wait_until(lambda: _listed(fleet))
    job_id = await _submit(lifecycle)
    await wait_until(lambda: _first_token_logged(queue, job_id))
    (before,) = await fleet.workers()
    await queue.expire_worker(before.id)  # as a sweeper does that saw no heartbeat
    await wait_until(lambda: (job_id, 2) in backend.held)
    assert backend.held == {(job_id, 2): (ChoiceProgress(0, (1,), "x"),)}
    assert backend.starts == 1

    async def renamed() -> bool:
        return [view.id for view in await fleet.workers()] not in ([before.id], [])

    await wait_until(renamed)
    shutdown.at_once()
    await asyncio.wait_for(running, 10)
    assert await _state(queue, job_id) is JobState.QUEUED


async def test_a_worker_that_claims_its_own_lost_job_computes_only_the_new_attempt(
    lifecycle: Lifecycle, fleet: Fleet, queue: JobQueue, settings: Settings
) -> None:
    backend, shutdown = EchoBackend(ends=False), Shutdown()
    running = asyncio.create_task(Consumer(backend, lifecycle, fleet, settings, shutdown).run())
    await wait_until(lambda: _listed(fleet))
    job_id = await _submit(lifecycle)
    await wait_until(lambda: _first_token_logged(queue, job_id))
    (view,) = await fleet.workers()
    await queue.expire_worker(view.id)
    await wait_until(lambda: (job_id, 2) in backend.held and (job_id, 1) not in backend.held)
    shutdown.at_once()
    await asyncio.wait_for(running, 10)


async def test_a_cancel_reaches_the_backend_by_the_heartbeat_of_a_silent_job(
    lifecycle: Lifecycle, fleet: Fleet, queue: JobQueue, settings: Settings
) -> None:
    backend, shutdown = EchoBackend(ends=False), Shutdown()
    running = asyncio.create_task(Consumer(backend, lifecycle, fleet, settings, shutdown).run())
    await wait_until(lambda: _listed(fleet))
    job_id = await _submit(lifecycle)
    await wait_until(lambda: (job_id, 1) in backend.held)
    await lifecycle.cancel(job_id)
    await wait_until(lambda: not backend.held)

    async def is_cancelled() -> bool:
        return await _state(queue, job_id) is JobState.CANCELLED

    await wait_until(is_cancelled)
    shutdown.request()
    await asyncio.wait_for(running, 10)


async def test_a_worker_asked_to_end_while_it_loads_does_so(
    lifecycle: Lifecycle, fleet: Fleet, settings: Settings
) -> None:
    class Loading(EchoBackend):
        async def start(self) -> ModelCard:
            await asyncio.sleep(600)
            raise AssertionError

    shutdown = Shutdown()
    running = asyncio.create_task(Consumer(Loading(), lifecycle, fleet, settings, shutdown).run())
    await asyncio.sleep(0)
    shutdown.request()
    await asyncio.wait_for(running, 10)


async def test_the_parents_death_is_noticed_and_what_it_wrote_is_not_taken_for_it() -> None:
    reading, writing = os.pipe()
    died = asyncio.Event()
    watching = asyncio.create_task(watch(reading, died.set))
    os.write(writing, b"still here")
    await asyncio.sleep(0)
    assert not died.is_set()
    os.close(writing)
    await asyncio.wait_for(watching, 10)
    assert died.is_set()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reading)


async def test_an_idle_worker_asks_once_for_each_job(
    queue: JobQueue, lifecycle: Lifecycle, fleet: Fleet, settings: Settings, redis: Redis
) -> None:
    shutdown, jobs = Shutdown(), 40
    running = asyncio.create_task(Consumer(EchoBackend(), lifecycle, fleet, settings, shutdown).run())
    await wait_until(lambda: _listed(fleet))
    before = await _script_calls(redis)
    for _ in range(jobs):
        job_id = await _submit(lifecycle)
        await wait_until(lambda job_id=job_id: _is_over(queue, job_id))
    asked = await _script_calls(redis) - before
    shutdown.request()
    await running
    assert asked < 5 * jobs  # submit, claim, emit, end; beside them one claim a second
    assert not await ask(redis, "EXISTS", queue.keys.of("full", quoted("tiny")))  # it never listened as a full one


async def _script_calls(redis: Redis) -> int:
    stats = await redis.info("commandstats")  # pyright: ignore[reportUnknownMemberType]
    return int(stats["cmdstat_evalsha"]["calls"])


async def _is_over(queue: JobQueue, job_id: str) -> bool:
    state = await _state(queue, job_id)
    return state is not None and state.is_terminal
