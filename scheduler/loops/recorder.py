"""The recorder loop: outcomes of jobs go from the `done` stream to SQL. The scheduler runs it; the token path does not.

An outcome is acknowledged after its row is committed, so it is written at least once; the row is fenced by attempt.
While SQL cannot be written (locked, full, restarting) the batch is held and tried again, and the stream keeps the rest.
"""

from __future__ import annotations

import asyncio
import contextlib

from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from scheduler.db.jobs import JobStore
from scheduler.db.session import explain
from scheduler.errors import QueueUnavailable
from scheduler.queue.done_log import DoneLog, DoneRecord
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

CONSUMER = "recorder"  # one name for all: left-over outcomes change hands by idle time, and no name is left behind
BATCH = 500
READ_WAIT_MS = 500
PAUSE_S = 1.0

log = get_logger(__name__)


class Recorder:
    """One per scheduler process; `done` has a connection of role "blocking"."""

    def __init__(self, done: DoneLog, store: JobStore, settings: Settings) -> None:
        self._done = done
        self._store = store
        self._settings = settings
        self._trouble = ""

    async def run(self, stop: asyncio.Event) -> None:
        """Record until `stop` is set. What was not acknowledged by then comes again to the next recorder."""
        while not stop.is_set():
            records = await self._read(stop)
            if records and await self._write(records, stop):
                await self._acknowledge(records)

    async def _read(self, stop: asyncio.Event) -> list[DoneRecord]:
        try:
            return await self._done.read_done(CONSUMER, BATCH, READ_WAIT_MS)
        except QueueUnavailable as error:
            await self._wait_out(error.message, stop)
            return []

    async def _write(self, records: list[DoneRecord], stop: asyncio.Event) -> bool:
        """Whether all rows are committed; False only when stopped before."""
        while not stop.is_set():
            try:
                await self._store.record([record.job for record in records])
            except (DataError, IntegrityError, ValueError):
                return await self._write_each(records, stop)
            except (SQLAlchemyError, OSError) as error:
                await self._wait_out(explain(error, self._settings), stop)
            else:
                self._recovered()
                return True
        return False

    async def _write_each(self, records: list[DoneRecord], stop: asyncio.Event) -> bool:
        """The batch holds a row that no retry can save: record the others, and say which one is lost."""
        if len(records) > 1:
            return all([await self._write([record], stop) for record in records])
        log.error("a finished job does not fit its table and is not recorded", job=records[0].job.id)
        return True

    async def _acknowledge(self, records: list[DoneRecord]) -> None:
        try:
            await self._done.ack_done([record.entry_id for record in records])
        except QueueUnavailable as error:
            log.warning("recorded jobs will be recorded again", count=len(records), error=error.message)

    async def _wait_out(self, trouble: str, stop: asyncio.Event) -> None:
        if trouble != self._trouble:
            log.warning("finished jobs cannot be recorded now; trying on", error=trouble)
        self._trouble = trouble
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PAUSE_S):
                await stop.wait()

    def _recovered(self) -> None:
        if self._trouble:
            log.info("finished jobs are recorded again")
        self._trouble = ""
