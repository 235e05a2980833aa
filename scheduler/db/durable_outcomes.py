"""Ends of durable jobs that Redis ran, written by the recorder: row, finished job and events in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import bindparam
from sqlalchemy.orm import defer
from sqlmodel import col, select, update
from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.db.durable_ends import settle
from scheduler.db.durable_rows import Stage
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


@dataclass(frozen=True, slots=True)
class Standing:
    """What of a row decides about its end; `finished_ms` is that of its last one, also where it was opened again."""

    stage: Stage
    state: JobState
    attempt: int
    finished_ms: int | None
    webhook_id: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a durable job was asked for."""

    standing: Standing
    endpoint: str
    request: bytes
    created_ms: int


@dataclass(frozen=True, slots=True)
class Written:
    """Ids of the jobs whose ends were news, and of the webhook deliveries that follow."""

    news: list[str] = field(default_factory=list[str])
    deliveries: list[str] = field(default_factory=list[str])


class DurableOutcomes:
    """The ends of durable jobs in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def asked(self, job_ids: Sequence[str]) -> dict[str, Asked]:
        """What these jobs were asked for, as far as they are known."""
        wanted = select(DurableJob).options(defer(cast(Any, col(DurableJob.answer))))
        async with self._database.session() as session:
            rows = await session.exec(wanted.where(col(DurableJob.id).in_(job_ids)))
            return {row.id: _asked(row) for row in rows}

    async def write(self, ends: Sequence[DurableEnd]) -> Written:
        """Write these ends (one per job), all or none. Safe to repeat."""
        if not ends:
            return Written()
        deliveries: list[str] = []
        async with self._database.session() as session:
            rows = await _lock(session, [end.job.id for end in ends])
            news = [end for end in ends if end.job.id in rows and is_news(rows[end.job.id], end.job)]
            if news:
                await (await session.connection()).execute(_fill(), [_values(end) for end in news])
                webhooks = {end.job.id: rows[end.job.id].webhook_id for end in news}
                deliveries = await settle(session, [end.job for end in news], webhooks)
            await session.commit()
        return Written([end.job.id for end in news], deliveries)

    async def write_without_rows(self, jobs: Sequence[JobView]) -> None:
        """Durable jobs that SQL does not know (an older database was put back): only that they ended is kept."""
        async with self._database.session() as session:
            await record_in(session, jobs)
            await session.commit()


def _asked(row: DurableJob) -> Asked:
    standing = Standing(Stage(row.stage), JobState(row.state), row.attempt, row.finished_ms)
    return Asked(standing, row.endpoint, row.request, row.created_ms)


def is_news(row: Standing, job: JobView) -> bool:
    """Whether this end may change this row: an open one, or one that failed and was replayed since.

    A row that was opened again keeps the time of its old end, which must not end it once more.
    """
    if row.attempt > job.attempt or row.finished_ms == job.finished_ms:
        return False
    return row.stage is not Stage.DONE or (row.state is JobState.FAILED and row.attempt < job.attempt)


async def _lock(session: AsyncSession, job_ids: Sequence[str]) -> dict[str, Standing]:
    """How these rows stand. They are written, unchanged, so that nobody else changes them before this ends."""
    stage = col(DurableJob.stage)
    columns = (col(DurableJob.id), stage, col(DurableJob.state), col(DurableJob.attempt), col(DurableJob.finished_ms))
    lock = update(DurableJob).where(col(DurableJob.id).in_(job_ids)).values(stage=stage)
    found = await (await session.connection()).execute(lock.returning(*columns, col(DurableJob.webhook_id)))
    return {
        job_id: Standing(Stage(stage), JobState(state), attempt, finished_ms, webhook_id)
        for job_id, stage, state, attempt, finished_ms, webhook_id in found.all()
    }


def _fill() -> Any:
    names = ("state", "finished_ms", "attempt", "answer", "error_code", "error_message", "error_param")
    tokens = ("prompt_tokens", "completion_tokens", "cached_tokens")
    filled: dict[str, Any] = {"stage": Stage.DONE.value} | {
        name: bindparam(f"new_{name}") for name in (*names, *tokens)
    }
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
