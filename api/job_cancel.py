"""Cancels a job wherever it is: held in SQL, waiting or running in Redis."""

from __future__ import annotations

from api.job_lookup import KnownJob
from api.services import Services
from scheduler.errors import JobConflict, JobNotFound, QueueUnavailable
from scheduler.job import JobState


async def cancel(services: Services, job: KnownJob) -> JobState:
    """The state after: CANCELLED, or RUNNING where its worker was told. Raises JobConflict where it is too late."""
    if job.state is JobState.CANCELLED:
        return job.state
    if job.state.is_terminal:
        raise JobConflict(f"{job.id} has already {job.state.value}; there is nothing to cancel.")
    if not job.in_redis and await services.durable.cancel_held(job.id):
        return JobState.CANCELLED
    state = await services.lifecycle.cancel(job.id)
    if state is not None:
        return state
    if job.durable is None:
        raise JobNotFound(f"{job.id} was lost.", param="job_id")
    if await services.durable.cancel_held(job.id):  # it went back to SQL meanwhile
        return JobState.CANCELLED
    raise QueueUnavailable(f"{job.id} is being brought back to the queue; cancel it in a moment.", retry_after_s=5)
