"""The reconciler: what SQL says was sent and what Redis has are brought together again. Every 10 s, and at the start.

A job that Redis lost (FLUSHALL, a restart, a failover) is held again, so that the stager sends it once more. An end
that no recorder wrote (the `done` stream was lost or cut) is written from the job's hash and log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from sqlalchemy.exc import SQLAlchemyError

from scheduler.db.outbox_rows import OutboxRows, SentRow
from scheduler.db.session import explain
from scheduler.errors import QueueUnavailable
from scheduler.loops.outcome_writer import OutcomeWriter
from scheduler.loops.patience import Patience
from scheduler.queue.outcome_reader import OutcomeReader, Standing
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

INTERVAL_S = 10.0
OLDER_THAN_MS = 5000
PAGE = 500

log = get_logger(__name__)


class Reconciler:
    """One per scheduler process; several may run."""

    def __init__(self, rows: OutboxRows, reader: OutcomeReader, writer: OutcomeWriter, settings: Settings) -> None:
        self._rows = rows
        self._reader = reader
        self._writer = writer
        self._settings = settings
        self._unrecorded: set[str] = set()  # had ended at the last round: the recorder had its time

    async def run(self, stop: asyncio.Event) -> None:
        """Reconcile until `stop` is set."""
        patience = Patience("comparing SQL with the queue", log)
        while not stop.is_set():
            try:
                await self.turn(int(time.time() * 1000) - OLDER_THAN_MS)
            except QueueUnavailable as error:
                await patience.wait_out(error.message, stop)
            except (SQLAlchemyError, OSError) as error:
                await patience.wait_out(explain(error, self._settings), stop)
            else:
                patience.recovered()
                await patience.pause(INTERVAL_S, stop)

    async def turn(self, created_before_ms: int) -> None:
        """Look at all jobs that were sent, page by page. Raises QueueUnavailable and SQL's errors."""
        ended: set[str] = set()
        after_id = ""
        while page := await self._rows.sent(after_id, created_before_ms, PAGE):
            after_id = page[-1].id
            standing = await self._reader.standing([row.id for row in page])
            await self._hold_lost(page, standing)
            over = [row for row in page if _is_over(standing.get(row.id))]
            await self._record([row for row in over if row.id in self._unrecorded], standing)
            ended |= {row.id for row in over}
        self._unrecorded = ended

    async def _hold_lost(self, page: Sequence[SentRow], standing: Mapping[str, Standing]) -> None:
        lost = [row.id for row in page if row.id not in standing]
        if lost and (count := await self._rows.hold_again(lost)):
            log.warning("Redis lost jobs; they are sent again", count=count)

    async def _record(self, rows: Sequence[SentRow], standing: Mapping[str, Standing]) -> None:
        """A row that was opened again and whose retry never reached Redis has its old end; others have a new one."""
        old = [row for row in rows if row.finished_ms == standing[row.id].finished_ms]
        new = [row.id for row in rows if row.finished_ms != standing[row.id].finished_ms]
        if new:
            log.warning("ends of jobs were not recorded; they are now", count=len(new))
            await self._writer.write(await self._reader.views(new))
        if old:
            ends = {row.id: (standing[row.id].state, row.finished_ms) for row in old if row.finished_ms is not None}
            log.warning("jobs were to run again, but the queue never heard of it", count=len(ends))
            await self._rows.close_again(ends)


def _is_over(standing: Standing | None) -> bool:
    """Both of them say so: of a job that contradicts itself nothing is recorded."""
    return standing is not None and standing.state.is_terminal and standing.finished_ms is not None
