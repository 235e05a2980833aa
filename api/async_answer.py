"""An inference request that prefers an asynchronous answer (RFC 7240): a durable job; its answer, if it comes soon."""

from __future__ import annotations

import time

from fastapi import Request, Response

from api.job_lookup import KnownJob, look_up
from api.job_order import AsyncOrder, accept_order, accepted_job
from api.job_result import accepted_response, result_response
from api.request_headers import Preference
from api.services import Services
from api.sse import while_connected
from scheduler.errors import QueueUnavailable

READ_SLICE_S = 1.0  # a waiting request looks up this often, to see whether the server stops


async def answer_asynchronously(request: Request, order: AsyncOrder, preference: Preference) -> Response:
    """202 and the job; the answer itself, or its error, where the job ends within the preference's wait.

    A client that leaves changes nothing for the job.
    """
    services: Services = request.app.state.services
    accepted = await accept_order(services, order)
    request.state.job_id = accepted.job_id
    job = await accepted_job(services, accepted)
    if preference.wait_s is not None:
        job = await while_connected(request.receive, _after(services, job, preference.wait_s))
    if preference.wait_s is None or not job.state.is_terminal:
        response = accepted_response(job)
    else:
        response = await result_response(services, job)
    response.headers.update(preference.applied)
    return response


async def _after(services: Services, job: KnownJob, wait_s: float) -> KnownJob:
    """The job after its end, or after the wait; as it was where Redis went away: it is accepted all the same."""
    try:
        await _ended(services, job.id, wait_s)
        after = await look_up(services, job.id)
    except QueueUnavailable:
        return job
    return job if after is None else after


async def _ended(services: Services, job_id: str, wait_s: float) -> None:
    """Until the job's last event, for `wait_s` at most, or until the server stops."""
    give_up = time.monotonic() + wait_s
    async with services.bus.subscribe(job_id) as subscription:
        while not subscription.ended and not services.drain.begun:
            left = give_up - time.monotonic()
            if left <= 0:
                return
            await subscription.read(min(left, READ_SLICE_S))
