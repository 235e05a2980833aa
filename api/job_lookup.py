"""A job wherever it is: Redis (waiting, running, ended not long ago), its durable row, the record of its end.

Redis knows best what it has; the durable row knows what was asked for. Called by all routes that show or change a job.
While Redis is away, what rests in SQL (held, or over) is shown all the same.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import Depends, Request

from api.auth import Principal, require_principal
from api.protocols.parameters import BadParameter
from api.services import Services
from scheduler.db.durable_rows import DurableView, Stage
from scheduler.errors import JobConflict, JobNotFound, QueueUnavailable
from scheduler.job import JobState, JobView, shard_of

Caller = Annotated[Principal, Depends(require_principal)]


@dataclass(frozen=True, slots=True)
class KnownJob:
    """A job as it is now. `durable` None: it is interactive, or its row was removed by retention.

    `is_redis_away`: nobody could ask Redis, which may have its log.
    """

    view: JobView
    durable: DurableView | None
    in_redis: bool
    is_redis_away: bool = False

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def state(self) -> JobState:
        return self.view.state


async def find_job(services: Services, caller: Principal, job_id: str) -> KnownJob:
    """The job; one that the caller may not see is one that does not exist. Raises JobNotFound."""
    job = await look_up(services, job_id)
    if job is None or not caller.may_see(job.view.tenant):
        raise JobNotFound(f"No job {job_id[:80]!r}.", param="job_id")
    return job


async def look_up(services: Services, job_id: str) -> KnownJob | None:
    try:
        shard = shard_of(job_id)
    except ValueError:
        return None
    try:
        live = await services.queue.view(job_id) if shard == services.settings.shard else None
    except QueueUnavailable:
        job = await _at_rest(services, job_id)
        if job is None:
            raise
        return replace(job, is_redis_away=True)
    if live is not None and not live.durable:
        return KnownJob(live, None, in_redis=True)
    durable = await services.durable.get(job_id)
    recorded = None if live is not None or _is_open(durable) else await services.jobs.get(job_id)
    return merged(live, durable, recorded)


def check_reach(services: Services, job: KnownJob) -> None:
    """Raise JobConflict where another shard's Redis has the job: what is done to it must be done there."""
    shard = shard_of(job.id)
    if shard != services.settings.shard:
        raise JobConflict(
            f"{job.id} runs on shard {shard!r}, and this server on {services.settings.shard!r}; ask there."
        )


async def _at_rest(services: Services, job_id: str) -> KnownJob | None:
    """The job as SQL has it, where Redis has no more to say of it."""
    durable = await services.durable.get(job_id)
    if durable is not None and durable.stage is Stage.SENT:
        return None
    recorded = None if _is_open(durable) else await services.jobs.get(job_id)
    return merged(None, durable, recorded)


def merged(live: JobView | None, durable: DurableView | None, recorded: JobView | None) -> KnownJob | None:
    """One job out of what the places say."""
    if live is not None:
        if durable is not None:
            deadline_ms = live.deadline_ms if durable.deadline_ms is None else durable.deadline_ms
            live = replace(live, created_ms=durable.created_ms, deadline_ms=deadline_ms)
        return KnownJob(live, durable, in_redis=True)
    if durable is None:
        return None if recorded is None else KnownJob(recorded, None, in_redis=False)
    if recorded is not None and recorded.state is durable.state:  # else it is of an earlier try
        return KnownJob(recorded, durable, in_redis=False)
    return KnownJob(_view_of_row(durable), durable, in_redis=False)


def check_query(request: Request, known: Collection[str]) -> None:
    """Refuse a misspelt parameter: a filter that is ignored shows (or replays) what was not asked for."""
    for name in request.query_params:
        if name not in known:
            message = f"Unknown parameter: '{name[:64]}'; known are: {', '.join(known)}."
            raise BadParameter(message, param=name[:64], reason="unknown_parameter")


def _is_open(durable: DurableView | None) -> bool:
    return durable is not None and durable.stage is not Stage.DONE


def _view_of_row(row: DurableView) -> JobView:
    is_later = row.not_before_ms is not None and row.not_before_ms > time.time() * 1000
    return JobView(
        id=row.id,
        state=JobState.SCHEDULED if is_later and row.state is JobState.QUEUED else row.state,
        pool=row.model,
        model=row.model,
        priority=row.priority,
        tenant=row.tenant,
        attempt=row.attempt,
        created_ms=row.created_ms,
        finished_ms=row.finished_ms,
        deadline_ms=row.deadline_ms,
        error_code=row.error_code,
        error_message=row.error_message,
        usage=row.usage if row.state.is_terminal else None,
        durable=True,
        batch_id=row.batch_id,
    )
