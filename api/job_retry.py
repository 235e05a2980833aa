"""A job that ended without success is accepted once more: same id, next attempt, all tries. Jobs and dead letters."""

from __future__ import annotations

from api.auth import Principal
from api.errors import ResultExpired
from api.job_lookup import KnownJob, check_reach, find_job, look_up
from api.services import Services
from scheduler.errors import JobConflict
from scheduler.job import JobState


async def retry_job(services: Services, caller: Principal, job_id: str) -> KnownJob:
    """The job as it is after. Raises JobNotFound, JobConflict, and ResultExpired where its request is gone."""
    job = await find_job(services, caller, job_id)
    _check(job)
    check_reach(services, job)
    if job.in_redis:
        await _replay(services, job)
    elif job.durable is None or not await services.durable.reopen(job.id, hold=True):
        raise _gone(job)
    after = await look_up(services, job.id)
    return job if after is None else after


async def _replay(services: Services, job: KnownJob) -> None:
    if not await services.job_views.has_body(job.id):
        raise _gone(job)
    if job.durable is not None:
        await services.durable.reopen(job.id)
    state = await services.lifecycle.replay(job.id)
    if state is None:
        raise _gone(job)


def _check(job: KnownJob) -> None:
    if not job.state.is_terminal:
        raise JobConflict(f"{job.id} is {job.state.value}; only a job that ended without success can be tried again.")
    if job.state is JobState.SUCCEEDED:
        raise JobConflict(f"{job.id} has succeeded; send a new job to run it again.")
    if job.view.batch_id is not None:
        raise JobConflict(
            f"{job.id} is a line of {job.view.batch_id}, whose counts and files are not changed any more; "
            "send its request as a new job, or in a new batch."
        )


def _gone(job: KnownJob) -> ResultExpired:
    return ResultExpired(f"The request of {job.id} is no longer kept; send it as a new job.")
