"""Finished jobs in SQL: the recorder writes them, the API and the CLI read them, the pruner removes old ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import delete
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.db.models import FinishedJob, Table
from scheduler.db.session import Database
from scheduler.job import JobState, JobView, Priority
from scheduler.request import Usage

Insert = postgresql.Insert | sqlite.Insert

_LENGTHS = {"pool": 255, "model": 255, "tenant": 128, "error_code": 64, "error_message": 500, "error_param": 255}


class JobStore:
    """The finished jobs of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, jobs: Sequence[JobView]) -> None:
        """Insert or update terminal jobs, all or none. A row of a newer attempt is left as it is."""
        async with self._database.session() as session:
            await record_in(session, jobs)
            await session.commit()

    async def get(self, job_id: str) -> JobView | None:
        """The finished job of this id."""
        async with self._database.session() as session:
            row = await session.get(FinishedJob, job_id)
        return None if row is None else _view(row)

    async def some(self, job_ids: Sequence[str]) -> dict[str, JobView]:
        """Those of these jobs that have finished; at most a few thousand ids."""
        if not job_ids:
            return {}
        async with self._database.session() as session:
            rows = await session.exec(select(FinishedJob).where(col(FinishedJob.id).in_(job_ids)))
            return {row.id: _view(row) for row in rows}

    async def recent(self, limit: int, tenant: str | None = None) -> list[JobView]:
        """The jobs that finished last, newest first; of one tenant where it is given."""
        newest = select(FinishedJob).order_by(col(FinishedJob.finished_ms).desc(), col(FinishedJob.id)).limit(limit)
        if tenant is not None:
            newest = newest.where(FinishedJob.tenant == tenant)
        async with self._database.session() as session:
            return [_view(row) for row in await session.exec(newest)]

    async def prune(self, before_ms: int, limit: int = 1000) -> int:
        """Delete up to `limit` jobs that finished before then; how many. Small steps keep other writers going."""
        old = select(FinishedJob.id).where(FinishedJob.finished_ms < before_ms).limit(limit)
        async with self._database.session() as session:
            result = await session.exec(delete(FinishedJob).where(col(FinishedJob.id).in_(old)))
            await session.commit()
        return result.rowcount


async def record_in(session: AsyncSession, jobs: Sequence[JobView]) -> None:
    """The same inside a transaction of the caller's; raises ValueError where a job is not terminal."""
    rows = list({row["id"]: row for row in sorted(map(_values, jobs), key=_attempt)}.values())
    if rows:
        await (await session.connection()).execute(_upsert(insert_for(session)), rows)


def insert_for(session: AsyncSession) -> Callable[[type[Table]], Insert]:
    """`insert` of the session's database, which both know ON CONFLICT, each in a dialect of its own."""
    return postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert


def _upsert(insert_into: Callable[[type[Table]], Insert]) -> Insert:
    insert = insert_into(FinishedJob)
    return insert.on_conflict_do_update(
        index_elements=["id"],
        set_={name: insert.excluded[name] for name in FinishedJob.model_fields if name != "id"},
        where=col(FinishedJob.attempt) <= insert.excluded["attempt"],
    )


def _attempt(row: dict[str, Any]) -> int:
    return row["attempt"]


def _values(job: JobView) -> dict[str, Any]:
    if not job.state.is_terminal or job.finished_ms is None:
        raise ValueError(f"{job.id} is {job.state}: only finished jobs are recorded")
    usage = job.usage or Usage()
    values: dict[str, Any] = {
        "id": job.id,
        "state": job.state.value,
        "pool": job.pool,
        "model": job.model,
        "priority": job.priority.value,
        "tenant": job.tenant,
        "attempt": job.attempt,
        "created_ms": job.created_ms,
        "started_ms": job.started_ms,
        "first_token_ms": job.first_token_ms,
        "finished_ms": job.finished_ms,
        "deadline_ms": job.deadline_ms,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
        "error_code": job.error_code,
        "error_message": job.error_message,
    }
    return values | {name: bounded(name, values[name]) for name in _LENGTHS.keys() & values.keys()}


def bounded(column: str, value: str | None) -> str | None:
    """A text as its column takes it; PostgreSQL takes no NUL."""
    return None if value is None else value.replace("\0", "\ufffd")[: _LENGTHS[column]]


def _view(row: FinishedJob) -> JobView:
    return JobView(
        id=row.id,
        state=JobState(row.state),
        pool=row.pool,
        model=row.model,
        priority=Priority(row.priority),
        tenant=row.tenant,
        attempt=row.attempt,
        created_ms=row.created_ms,
        started_ms=row.started_ms,
        first_token_ms=row.first_token_ms,
        finished_ms=row.finished_ms,
        deadline_ms=row.deadline_ms,
        error_code=row.error_code,
        error_message=row.error_message,
        usage=Usage(
            prompt_tokens=row.prompt_tokens,
            completion_tokens=row.completion_tokens,
            cached_tokens=row.cached_tokens,
        ),
    )
