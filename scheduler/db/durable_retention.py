"""What may go of durable jobs: old ones with request and answer, lines of removed batches; used Idempotency-Keys.

The pruner calls it step by step, as each step keeps other writers waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement
from sqlmodel import col, delete, or_, select, update

from scheduler.batch import BatchStatus
from scheduler.db.durable_rows import Stage
from scheduler.db.models import Batch, DurableJob
from scheduler.db.session import Database

_OPEN = [status.value for status in BatchStatus if not status.is_terminal]


class DurableRetention:
    """Each method handles up to `limit` rows; how many it found. Times are Unix ms."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def prune(self, before_ms: int, limit: int) -> int:
        """Remove jobs that ended before then; the lines of a batch that goes on stay with it."""
        batch_id = col(DurableJob.batch_id)
        going_on = select(Batch.id).where(col(Batch.status).in_(_OPEN))
        over = (col(DurableJob.finished_ms) < before_ms, col(DurableJob.stage) == Stage.DONE.value)
        return await self._remove(limit, *over, or_(batch_id.is_(None), batch_id.not_in(going_on)))

    async def removed_batches(self) -> Sequence[str]:
        """Batches that have lines but no row any more."""
        batch_id = col(DurableJob.batch_id)
        lines = select(batch_id).where(batch_id.is_not(None), batch_id.not_in(select(Batch.id))).distinct()
        async with self._database.session() as session:
            return [name for name in await session.exec(lines) if name is not None]

    async def prune_lines(self, batch_id: str, limit: int) -> int:
        """Remove lines of a batch, whatever their state."""
        return await self._remove(limit, col(DurableJob.batch_id) == batch_id)

    async def forget_keys(self, before_ms: int, limit: int) -> int:
        """Idempotency-Keys of jobs and batches accepted before then may be used anew."""
        found = 0
        async with self._database.session() as session:
            for table in (DurableJob, Batch):
                # Not "is not null": a range lets SQLite read the index instead of the whole table.
                used = (col(table.idempotency) > "", col(table.created_ms) < before_ms)
                some = select(table.id).where(*used).limit(limit)
                forget = update(table).where(col(table.id).in_(some)).values(idempotency=None)
                found += (await session.exec(forget.execution_options(synchronize_session=False))).rowcount
            await session.commit()
        return found

    async def _remove(self, limit: int, *which: ColumnElement[bool]) -> int:
        some = select(DurableJob.id).where(*which).limit(limit)
        remove = delete(DurableJob).where(col(DurableJob.id).in_(some))
        async with self._database.session() as session:
            result = await session.exec(remove.execution_options(synchronize_session=False))
            await session.commit()
        return result.rowcount
