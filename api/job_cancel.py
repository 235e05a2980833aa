"""Cancels a job wherever it is: held in SQL, waiting or running in Redis, lost by Redis."""

from __future__ import annotations

import asyncio

from api.job_lookup import KnownJob, check_reach
from api.services import Services
from scheduler.db.durable_ends import Ended
from scheduler.errors import JobConflict, JobNotFound
from scheduler.job import JobState
from scheduler.webhooks import DELIVER


async def cancel(services: Services, job: KnownJob) -> JobState:
    """The state after: CANCELLED, or RUNNING where its worker was told. Raises JobConflict where it is too late."""
    if job.state.is_terminal:
        return _over(job, job.state)
    if not job.in_redis and (ended := await services.durable.cancel_held(job.id)):
        await _tell(services, ended)
        return JobState.CANCELLED
    check_reach(services, job)
    state = await services.lifecycle.cancel(job.id)
    if state is None:
        return await _cancel_lost(services, job)
    return _over(job, state) if state.is_terminal else state


async def _cancel_lost(services: Services, job: KnownJob) -> JobState:
    """Redis does not know the job, whatever SQL says."""
    if job.durable is None:
        raise JobNotFound(f"{job.id} was lost.", param="job_id")
    if ended := await services.durable.cancel_open(job.id):
        await _tell(services, ended)
        await services.lifecycle.cancel(job.id)  # the stager may have brought it again just before
        return JobState.CANCELLED
    row = await services.durable.get(job.id)
    if row is None:
        raise JobNotFound(f"{job.id} was removed.", param="job_id")
    return _over(job, row.state)


async def _tell(services: Services, ended: Ended) -> None:
    """Have the webhooks of this end sent at once; without it the control plane's sweep finds them."""
    await asyncio.gather(*(services.kick(DELIVER, delivery_id) for delivery_id in ended.deliveries))


def _over(job: KnownJob, state: JobState) -> JobState:
    if state is not JobState.CANCELLED:
        raise JobConflict(f"{job.id} has already {state.value}; there is nothing to cancel.")
    return state
