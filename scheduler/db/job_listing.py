"""Which jobs a listing shows, out of SQL: ids of durable and of finished jobs, newest first. Called by the API's list.

A durable job that was sent has its truth in Redis, so what is found here is a superset that the caller checks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, or_
from sqlmodel import col, select

from scheduler.db.models import DurableJob, FinishedJob
from scheduler.db.session import Database
from scheduler.job import TERMINAL, JobState, JobView, Priority


@dataclass(frozen=True, slots=True)
class JobFilter:
    """What a listing asks for; None: all. Ids lie in [`first_id`, `before_id`), in the order of their making."""

    first_id: str
    before_id: str
    tenant: str | None = None
    states: frozenset[JobState] | None = None
    model: str | None = None
    priority: Priority | None = None
    batch_id: str | None = None
    schedule_id: str | None = None

    @property
    def wants_live(self) -> bool:
        """Whether jobs that are not terminal are asked for."""
        return self.states is None or bool(self.states - TERMINAL)

    def admits(self, job: JobView, schedule_id: str | None) -> bool:
        """Whether this job, as it is now, is asked for."""
        return (
            self.first_id <= job.id < self.before_id
            and self.tenant in (None, job.tenant)
            and (self.states is None or job.state in self.states)
            and (self.model is None or self.model in (job.model, job.pool))
            and self.priority in (None, job.priority)
            and self.batch_id in (None, job.batch_id)
            and self.schedule_id in (None, schedule_id)
        )


class JobListing:
    """Reads ids; the caller fetches the rows of those that it shows."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ids(self, wanted: JobFilter, before_id: str, limit: int) -> list[str]:
        """Up to `limit` ids below `before_id`, newest first."""
        finished = select(FinishedJob.id).where(*_finished(wanted, before_id))
        durable = select(DurableJob.id).where(*_durable(wanted, before_id))
        async with self._database.session() as session:
            found = set(await session.exec(durable.order_by(col(DurableJob.id).desc()).limit(limit)))
            if wanted.schedule_id is None and wanted.batch_id is None:
                found.update(await session.exec(finished.order_by(col(FinishedJob.id).desc()).limit(limit)))
        return sorted(found, reverse=True)[:limit]


def _finished(wanted: JobFilter, before_id: str) -> list[ColumnElement[bool]]:
    conditions = _common(FinishedJob, wanted, before_id)
    if wanted.model is not None:
        conditions.append(or_(col(FinishedJob.model) == wanted.model, col(FinishedJob.pool) == wanted.model))
    if wanted.priority is not None:
        conditions.append(col(FinishedJob.priority) == wanted.priority.value)
    if wanted.states is not None:
        conditions.append(col(FinishedJob.state).in_(_names(wanted.states)))
    return conditions


def _durable(wanted: JobFilter, before_id: str) -> list[ColumnElement[bool]]:
    """State, priority and model of a sent job are Redis's to say."""
    conditions = _common(DurableJob, wanted, before_id)
    if wanted.batch_id is not None:
        conditions.append(col(DurableJob.batch_id) == wanted.batch_id)
    if wanted.schedule_id is not None:
        conditions.append(col(DurableJob.schedule_id) == wanted.schedule_id)
    at_rest: list[ColumnElement[bool]] = []
    if wanted.states is not None:
        at_rest.append(col(DurableJob.state).in_(_names(wanted.states)))
    if wanted.priority is not None:
        at_rest.append(col(DurableJob.priority) == wanted.priority.value)
    if wanted.model is not None:
        at_rest.append(col(DurableJob.model) == wanted.model)
    if at_rest:
        conditions.append(or_(col(DurableJob.stage) == "sent", and_(*at_rest)))
    return conditions


def _common(table: Any, wanted: JobFilter, before_id: str) -> list[ColumnElement[bool]]:
    conditions = [col(table.id) >= wanted.first_id, col(table.id) < before_id]
    if wanted.tenant is not None:
        conditions.append(col(table.tenant) == wanted.tenant)
    return conditions


def _names(states: frozenset[JobState]) -> Sequence[str]:
    return sorted(state.value for state in states)
