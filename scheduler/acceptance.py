"""Accepts durable jobs: commits the row, then sends it to Redis if that can be done at once. API and schedules call it.

A job is accepted once its row is committed, also while Redis is away, the queue is full or no worker runs: then it is
held, and the stager brings it.
"""

from __future__ import annotations

import time

from sqlalchemy.exc import SQLAlchemyError

from scheduler import routing
from scheduler.db.durable import Accepted, DurableStore, NewDurable
from scheduler.db.durable_rows import new_view
from scheduler.db.outbox_rows import Route
from scheduler.errors import CapacityError, NoModelYet, QueueFull, QueueUnavailable
from scheduler.outbox import Outbox
from scheduler.queue.fleet import Fleet
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

STAGE_AHEAD_MS = 60_000  # a job whose time is further away stays in SQL
COUNT_FRESH_S = 5.0
LEAVE_TO_STAGER_S = 2.0  # after a refusal: what waits already goes first, and no client waits for an absent Redis

log = get_logger(__name__)


class Acceptance:
    """One per process."""

    def __init__(self, durable: DurableStore, outbox: Outbox, fleet: Fleet, settings: Settings) -> None:
        self._durable = durable
        self._outbox = outbox
        self._fleet = fleet
        self._cap = settings.held_jobs_cap
        self._held: dict[str, tuple[float, int]] = {}
        self._closed: dict[Route, float] = {}
        self._away_until = float("-inf")

    async def accept(self, job: NewDurable) -> Accepted:
        """Accept a job of no batch. `created` False: an earlier one with the same Idempotency-Key answers.

        Raises UnknownModel where the fleet is known and lacks it, QueueFull, IdempotencyMismatch.
        """
        await self._check_room(job.tenant)
        await self._check_model(job.model)
        (accepted,) = await self._durable.accept([job])
        if accepted.created and self._may_send(job):
            await self._send(job)
        return accepted

    async def _check_room(self, tenant: str) -> None:
        now = time.monotonic()
        counted_at, count = self._held.get(tenant, (float("-inf"), 0))
        if now - counted_at > COUNT_FRESH_S:
            self._held = {name: seen for name, seen in self._held.items() if now - seen[0] <= COUNT_FRESH_S}
            counted_at, count = now, await self._durable.held_count(tenant)
        if count >= self._cap:
            raise QueueFull(
                f"{count} jobs of yours wait for the queue already; send more when they ran", retry_after_s=10
            )
        self._held[tenant] = (counted_at, count + 1)

    async def _check_model(self, model: str) -> None:
        if time.monotonic() < self._away_until:
            return
        try:
            routing.plan(model, await self._fleet.models())
        except NoModelYet:
            return
        except QueueUnavailable as error:
            self._note_away(error)

    def _may_send(self, job: NewDurable) -> bool:
        now = time.monotonic()
        later = job.not_before_ms is not None and job.not_before_ms > time.time() * 1000 + STAGE_AHEAD_MS
        return not later and now >= self._away_until and now >= self._closed.get((job.model, job.priority), now)

    async def _send(self, job: NewDurable) -> None:
        """It is accepted already: whatever fails here, the stager brings it."""
        try:
            sent = await self._outbox.send([new_view(job)])
        except (CapacityError, SQLAlchemyError, OSError) as error:
            log.warning("an accepted job is left to the stager", job=job.id, error=str(error).partition("\n")[0])
            return
        now = time.monotonic()
        self._closed = {route: until for route, until in self._closed.items() if until > now}
        self._closed.update(dict.fromkeys(sent.refused, now + LEAVE_TO_STAGER_S))
        if sent.away is not None:
            self._note_away(sent.away)

    def _note_away(self, error: QueueUnavailable) -> None:
        self._away_until = time.monotonic() + LEAVE_TO_STAGER_S
        log.warning("Redis is away; jobs are accepted and wait in SQL", error=error.message)
