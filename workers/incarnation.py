"""One life of a worker: from the first claim under an id until it drains, loses its lease or loses its backend.

Loops, one task each: claim (takes jobs that fit), pump (backend events into the outbox), deliver (outbox into Redis,
which is also the heartbeat and brings cancels and fences), publish (the fleet registry). Redis being away stops none
of them: jobs go on in the backend, and if the lease is lost meanwhile, the fence says so with the next emit.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from scheduler.errors import QueueUnavailable
from scheduler.job import Claimed, ClaimedJob, Priority
from scheduler.lifecycle import Lifecycle
from scheduler.model_card import ModelCard
from scheduler.queue.fleet import Fleet, WorkerView
from scheduler.queue.records import Outcome
from scheduler.settings import Settings
from scheduler.telemetry import get_logger, log_context
from workers.backend import Backend, BackendDied, Capacity, JobDone, JobError
from workers.outbox import Outbox, as_progress
from workers.preemption import Preemption
from workers.shutdown import Shutdown, any_set
from workers.work_bell import WorkBell

_log = get_logger(__name__)
_T = TypeVar("_T")

_PUBLISH_EVERY_S = 1.0
_LOOK_AGAIN_S = 1.0
_PREEMPTION_LOOK_S = 0.05  # until the backend's account shows the room that was made
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.05, 1.0
_DRAIN_LOOK_S = 0.05
_EARLY_S = 0.01  # a timer may fire before its time by the clock that is asked afterwards


class Ending(enum.Enum):
    DRAINED = "drained"
    LEASE_LOST = "lease lost"
    BACKEND_DIED = "backend died"


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What every incarnation of a worker works with."""

    backend: Backend
    lifecycle: Lifecycle
    fleet: Fleet
    settings: Settings
    shutdown: Shutdown
    bell: WorkBell


class Incarnation:
    """`run` once; the id is never used again, so that nothing of this life can be taken for a later one."""

    def __init__(self, parts: WorkerParts, card: ModelCard) -> None:
        self._parts = parts
        self._card = card
        self._pool = card.id
        self._started_ms = int(time.time() * 1000)
        self.id = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._outbox = Outbox()
        self._news = asyncio.Event()
        self._over = asyncio.Event()
        self._preemption = Preemption()
        self._wants_room = True  # whether work may wait that had no room here
        self._ending = Ending.DRAINED
        self._tells_begins = logging.getLogger(__name__).isEnabledFor(logging.DEBUG)  # asked once: it is a hot path
        self._heartbeat_s = parts.settings.lease_ttl_ms / 3000
        self._heartbeat_at_s = time.monotonic() + self._heartbeat_s

    async def run(self) -> Ending:
        """Work until an Ending; afterwards nothing of this incarnation is left in Redis."""
        with log_context(worker=self.id):
            async with asyncio.TaskGroup() as group:
                pump = group.create_task(self._pump())
                for loop in (self._claim_loop, self._deliver_loop, self._publish_loop):
                    group.create_task(loop())
                await self._until_over()
                self._end(self._ending)
                pump.cancel()
            await self._leave()
        return self._ending

    async def _claim_loop(self) -> None:
        while not self._over.is_set() and not self._parts.shutdown.draining.is_set():
            self._parts.bell.rang.clear()
            self._wants_room = True  # also what comes free while Redis is asked
            room = self._room()
            claimed = await self._claim(room)
            for job in claimed.jobs:
                await self._begin(job)
            if claimed.preempt:
                self._preemption.begin(claimed.preempt, room)
                self._news.set()
            self._wants_room = claimed.is_more_left or self._room().rows <= 0  # a full worker hears no bell
            if not (claimed.jobs and self._wants_room):
                await self._wait_for_work()

    def _room(self) -> Capacity:
        """The backend's room, but at most one more batch while Redis has not been told how the last one ended."""
        room = self._parts.backend.capacity()
        return Capacity(min(room.rows, 2 * self._card.max_rows - len(self._outbox)), room.kv_tokens)

    async def _claim(self, room: Capacity) -> Claimed:
        """What fits; a full worker asks only where it could make room."""
        may_preempt = self._holds_batch_work() and self._preemption.is_over(room)
        if room.rows <= 0 and not may_preempt:
            return Claimed(is_more_left=True)
        ask = functools.partial(
            self._parts.lifecycle.claim,
            self.id,
            self._pool,
            room.rows,
            self._card.max_rows,
            room.kv_tokens,
            self._card.kv_budget_tokens,
            may_preempt=may_preempt,
        )
        claimed = await self._persist(ask)
        return Claimed() if claimed is None else claimed

    def _holds_batch_work(self) -> bool:
        return any(job.priority is Priority.BATCH for job in self._outbox.jobs)

    async def _wait_for_work(self) -> None:
        """Until a bell rings, room comes free or a while has passed. A full worker listens where it could make room."""
        bell, has_room = self._parts.bell, self._room().rows > 0
        if has_room or self._holds_batch_work():
            bell.listen(full=not has_room)
        pause_s = _PREEMPTION_LOOK_S if self._preemption.settling else _LOOK_AGAIN_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await bell.rang.wait()
        bell.ignore()

    async def _begin(self, job: ClaimedJob) -> None:
        visible = await self._persist(lambda: self._parts.lifecycle.progress(job.id)) if job.attempt > 1 else ()
        if visible is None:  # over before Redis answered: the lease decides who goes on with the job
            return
        older = self._outbox.get(job.id)
        if older is not None:  # the lease was lost and won again between two heartbeats
            await self._drop(older)
        if self._tells_begins:
            before = sum(len(one.token_ids) for one in visible)
            _log.debug("job begins", job=job.id, attempt=job.attempt, tokens_before=before)
        self._outbox.hold(job)
        await self._parts.backend.submit(job, as_progress(visible))

    async def _pump(self) -> None:
        try:
            while True:
                for event in await self._parts.backend.events():
                    self._outbox.take_in(event)
                self._news.set()
        except BackendDied as death:
            _log.error("backend died", reason=str(death), jobs=len(self._outbox))
            self._end(Ending.BACKEND_DIED)
            await self._give_up_jobs()

    async def _deliver_loop(self) -> None:
        while not self._over.is_set():
            await self._wait_for_news()
            if not self._over.is_set():
                await self._persist(self._deliver)

    async def _wait_for_news(self) -> None:
        """Until there is something to say, or it is time for a heartbeat."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._heartbeat_at_s - time.monotonic())):
                await self._news.wait()
        self._news.clear()

    async def _deliver(self) -> None:
        """One round trip for all that waits to be said, one for the ends of jobs that said all they had."""
        is_due = time.monotonic() >= self._heartbeat_at_s - _EARLY_S
        if (self._outbox.batch() or is_due) and not await self._emit():
            return
        await self._finish(self._outbox.ended())
        for job_id in self._preemption.named:
            await self._make_room(job_id)

    async def _emit(self) -> bool:
        """False: the lease is lost, and all jobs with it."""
        result = await self._parts.lifecycle.emit(self.id, self._outbox.batch())
        self._heartbeat_at_s = time.monotonic() + self._heartbeat_s
        self._outbox.confirm()
        if result.lease_lost:
            _log.warning("lease lost; its jobs went to other workers", jobs=len(self._outbox))
            self._end(Ending.LEASE_LOST)
            return False
        for job_id in result.fenced:
            job = self._outbox.get(job_id)
            if job is not None:
                await self._drop(job)
        for job_id in result.cancelled:
            await self._cancel(job_id)
        return True

    async def _make_room(self, job_id: str) -> None:
        """Hands a batch job back for higher work; what it said is in the log, so it goes on after that."""
        job = self._outbox.get(job_id)
        if job is not None:
            await self._parts.backend.cancel(job.id, job.attempt)
            await self._parts.lifecycle.hand_back(self.id, job, preempted=True)
            await self._drop(job)
        self._preemption.end(job_id)

    async def _cancel(self, job_id: str) -> None:
        job = self._outbox.get(job_id)
        if job is None:
            return
        await self._parts.backend.cancel(job.id, job.attempt)
        await self._parts.lifecycle.cancelled(self.id, job)
        await self._drop(job)

    async def _finish(self, ended: list[tuple[ClaimedJob, JobDone | JobError]]) -> None:
        if not ended:
            return
        await self._parts.lifecycle.end(self.id, [(job, self._outcome(job, end)) for job, end in ended])
        for job, _ in ended:
            self._outbox.drop(job.id)
        if self._wants_room:
            self._parts.bell.rang.set()

    def _outcome(self, job: ClaimedJob, end: JobDone | JobError) -> Outcome:
        match end:
            case JobDone():
                return self._parts.lifecycle.success(end.usage, self._outbox.last_seq(job.id))
            case JobError():
                with log_context(job=job.id):
                    _log.info("job failed", code=end.code, reason=end.message, attempt=job.attempt)
                return self._parts.lifecycle.failure(job, end.code, end.message, end.param)

    async def _drop(self, job: ClaimedJob) -> None:
        """Stop computing a job and forget it; its rows are free for other work."""
        self._outbox.drop(job.id)
        await self._parts.backend.cancel(job.id, job.attempt)
        self._parts.bell.rang.set()

    async def _publish_loop(self) -> None:
        failing = False
        while not self._over.is_set():
            try:
                await self._parts.fleet.publish(self._view(), self._card)
                failing = False
            except QueueUnavailable as error:
                if not failing:
                    _log.warning("cannot publish to the fleet; trying on", reason=error.message)
                failing = True
            await any_set(self._over, timeout_s=_PUBLISH_EVERY_S)

    def _view(self) -> WorkerView:
        status = self._parts.backend.status()
        return WorkerView(
            id=self.id,
            pid=status.pid,
            engine_pid=status.engine_pid,
            host=socket.gethostname(),
            kind=status.kind,
            models=(self._card.id,),
            busy_rows=status.busy_rows,
            max_rows=self._card.max_rows,
            started_ms=self._started_ms,
            seen_ms=int(time.time() * 1000),
            stats=status.stats,
            histograms=status.histograms,
        )

    async def _until_over(self) -> None:
        """Until an ending, or a shutdown has left its jobs the time to finish."""
        shutdown = self._parts.shutdown
        while not await any_set(self._over, shutdown.draining, timeout_s=60.0):
            pass
        self._parts.bell.rang.set()  # the claim loop looks whether it shall go on
        until = time.monotonic() + self._parts.settings.drain_s
        while len(self._outbox) and time.monotonic() < until:
            if await any_set(self._over, shutdown.now, timeout_s=_DRAIN_LOOK_S):
                return

    def _end(self, ending: Ending) -> None:
        if not self._over.is_set():
            self._ending = ending
            self._over.set()
            self._news.set()
            self._parts.bell.rang.set()

    async def _give_up_jobs(self) -> None:
        try:
            count = await self._parts.lifecycle.worker_died(self.id)
        except QueueUnavailable as error:
            _log.warning("cannot give up the jobs; their lease expires by itself", reason=error.message)
        else:
            _log.info("jobs go on elsewhere", jobs=count)

    async def _leave(self) -> None:
        """Nothing stays behind in the backend or in Redis; a claim may have come in after the end."""
        lifecycle = self._parts.lifecycle
        try:
            match self._ending:
                case Ending.DRAINED:
                    await self._hand_back()
                    await lifecycle.retire(self.id)
                case Ending.LEASE_LOST:
                    await self._forget_jobs()
                    await lifecycle.retire(self.id)
                case Ending.BACKEND_DIED:
                    await lifecycle.worker_died(self.id)
            await self._parts.fleet.withdraw(self.id)
        except QueueUnavailable as error:
            _log.warning("left without saying so; the lease expires by itself", reason=error.message)

    async def _forget_jobs(self) -> None:
        for job in self._outbox.jobs:
            await self._drop(job)

    async def _hand_back(self) -> None:
        """Show what was computed, then let others continue after it."""
        if self._outbox.has_news:
            await self._deliver()
        for job in self._outbox.jobs:
            await self._parts.backend.cancel(job.id, job.attempt)
            await self._parts.lifecycle.hand_back(self.id, job)
            self._outbox.drop(job.id)

    async def _persist(self, call: Callable[[], Awaitable[_T]]) -> _T | None:
        """Repeat while Redis is away; None when the incarnation is over first."""
        pause_s = _FIRST_RETRY_S
        while True:
            try:
                return await call()
            except QueueUnavailable as error:
                if self._over.is_set():
                    return None
                _log.warning("the queue is away; trying on", reason=error.message)
            await any_set(self._over, timeout_s=pause_s)
            pause_s = min(_LONGEST_RETRY_S, 2 * pause_s)
