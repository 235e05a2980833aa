"""How a durable job ends in SQL: its row, its place among the finished jobs and its events, in one transaction.

The stores of durable jobs call it inside their own transaction. A row that is done stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement
from sqlmodel import col, update
from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.db.durable_rows import Stage
from scheduler.db.jobs import record_in
from scheduler.db.models import DurableJob
from scheduler.db.webhooks import WebhookEvent, add_events
from scheduler.job import JobState, JobView, Priority


@dataclass(frozen=True, slots=True)
class End:
    """How a job ended that no worker ran. `code` names a class of scheduler/errors.py."""

    state: JobState
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Ids of the jobs that were ended, and of the webhook deliveries that follow: kick them once this is committed."""

    ids: list[str]
    deliveries: list[str]


CANCELLED = End(JobState.CANCELLED, "cancelled", "The job was cancelled.")
EXPIRED = End(JobState.EXPIRED, "deadline_exceeded", "The job's deadline passed before it was done.")


async def end_held(session: AsyncSession, end: End, now_ms: int, *which: ColumnElement[bool]) -> Ended:
    """End those of the chosen rows that are held. Lines of a batch leave no other trace: they never ran."""
    return await end_open(session, end, now_ms, (Stage.HELD,), *which)


async def end_open(
    session: AsyncSession, end: End, now_ms: int, stages: Sequence[Stage], *which: ColumnElement[bool]
) -> Ended:
    """The same for rows of these stages; nobody may run what is ended as `sent`."""
    ended = await session.exec(
        update(DurableJob)
        .where(col(DurableJob.stage).in_([stage.value for stage in stages]), *which)
        .values(
            stage=Stage.DONE.value,
            state=end.state.value,
            finished_ms=now_ms,
            error_code=end.code,
            error_message=end.message,
            error_param=None,
        )
        .returning(
            col(DurableJob.id),
            col(DurableJob.tenant),
            col(DurableJob.model),
            col(DurableJob.priority),
            col(DurableJob.created_ms),
            col(DurableJob.deadline_ms),
            col(DurableJob.attempt),
            col(DurableJob.batch_id),
            col(DurableJob.webhook_id),
        )
        .execution_options(synchronize_session=False)
    )
    rows = ended.all()
    jobs = [_view(row, end, now_ms) for row in rows if row.batch_id is None]
    deliveries = await settle(session, jobs, {row.id: row.webhook_id for row in rows})
    return Ended([row.id for row in rows], deliveries)


async def settle(session: AsyncSession, jobs: Sequence[JobView], webhooks: Mapping[str, str | None]) -> list[str]:
    """What follows from these ends: rows of the finished jobs, and events for whoever wants to be told; the ids of
    their deliveries, which may be kicked once this is committed.

    `webhooks`: by job id, the one endpoint that the job named. Lines of batches are told of by their batch.
    """
    await record_in(session, jobs)
    return await add_events(session, [_event(job, webhooks.get(job.id)) for job in jobs if job.batch_id is None])


def _event(job: JobView, webhook_id: str | None) -> WebhookEvent:
    # A job that is tried again may end the same way again, at another time.
    at_ms = job.created_ms if job.finished_ms is None else job.finished_ms
    return WebhookEvent(f"job.{job.state.value}", job.tenant, job.id, at_ms, turn=at_ms, webhook_id=webhook_id)


def _view(row: Any, end: End, now_ms: int) -> JobView:
    """An ended row's columns as a job."""
    return JobView(
        id=row.id,
        state=end.state,
        pool=row.model,
        model=row.model,
        priority=Priority(row.priority),
        tenant=row.tenant,
        attempt=row.attempt,
        created_ms=row.created_ms,
        finished_ms=now_ms,
        deadline_ms=row.deadline_ms,
        error_code=end.code,
        error_message=end.message,
        durable=True,
    )
