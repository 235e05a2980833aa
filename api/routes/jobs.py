"""/v1/jobs: every request seen as the job it is: list, state, result, cancel, retry, change of priority."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from api.body import read_body
from api.job_cancel import cancel
from api.job_list import read_page
from api.job_lookup import Caller, check_query, find_job, look_up
from api.job_priority import change_priority
from api.job_result import accepted_response, result_response
from api.job_retry import retry_job
from api.job_view import job_body
from api.protocols.native_job import parse_change
from api.request_filters import FILTERS, read_filter
from api.responses import json_response
from api.routes.models import read_limit
from api.services import Services

MAX_LIMIT = 1000
router = APIRouter()


@router.get("/v1/jobs")
async def list_jobs(request: Request, caller: Caller) -> Response:
    """Jobs that the caller may see, newest first, waiting, running and finished; filters as in FILTERS."""
    services: Services = request.app.state.services
    check_query(request, ("limit", *FILTERS))
    limit = read_limit(request.query_params.get("limit"), 20, MAX_LIMIT)
    tenant = None if caller.key_id is None else caller.tenant
    wanted = read_filter(request.query_params, services.settings.shard, tenant)
    page = await read_page(services, wanted, limit)
    return json_response(
        {
            "object": "list",
            "data": [job_body(job) for job in page.jobs],
            "has_more": page.next_id is not None,
            "first_id": page.jobs[0].id if page.jobs else None,
            "last_id": page.jobs[-1].id if page.next_id is None and page.jobs else page.next_id,
        }
    )


@router.get("/v1/jobs/{job_id}")
async def get_job(request: Request, caller: Caller, job_id: str) -> Response:
    """One job."""
    job = await find_job(request.app.state.services, caller, job_id)
    request.state.job_id = job.id
    return json_response(job_body(job))


@router.get("/v1/jobs/{job_id}/result")
async def get_result(request: Request, caller: Caller, job_id: str) -> Response:
    """What the job's endpoint would have answered; 202 and the job while there is neither answer nor error."""
    services: Services = request.app.state.services
    job = await find_job(services, caller, job_id)
    request.state.job_id = job.id
    return await result_response(services, job)


@router.post("/v1/jobs/{job_id}/cancel")
async def cancel_job(request: Request, caller: Caller, job_id: str) -> Response:
    """Cancel a job: at once where it waits, within two decode steps where it runs. Repeating it changes nothing."""
    services: Services = request.app.state.services
    job = await find_job(services, caller, job_id)
    request.state.job_id = job.id
    state = await cancel(services, job)
    after = await look_up(services, job.id)
    shown = replace(job, view=replace(job.view, state=state)) if after is None else after
    return json_response({**job_body(shown), "cancel_requested": True})


@router.post("/v1/jobs/{job_id}/retry")
async def retry(request: Request, caller: Caller, job_id: str) -> Response:
    """Accept a job once more that ended without success: same id, next attempt."""
    job = await retry_job(request.app.state.services, caller, job_id)
    request.state.job_id = job.id
    return accepted_response(job)


@router.patch("/v1/jobs/{job_id}")
async def change_job(request: Request, caller: Caller, job_id: str) -> Response:
    """`{"priority": …}`: a waiting job moves to its new class's end, a running one is charged to it from now on."""
    services: Services = request.app.state.services
    priority = parse_change(await read_body(request, services.settings.max_body_bytes))
    job = await find_job(services, caller, job_id)
    request.state.job_id = job.id
    await change_priority(services, job, priority)
    return json_response(job_body(await find_job(services, caller, job_id)))
