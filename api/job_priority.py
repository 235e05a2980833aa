"""Gives a job that is not over another class, in SQL and in Redis."""

from __future__ import annotations

from api.job_lookup import KnownJob
from api.services import Services
from scheduler.db.durable_priority import set_priority
from scheduler.db.durable_rows import Stage
from scheduler.errors import JobConflict
from scheduler.job import JobState, Priority


async def change_priority(services: Services, job: KnownJob, priority: Priority) -> None:
    """Raises JobConflict where the job is over."""
    if job.state.is_terminal:
        raise _too_late(job, job.state)
    if job.durable is None:
        state = await services.lifecycle.reprioritise(job.id, priority)
    else:
        stage = await set_priority(services.database, job.id, priority)
        state = await services.lifecycle.reprioritise(job.id, priority)
        if state is None and stage is Stage.HELD:
            # The stager may have read the old class just before, and have brought the job just now.
            state = await services.lifecycle.reprioritise(job.id, priority)
    if state is not None and state.is_terminal:
        raise _too_late(job, state)


def _too_late(job: KnownJob, state: JobState) -> JobConflict:
    return JobConflict(f"{job.id} has already {state.value}; its priority does not matter any more.")
