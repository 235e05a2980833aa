"""The recurrence loop: each second, the turns of schedules that have come. Every scheduler process runs it."""

from __future__ import annotations

import asyncio
import contextlib
import time

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from scheduler.db.schedules import ScheduleStore
from scheduler.db.session import explain, is_about_a_value
from scheduler.schedules import Turns
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

PERIOD_S = 1.0
AT_MOST = 200  # turns of one round; the rest comes in the next

log = get_logger(__name__)


class Recurrence:
    """One per scheduler process."""

    def __init__(self, store: ScheduleStore, turns: Turns, settings: Settings) -> None:
        self._store = store
        self._turns = turns
        self._settings = settings
        self._failing = False

    async def run(self, stop: asyncio.Event) -> None:
        """Take turns until `stop` is set; a database that fails is waited out."""
        while not stop.is_set():
            try:
                taken = await self.round(int(time.time() * 1000))
                self._failing = False
            except (SQLAlchemyError, OSError) as error:
                taken = 0
                if not self._failing:
                    log.warning("schedules wait for the database", error=explain(error, self._settings))
                self._failing = True
            if taken == AT_MOST:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S):
                    await stop.wait()

    async def round(self, now_ms: int) -> int:
        """Take what is due; how many turns that were."""
        due = await self._store.due(now_ms, AT_MOST)
        for schedule in due:
            try:
                await self._turns.take(schedule, now_ms)
            except DBAPIError as error:
                if not is_about_a_value(error):
                    raise
                log.exception("the database refuses a schedule's job", schedule=schedule.id)
                await self._turns.fail(schedule, now_ms, "The database refused its job; the server's log says more.")
        return len(due)
