"""The stager loop: brings held durable jobs to Redis when they are due, batches line by line. The scheduler runs it.

A batch has at most `batch_window` lines in the queue, and batches take turns. What Redis refuses (queue full, model not
served) waits with growing pauses per model and class, so that it holds up nobody else. Nothing is ever dropped here but
what its own deadline ends.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence

from sqlalchemy.exc import SQLAlchemyError

from scheduler.acceptance import STAGE_AHEAD_MS
from scheduler.db.durable_ends import EXPIRED
from scheduler.db.durable_rows import DurableView
from scheduler.db.outbox_rows import OutboxRows, Route
from scheduler.db.session import explain
from scheduler.errors import QueueUnavailable, SpillwayError
from scheduler.loops.patience import Patience
from scheduler.outbox import Outbox
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

INTERVAL_S = 0.25
JOBS_AT_ONCE = 256  # of no batch; and as many lines of all batches together
SHORTEST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 5.0
EXPIRE_EVERY_S = 5.0

log = get_logger(__name__)


class Stager:
    """One per scheduler process; several may run, as the marks in SQL are guarded and Redis knows each id."""

    def __init__(self, rows: OutboxRows, outbox: Outbox, settings: Settings) -> None:
        self._rows = rows
        self._outbox = outbox
        self._settings = settings
        self._pauses = Pauses()
        self._expire_at = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Stage until `stop` is set."""
        patience = Patience("bringing accepted jobs to the queue", log)
        while not stop.is_set():
            try:
                more = await self.turn()
            except QueueUnavailable as error:
                await patience.wait_out(error.message, stop)
            except (SQLAlchemyError, OSError) as error:
                await patience.wait_out(explain(error, self._settings), stop)
            else:
                patience.recovered()
                await patience.pause(0 if more else INTERVAL_S * random.uniform(0.8, 1.2), stop)

    async def turn(self) -> bool:
        """One round; whether there is more to bring at once. Raises QueueUnavailable and SQL's errors."""
        now_ms = int(time.time() * 1000)
        await self._expire(now_ms)
        paused = self._pauses.current()
        jobs = await self._rows.due(now_ms + STAGE_AHEAD_MS, paused, JOBS_AT_ONCE)
        lines = await self._lines(paused)
        waiting = await self._in_time([*jobs, *lines], now_ms)
        if not waiting:
            return False
        sent = await self._outbox.send(waiting)
        for route in {(job.model, job.priority) for job in waiting if job.id in sent.sent}:
            self._pauses.end(route)
        for route, error in sent.refused.items():
            self._pauses.begin(route, error)
        if sent.away is not None:
            raise sent.away
        return bool(sent.sent) and len(waiting) >= JOBS_AT_ONCE

    async def _lines(self, paused: Sequence[Route]) -> list[DurableView]:
        """Lines of the running batches, in turns: each fills up its window, none goes before another's first."""
        batches = await self._rows.running_batches()
        if not batches:
            return []
        share = max(1, JOBS_AT_ONCE // len(batches))
        rooms = {name: min(share, self._settings.batch_window - sent) for name, sent in batches.items()}
        pages = [await self._rows.held_lines(name, paused, room) for name, room in rooms.items() if room > 0]
        turns = itertools.zip_longest(*pages)
        return [line for turn in turns for line in turn if line is not None]

    async def _in_time(self, jobs: Sequence[DurableView], now_ms: int) -> list[DurableView]:
        late = [job.id for job in jobs if job.deadline_ms is not None and job.deadline_ms <= now_ms]
        if late:
            await self._rows.end_held(late, EXPIRED, now_ms)
        return [job for job in jobs if job.id not in late]

    async def _expire(self, now_ms: int) -> None:
        """Also what waits behind others, or for a later time, does not outlive its deadline by much."""
        if time.monotonic() < self._expire_at:
            return
        ended = await self._rows.expire(now_ms, JOBS_AT_ONCE)
        if ended < JOBS_AT_ONCE:
            self._expire_at = time.monotonic() + EXPIRE_EVERY_S


class Pauses:
    """Routes that Redis refused, each left alone for a while that doubles until it takes a job again."""

    def __init__(self) -> None:
        self._until: dict[Route, float] = {}
        self._length_s: dict[Route, float] = {}

    def current(self) -> list[Route]:
        now = time.monotonic()
        return [route for route, until in self._until.items() if until > now]

    def begin(self, route: Route, error: SpillwayError) -> None:
        """Told once, when the route was open before."""
        if route not in self._length_s:
            log.info("accepted jobs wait", model=route[0], priority=route[1].value, reason=error.message)
        length_s = min(LONGEST_PAUSE_S, 2 * self._length_s.get(route, SHORTEST_PAUSE_S / 2))
        self._length_s[route] = length_s
        self._until[route] = time.monotonic() + length_s

    def end(self, route: Route) -> None:
        self._length_s.pop(route, None)
        self._until.pop(route, None)
