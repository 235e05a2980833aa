"""Gives a job that is not over another class, in SQL and in Redis."""

from __future__ import annotations

from api.job_lookup import KnownJob, check_reach
from api.services import Services
from scheduler.db.durable_priority import set_priority
from scheduler.db.durable_rows import Stage
from scheduler.errors import JobConflict
from scheduler.job import JobState, Priority


async def change_priority(services: Services, job: KnownJob, priority: Priority) -> None:
    """Raises JobConflict where the job is over."""
    if job.state.is_terminal:
        raise _too_late(job, job.state)
    if job.durable is not None:
        stage = await set_priority(services.database, job.id, priority)
        if stage is None:
            raise _too_late(job, await _state_now(services, job))
        if stage is Stage.HELD:
            return  # who brings it to Redis finds the new class, at the latest when it marks the row as sent
        check_reach(services, job)
    state = await services.lifecycle.reprioritise(job.id, priority)
    if state is not None and state.is_terminal:
        raise _too_late(job, state)


async def _state_now(services: Services, job: KnownJob) -> JobState:
    row = await services.durable.get(job.id)
    return job.state if row is None else row.state


def _too_late(job: KnownJob, state: JobState) -> JobConflict:
    return JobConflict(f"{job.id} has already {state.value}; its priority does not matter any more.")
