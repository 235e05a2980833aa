"""Recurring jobs in SQL: the API makes and changes them, the recurrence loop takes their turns."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from sqlmodel import col, delete, func, select, update

from scheduler.db.durable import DurableStore, NewDurable
from scheduler.db.models import Schedule
from scheduler.db.session import Database
from scheduler.errors import QueueFull
from scheduler.job import Priority

MAX_SCHEDULES = 500  # of one tenant
MAX_ERROR_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """What its owner decides. `details`: the jobs' metadata, JSON; `body`: the request as the client wrote it."""

    name: str
    cron: str
    timezone: str
    endpoint: str
    body: bytes
    priority: Priority
    deadline_after_ms: int | None = None
    details: str = "{}"
    webhook_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleView:
    """A schedule; times are Unix ms. `next_ms` None: paused, or it has no further turn."""

    id: str
    tenant: str
    spec: ScheduleSpec
    paused: bool
    created_ms: int
    next_ms: int | None
    last_ms: int | None
    last_job_id: str | None
    last_error: str | None


class ScheduleStore:
    """The schedules of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._durable = DurableStore(database)

    async def create(self, tenant: str, spec: ScheduleSpec, next_ms: int | None, *, paused: bool) -> ScheduleView:
        """Raises QueueFull beyond MAX_SCHEDULES."""
        row = Schedule(
            id=f"sched_{secrets.token_hex(12)}",
            tenant=tenant,
            paused=paused,
            created_ms=int(time.time() * 1000),
            next_ms=None if paused else next_ms,
            **_columns(spec),
        )
        async with self._database.session() as session:
            counted = select(func.count()).where(col(Schedule.tenant) == tenant)
            if (await session.exec(counted)).one() >= MAX_SCHEDULES:
                raise QueueFull(f"There are {MAX_SCHEDULES} schedules already; delete one first.")
            session.add(row)
            await session.commit()
        return _view(row)

    async def get(self, schedule_id: str) -> ScheduleView | None:
        async with self._database.session() as session:
            row = await session.get(Schedule, schedule_id)
        return None if row is None else _view(row)

    async def list(self, tenant: str | None) -> list[ScheduleView]:
        """Of one tenant, or all; the newest first."""
        newest = select(Schedule).order_by(col(Schedule.created_ms).desc(), col(Schedule.id))
        if tenant is not None:
            newest = newest.where(col(Schedule.tenant) == tenant)
        async with self._database.session() as session:
            return [_view(row) for row in await session.exec(newest)]

    async def change(
        self, schedule_id: str, spec: ScheduleSpec, next_ms: int | None, *, paused: bool
    ) -> ScheduleView | None:
        """Replace what its owner decides and when it is next due; None: there is no such schedule."""
        values = _columns(spec) | {"paused": paused, "next_ms": None if paused else next_ms, "last_error": None}
        async with self._database.session() as session:
            await session.exec(update(Schedule).where(col(Schedule.id) == schedule_id).values(values))
            await session.commit()
        return await self.get(schedule_id)

    async def delete(self, schedule_id: str) -> bool:
        """Remove it; its jobs stay."""
        async with self._database.session() as session:
            removed = await session.exec(delete(Schedule).where(col(Schedule.id) == schedule_id))
            await session.commit()
        return removed.rowcount == 1

    async def due(self, now_ms: int, limit: int) -> list[ScheduleView]:
        """Schedules whose turn has come, those that wait longest first."""
        waiting = select(Schedule).where(col(Schedule.next_ms) <= now_ms, col(Schedule.paused).is_(False))
        async with self._database.session() as session:
            return [_view(row) for row in await session.exec(waiting.order_by(col(Schedule.next_ms)).limit(limit))]

    async def take_turn(self, schedule: ScheduleView, next_ms: int | None, job: NewDurable | None, error: str) -> bool:
        """Accept the turn's job and move on to the next turn, both or none; False: another scheduler was first.

        `job` None: the turn failed, and `error` says why.
        """
        values: dict[str, Any] = {"next_ms": next_ms, "last_ms": schedule.next_ms}
        values["last_error"] = error[:MAX_ERROR_CHARS] or None
        if job is not None:
            values["last_job_id"] = job.id
        this = (col(Schedule.id) == schedule.id, col(Schedule.next_ms) == schedule.next_ms)
        async with self._database.session() as session:
            moved = await session.exec(update(Schedule).where(*this, col(Schedule.paused).is_(False)).values(values))
            if moved.rowcount == 1 and job is not None:
                await self._durable.add_lines(session, [job])
            await session.commit()
        return moved.rowcount == 1


def _columns(spec: ScheduleSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "cron": spec.cron,
        "timezone": spec.timezone,
        "endpoint": spec.endpoint,
        "body": spec.body,
        "priority": spec.priority.value,
        "deadline_after_ms": spec.deadline_after_ms,
        "details": spec.details,
        "webhook_id": spec.webhook_id,
    }


def _view(row: Schedule) -> ScheduleView:
    spec = ScheduleSpec(
        name=row.name,
        cron=row.cron,
        timezone=row.timezone,
        endpoint=row.endpoint,
        body=row.body,
        priority=Priority(row.priority),
        deadline_after_ms=row.deadline_after_ms,
        details=row.details,
        webhook_id=row.webhook_id,
    )
    return ScheduleView(
        id=row.id,
        tenant=row.tenant,
        spec=spec,
        paused=row.paused,
        created_ms=row.created_ms,
        next_ms=row.next_ms,
        last_ms=row.last_ms,
        last_job_id=row.last_job_id,
        last_error=row.last_error,
    )
