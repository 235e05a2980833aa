"""Ends of durable jobs that Redis ran, written by the recorder: row, finished job and events in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, bindparam
from sqlmodel import and_, col, or_, update
from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.db.durable_ends import settle
from scheduler.db.durable_rows import DurableView, Stage, rows_of, view_of
from scheduler.db.jobs import bounded, record_in
from scheduler.db.models import DurableJob
from scheduler.db.session import Database
from scheduler.job import JobState, JobView
from scheduler.request import Usage


@dataclass(frozen=True, slots=True)
class DurableEnd:
    """How a job ended, as Redis tells it, and the answer's body where it has one."""

    job: JobView
    answer: bytes | None = None
    error_param: str | None = None


class DurableOutcomes:
    """The ends of durable jobs in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def rows(self, job_ids: Sequence[str]) -> dict[str, DurableView]:
        """These jobs with their requests, as far as they are known."""
        wanted = rows_of(with_request=True).where(col(DurableJob.id).in_(job_ids))
        async with self._database.session() as session:
            return {row.id: view_of(row, with_request=True) for row in await session.exec(wanted)}

    async def write(self, ends: Sequence[DurableEnd]) -> list[str]:
        """Write these ends (one per job), all or none; the ids of those that were news. Safe to repeat."""
        if not ends:
            return []
        async with self._database.session() as session:
            webhooks = await _close(session, ends)
            news = [end for end in ends if end.job.id in webhooks]
            if news:
                await (await session.connection()).execute(_fill(), [_values(end) for end in news])
                await settle(session, [end.job for end in news], webhooks)
            await session.commit()
        return [end.job.id for end in news]

    async def write_without_rows(self, jobs: Sequence[JobView]) -> None:
        """Durable jobs that SQL does not know (an older database was put back): only that they ended is kept."""
        async with self._database.session() as session:
            await record_in(session, jobs)
            await session.commit()


def is_news(row: DurableView, job: JobView) -> bool:
    """Whether this end may change this row: an open one, or one that failed and was replayed since."""
    if row.attempt > job.attempt:
        return False
    return row.stage is not Stage.DONE or (row.state is JobState.FAILED and row.attempt < job.attempt)


async def _close(session: AsyncSession, ends: Sequence[DurableEnd]) -> dict[str, str | None]:
    """Close the rows that these ends may change, first of all, so that no other writer is between; their webhooks."""
    ids = col(DurableJob.id).in_([end.job.id for end in ends])
    close = update(DurableJob).where(ids, or_(*(_may_change(end.job) for end in ends)))
    closed = await session.exec(
        close.values(stage=Stage.DONE.value)
        .returning(col(DurableJob.id), col(DurableJob.webhook_id))
        .execution_options(synchronize_session=False)
    )
    return {row.id: row.webhook_id for row in closed.all()}


def _may_change(job: JobView) -> ColumnElement[bool]:
    """As `is_news`; a row that was opened again keeps the time of its old end, which must not end it once more."""
    state, attempt, finished_ms = col(DurableJob.state), col(DurableJob.attempt), col(DurableJob.finished_ms)
    replayed = and_(state == JobState.FAILED.value, attempt < job.attempt)
    return and_(
        col(DurableJob.id) == job.id,
        attempt <= job.attempt,
        or_(finished_ms.is_(None), finished_ms != job.finished_ms),
        or_(col(DurableJob.stage) != Stage.DONE.value, replayed),
    )


def _fill() -> Any:
    names = ("state", "finished_ms", "attempt", "answer", "error_code", "error_message", "error_param")
    tokens = ("prompt_tokens", "completion_tokens", "cached_tokens")
    filled: dict[str, Any] = {name: bindparam(f"new_{name}") for name in (*names, *tokens)}
    return update(DurableJob).where(col(DurableJob.id) == bindparam("row_id")).values(filled)


def _values(end: DurableEnd) -> dict[str, Any]:
    job = end.job
    usage = Usage() if job.usage is None else job.usage
    return {
        "row_id": job.id,
        "new_state": job.state.value,
        "new_finished_ms": job.finished_ms,
        "new_attempt": job.attempt,
        "new_answer": end.answer,
        "new_error_code": bounded("error_code", job.error_code),
        "new_error_message": bounded("error_message", job.error_message),
        "new_error_param": bounded("error_param", end.error_param),
        "new_prompt_tokens": usage.prompt_tokens,
        "new_completion_tokens": usage.completion_tokens,
        "new_cached_tokens": usage.cached_tokens,
    }
