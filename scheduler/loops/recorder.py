"""The recorder loop: outcomes of jobs go from the `done` stream to SQL. The scheduler runs it; the token path does not.

An outcome is acknowledged after its row is committed, so it is written at least once; the row is fenced by attempt.
The answer of a durable job goes with it; then Redis may forget it. While SQL cannot be written (locked, full,
restarting) the batch is held and tried again, and the stream keeps the rest.
"""

from __future__ import annotations

import asyncio

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from scheduler.db.jobs import JobStore
from scheduler.db.session import explain, is_about_a_value
from scheduler.errors import QueueUnavailable
from scheduler.job import JobView
from scheduler.loops.outcome_writer import OutcomeWriter
from scheduler.loops.patience import Patience
from scheduler.queue.done_log import DoneLog, DoneRecord
from scheduler.queue.job_queue import JobQueue
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

CONSUMER = "recorder"  # one name for all: left-over outcomes change hands by idle time, and no name is left behind
BATCH = 500
READ_WAIT_MS = 500

log = get_logger(__name__)


class Recorder:
    """One per scheduler process; `done` has a connection of role "blocking"."""

    def __init__(
        self, done: DoneLog, store: JobStore, writer: OutcomeWriter, queue: JobQueue, settings: Settings
    ) -> None:
        self._done = done
        self._store = store
        self._writer = writer
        self._queue = queue
        self._settings = settings
        self._patience = Patience("recording finished jobs", log)

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
            await self._patience.wait_out(error.message, stop)
            return []

    async def _write(self, records: list[DoneRecord], stop: asyncio.Event) -> bool:
        """Whether all rows are committed; False only when stopped before."""
        while not stop.is_set():
            try:
                await self._store.record([record.job for record in records if not record.job.durable])
                await self._writer.write([record.job for record in records if record.job.durable])
            except ValueError:
                return await self._write_each(records, stop)
            except (SQLAlchemyError, OSError) as error:
                if isinstance(error, DBAPIError) and is_about_a_value(error):
                    return await self._write_each(records, stop)
                await self._patience.wait_out(explain(error, self._settings), stop)
            except QueueUnavailable as error:
                await self._patience.wait_out(error.message, stop)
            else:
                self._patience.recovered()
                return True
        return False

    async def _write_each(self, records: list[DoneRecord], stop: asyncio.Event) -> bool:
        """The batch holds a row that no retry can save: record the others, and say which one is lost."""
        if len(records) > 1:
            return all([await self._write([record], stop) for record in records])
        job = records[0].job
        log.error("a finished job does not fit its table and is not recorded", job=job.id)
        if job.durable:
            await self._give_up(job)
        return True

    async def _give_up(self, job: JobView) -> None:
        """Only what SQL refuses for good is let go; an outage ends the loop, and the record comes again."""
        try:
            await self._writer.give_up(job)
        except ValueError:
            return
        except DBAPIError as error:
            if not is_about_a_value(error):
                raise

    async def _acknowledge(self, records: list[DoneRecord]) -> None:
        durable = [(record.job.id, record.job.attempt) for record in records if record.job.durable]
        try:
            await self._queue.release(durable, self._settings.job_retention_s * 1000)
            await self._done.ack_done([record.entry_id for record in records])
        except QueueUnavailable as error:
            log.warning("recorded jobs will be recorded again", count=len(records), error=error.message)
