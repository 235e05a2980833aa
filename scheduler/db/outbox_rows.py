"""Rows of durable jobs on their way to Redis and back: what is due, what was sent, what got lost. For outbox, stager
and reconciler; each looks at the jobs of its own shard only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, SQLColumnExpression, func
from sqlmodel import and_, col, not_, or_, select, update

from scheduler.batch import BatchStatus
from scheduler.db.durable_ends import EXPIRED, End, end_held
from scheduler.db.durable_rows import DurableView, Stage, rows_of, view_of
from scheduler.db.models import Batch, DurableJob
from scheduler.db.session import Database
from scheduler.job import JobState, Priority

Route = tuple[str, Priority]  # the model as the client named it, and the class

_is_held = col(DurableJob.stage) == Stage.HELD.value
_is_sent = col(DurableJob.stage) == Stage.SENT.value
_id = col(DurableJob.id)


@dataclass(frozen=True, slots=True)
class SentRow:
    """A job that was sent. `finished_ms`: when it ended before it was opened again, by Redis's clock."""

    id: str
    finished_ms: int | None


class OutboxRows:
    """The durable jobs of one shard, as those see them who move them."""

    def __init__(self, database: Database, shard: str) -> None:
        self._database = database
        self._mine = _id.startswith(f"job-{shard}-", autoescape=True)

    async def due(self, before_ms: int, paused: Collection[Route], limit: int) -> list[DurableView]:
        """Held jobs of no batch whose time comes before then, oldest first, with their requests."""
        in_time = (col(DurableJob.batch_id).is_(None), col(DurableJob.not_before_ms) <= before_ms)
        return await self._held(col(DurableJob.not_before_ms), limit, *in_time, *_passing(paused))

    async def held_lines(self, batch_id: str, paused: Collection[Route], limit: int) -> list[DurableView]:
        """Held lines of a batch in their order, with their requests."""
        of_batch = col(DurableJob.batch_id) == batch_id
        return await self._held(col(DurableJob.line), limit, of_batch, *_passing(paused))

    async def running_batches(self) -> dict[str, int]:
        """Batches in progress, oldest first, and how many of their lines Redis has."""
        batches = select(Batch.id).where(Batch.status == BatchStatus.IN_PROGRESS.value).order_by(col(Batch.id))
        async with self._database.session() as session:
            ids = (await session.exec(batches)).all()
            if not ids:
                return {}
            batch_id = col(DurableJob.batch_id)
            sent = select(batch_id, func.count()).where(_is_sent, batch_id.in_(ids)).group_by(batch_id)
            counted = {name: count for name, count in await session.exec(sent)}
        return {name: counted.get(name, 0) for name in ids}

    async def mark_sent(self, job_ids: Sequence[str]) -> dict[str, Priority]:
        """Redis has these now; those that were still held, with the class that each has by now."""
        mark = update(DurableJob).where(_is_held, _id.in_(job_ids)).values(stage=Stage.SENT.value)
        mark = mark.values(state=JobState.QUEUED.value).returning(_id, col(DurableJob.priority))
        async with self._database.session() as session:
            marked = (await session.exec(mark.execution_options(**_PLAIN))).all()
            await session.commit()
        return {job_id: Priority(name) for job_id, name in marked}

    async def standing(self, job_ids: Collection[str]) -> dict[str, tuple[Stage, Priority]]:
        """How these jobs stand."""
        rows = select(_id, col(DurableJob.stage), col(DurableJob.priority)).where(_id.in_(job_ids))
        async with self._database.session() as session:
            return {job_id: (Stage(stage), Priority(name)) for job_id, stage, name in await session.exec(rows)}

    async def end_held(self, job_ids: Collection[str], end: End, now_ms: int) -> list[str]:
        """End those of these that are held; their ids."""
        async with self._database.session() as session:
            ended = await end_held(session, end, now_ms, _id.in_(job_ids))
            await session.commit()
        return ended.ids

    async def expire(self, now_ms: int, limit: int) -> int:
        """End held jobs of no batch whose deadline passed; how many. Batches see to their lines themselves."""
        late = (_is_held, col(DurableJob.batch_id).is_(None), col(DurableJob.deadline_ms) <= now_ms, self._mine)
        async with self._database.session() as session:
            ids = (await session.exec(select(_id).where(*late).limit(limit))).all()
        return len(await self.end_held(ids, EXPIRED, now_ms)) if ids else 0

    async def sent(self, after_id: str, created_before_ms: int, limit: int) -> list[SentRow]:
        """Jobs that Redis should have, by id."""
        page = select(_id, col(DurableJob.finished_ms)).where(
            _is_sent, _id > after_id, col(DurableJob.created_ms) <= created_before_ms, self._mine
        )
        async with self._database.session() as session:
            return [SentRow(*row) for row in await session.exec(page.order_by(_id).limit(limit))]

    async def hold_again(self, job_ids: Collection[str]) -> int:
        """Redis lost these: they are to be sent once more, and their attempts count from the first again."""
        async with self._database.session() as session:
            again = update(DurableJob).where(_is_sent, _id.in_(job_ids)).values(stage=Stage.HELD.value, attempt=0)
            result = await session.exec(again)
            await session.commit()
        return result.rowcount

    async def close_again(self, ended: Mapping[str, tuple[JobState, int]]) -> int:
        """Jobs that were opened again while Redis has only their old end (state and time): that end stands."""
        closed = 0
        async with self._database.session() as session:
            for job_id, (state, finished_ms) in ended.items():
                this = and_(_is_sent, _id == job_id, col(DurableJob.finished_ms) == finished_ms)
                close = update(DurableJob).where(this).values(stage=Stage.DONE.value, state=state.value)
                closed += (await session.exec(close)).rowcount
            await session.commit()
        return closed

    async def _held(
        self, order: SQLColumnExpression[int | None], limit: int, *which: ColumnElement[bool]
    ) -> list[DurableView]:
        chosen = rows_of(with_request=True).where(_is_held, *which, self._mine).order_by(order).limit(limit)
        async with self._database.session() as session:
            return [view_of(row, with_request=True) for row in await session.exec(chosen)]


_PLAIN = {"synchronize_session": False}


def _passing(paused: Collection[Route]) -> list[ColumnElement[bool]]:
    """Not those that Redis would refuse now."""
    model, priority = col(DurableJob.model), col(DurableJob.priority)
    routes = [and_(model == name, priority == class_.value) for name, class_ in paused]
    return [not_(or_(*routes))] if routes else []
