"""Durable jobs in SQL, the outbox: accepted here first, read, cancelled and tried again here. For API and batches.

The stager and the reconciler move rows by outbox_rows.py, the recorder ends them by durable_outcomes.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import func
from sqlmodel import col, or_, select, update
from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.db.durable_ends import CANCELLED, End, Ended, end_held, end_open
from scheduler.db.durable_rows import (
    Accepted,
    DurableView,
    NewDurable,
    Stage,
    idempotency_of,
    rows_of,
    values_of,
    view_of,
)
from scheduler.db.jobs import insert_for
from scheduler.db.models import DurableJob
from scheduler.db.session import Database
from scheduler.errors import IdempotencyMismatch
from scheduler.job import JobState, Priority

__all__ = ["Accepted", "DurableStore", "DurableView", "End", "NewDurable", "Stage"]

LINES_PER_STEP = 1000  # ended in one transaction: other writers wait that long


class DurableStore:
    """The durable jobs of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def accept(self, new: Sequence[NewDurable]) -> list[Accepted]:
        """Commit these jobs, all or none; each is held from now on. Safe to repeat: a known id stays as it is.

        An Idempotency-Key is answered by its job, unless that ended without success, as with interactive requests.
        Raises IdempotencyMismatch where the key was used with another body.
        """
        async with self._database.session() as session:
            await _free_keys(session, new)
            created = await _insert(session, new)
            accepted = [Accepted(job.id, True) if job.id in created else await _earlier(session, job) for job in new]
            await session.commit()
        return accepted

    async def get(self, job_id: str, *, with_answer: bool = False, with_request: bool = False) -> DurableView | None:
        """The job of this id; its large parts where they are asked for."""
        found = await self.of_ids([job_id], with_answer=with_answer, with_request=with_request)
        return found.get(job_id)

    async def of_ids(
        self, job_ids: Sequence[str], *, with_answer: bool = False, with_request: bool = False
    ) -> dict[str, DurableView]:
        """Those of these jobs (at most a few hundred) that are known, by id."""
        large = {"with_answer": with_answer, "with_request": with_request}
        wanted = rows_of(**large).where(col(DurableJob.id).in_(job_ids))
        async with self._database.session() as session:
            return {row.id: view_of(row, **large) for row in await session.exec(wanted)}

    async def list(
        self,
        *,
        tenant: str | None = None,
        state: JobState | None = None,
        model: str | None = None,
        priority: Priority | None = None,
        batch_id: str | None = None,
        schedule_id: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> list[DurableView]:
        """Newest first (by id), behind the id `after`. `state` as SQL has it: running jobs are `queued` here."""
        wanted = {
            "tenant": tenant,
            "state": None if state is None else state.value,
            "model": model,
            "priority": None if priority is None else priority.value,
            "batch_id": batch_id,
            "schedule_id": schedule_id,
        }
        chosen = rows_of().filter_by(**{name: value for name, value in wanted.items() if value is not None})
        if after is not None:
            chosen = chosen.where(col(DurableJob.id) < after)
        async with self._database.session() as session:
            rows = await session.exec(chosen.order_by(col(DurableJob.id).desc()).limit(limit))
            return [view_of(row) for row in rows]

    async def cancel_held(self, job_id: str) -> Ended | None:
        """Cancel a job that is not in Redis yet. None: it is, or it is over, or unknown."""
        return await self._cancel(job_id, Stage.HELD)

    async def cancel_open(self, job_id: str) -> Ended | None:
        """Cancel a job of which Redis knows nothing (any more), sent or not. None: it is over, or unknown."""
        return await self._cancel(job_id, Stage.HELD, Stage.SENT)

    async def _cancel(self, job_id: str, *stages: Stage) -> Ended | None:
        async with self._database.session() as session:
            ended = await end_open(session, CANCELLED, _now_ms(), stages, col(DurableJob.id) == job_id)
            await session.commit()
        return ended if ended.ids else None

    async def reopen(self, job_id: str, *, hold: bool = False) -> bool:
        """A job that did not succeed is tried again: call it before the retry in Redis; False: it is not over.

        `hold`: Redis does not know the job any more, so the stager is to bring it. A deadline that passed is lifted.
        """
        now_ms = _now_ms()
        deadline_ms = col(DurableJob.deadline_ms)
        ended = (col(DurableJob.stage) == Stage.DONE.value, col(DurableJob.state) != JobState.SUCCEEDED.value)
        opened = {
            "stage": (Stage.HELD if hold else Stage.SENT).value,
            "state": JobState.QUEUED.value,
            "error_code": None,
            "error_message": None,
            "error_param": None,
        } | ({"attempt": 0} if hold else {})
        async with self._database.session() as session:
            this = update(DurableJob).where(col(DurableJob.id) == job_id)
            result = await session.exec(this.where(*ended).values(opened))
            if result.rowcount:
                await session.exec(this.where(deadline_ms <= now_ms).values(deadline_ms=None))
            await session.commit()
        return result.rowcount == 1

    async def held_count(self, tenant: str) -> int:
        """How many jobs of this tenant wait in SQL, lines of batches not counted."""
        held = (col(DurableJob.stage) == Stage.HELD.value, col(DurableJob.batch_id).is_(None))
        async with self._database.session() as session:
            found = await session.exec(select(func.count()).where(*held, col(DurableJob.tenant) == tenant))
            return found.one()

    async def add_lines(self, session: AsyncSession, lines: Sequence[NewDurable]) -> None:
        """Insert lines of a batch inside a transaction of the caller's (a few thousand each); a known id stays."""
        if lines:
            insert = insert_for(session)(DurableJob).on_conflict_do_nothing(index_elements=["id"])
            await (await session.connection()).execute(insert, [values_of(line) for line in lines])

    async def last_line(self, batch_id: str) -> int:
        """The highest line of the batch that was added; 0 where none was."""
        async with self._database.session() as session:
            last = select(func.max(col(DurableJob.line))).where(col(DurableJob.batch_id) == batch_id)
            return (await session.exec(last)).one() or 0

    async def lines_among(self, job_ids: Sequence[str]) -> set[str]:
        """Those of these jobs (at most a few hundred) that are lines of a batch."""
        line = select(col(DurableJob.id)).where(col(DurableJob.id).in_(job_ids), col(DurableJob.batch_id).is_not(None))
        async with self._database.session() as session:
            return set(await session.exec(line))

    async def counts(self, batch_id: str) -> dict[JobState, int]:
        """Lines of a batch by state; what is not over counts as queued."""
        state, number = col(DurableJob.state), func.count()
        grouped = select(state, number).where(col(DurableJob.batch_id) == batch_id).group_by(state)
        async with self._database.session() as session:
            found = {JobState(name): count for name, count in await session.exec(grouped)}
        waiting = found.pop(JobState.SCHEDULED, 0) + found.pop(JobState.QUEUED, 0)
        return found | ({JobState.QUEUED: waiting} if waiting else {})

    async def lines(self, batch_id: str, *, succeeded: bool, after_line: int, limit: int) -> list[DurableView]:
        """Lines that are over, in order of line, with answers: those that succeeded, or those that did not."""
        success = JobState.SUCCEEDED.value
        state = col(DurableJob.state)
        chosen = (
            rows_of(with_answer=True)
            .where(col(DurableJob.batch_id) == batch_id, col(DurableJob.stage) == Stage.DONE.value)
            .where(col(DurableJob.line) > after_line, state == success if succeeded else state != success)
            .order_by(col(DurableJob.line))
            .limit(limit)
        )
        async with self._database.session() as session:
            return [view_of(row, with_answer=True) for row in await session.exec(chosen)]

    async def end_held_lines(self, batch_id: str, state: JobState, code: str, message: str) -> int:
        """End every line that is not in Redis, in steps that let other writers in; how many. Safe to repeat."""
        end, total = End(state, code, message), 0
        of_batch = (col(DurableJob.batch_id) == batch_id, col(DurableJob.stage) == Stage.HELD.value)
        some = select(col(DurableJob.id)).where(*of_batch).limit(LINES_PER_STEP)
        while True:
            async with self._database.session() as session:
                ended = await end_held(session, end, _now_ms(), col(DurableJob.id).in_(some))
                await session.commit()
            total += len(ended.ids)
            if len(ended.ids) < LINES_PER_STEP:
                return total

    async def ids_sent(self, batch_id: str, limit: int) -> list[str]:
        """Lines of a batch that Redis has."""
        sent = (col(DurableJob.batch_id) == batch_id, col(DurableJob.stage) == Stage.SENT.value)
        async with self._database.session() as session:
            return list(await session.exec(select(col(DurableJob.id)).where(*sent).limit(limit)))


async def _free_keys(session: AsyncSession, new: Sequence[NewDurable]) -> None:
    """The Idempotency-Key of a job that ended without success is free for the same body: it may be tried anew."""
    for job in new:
        key = idempotency_of(job.tenant, job.idempotency_key)
        if key is None:
            continue
        failed = (col(DurableJob.stage) == Stage.DONE.value, col(DurableJob.state) != JobState.SUCCEEDED.value)
        same = (col(DurableJob.idempotency) == key, col(DurableJob.body_digest) == job.body_digest)
        free = update(DurableJob).where(*same, *failed, col(DurableJob.id) != job.id).values(idempotency=None)
        await session.exec(free.execution_options(synchronize_session=False))


async def _insert(session: AsyncSession, new: Sequence[NewDurable]) -> set[str]:
    if not new:
        return set()
    insert = insert_for(session)(DurableJob).on_conflict_do_nothing().returning(col(DurableJob.id))
    result = await (await session.connection()).execute(insert, [values_of(job) for job in new])
    return set(result.scalars())


async def _earlier(session: AsyncSession, job: NewDurable) -> Accepted:
    key = idempotency_of(job.tenant, job.idempotency_key)
    same_key = col(DurableJob.idempotency) == key if key is not None else None
    same = col(DurableJob.id) == job.id
    found = await session.exec(
        select(col(DurableJob.id), col(DurableJob.body_digest)).where(same if same_key is None else or_(same, same_key))
    )
    (job_id, digest), *_ = found.all()
    if digest != job.body_digest:
        raise IdempotencyMismatch(f"This Idempotency-Key was used with another body (job {job_id}); use a new key")
    return Accepted(job_id, created=job_id == job.id)


def _now_ms() -> int:
    return int(time.time() * 1000)
