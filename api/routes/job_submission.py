"""POST /v1/jobs: an inference request for later, accepted by committing it to SQL."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from api.auth import Principal
from api.body import read_body
from api.job_lookup import Caller
from api.job_order import AsyncOrder, accept_order, accepted_job, parse_inference
from api.job_result import accepted_response
from api.named_webhook import named_webhook
from api.protocols.native_job import JobCall, parse_job
from api.request_headers import body_digest, read_deadline, read_idempotency_key, read_priority
from api.services import Services
from scheduler.dialect import ParsedCall
from scheduler.errors import UnknownModel

router = APIRouter()


@router.post("/v1/jobs")
async def submit_job(request: Request, caller: Caller) -> Response:
    """202 and the job; 200 where an earlier job with the same Idempotency-Key and body answers."""
    services: Services = request.app.state.services
    body = await read_body(request, services.settings.max_body_bytes)
    now_ms = int(time.time() * 1000)
    call = parse_job(body, now_ms)
    parsed = parse_inference(services, call)
    order = await _order(request, caller, call, parsed, body)
    try:
        accepted = await accept_order(services, order)
    except UnknownModel as error:
        error.param = "body.model"
        raise
    request.state.job_id = accepted.job_id
    return accepted_response(await accepted_job(services, accepted), status=202 if accepted.created else 200)


async def _order(request: Request, caller: Principal, call: JobCall, parsed: ParsedCall, body: bytes) -> AsyncOrder:
    """What the body says goes before what headers say."""
    services: Services = request.app.state.services
    key = read_idempotency_key(request.headers)
    priority = read_priority(request.headers, parsed.priority) if call.priority is None else call.priority
    deadline_ms = call.deadline_ms
    if deadline_ms is None:
        deadline_ms = read_deadline(request.headers, now_ms=int(time.time() * 1000))
    return AsyncOrder(
        endpoint=call.endpoint,
        request=parsed.request,
        tenant=caller.tenant,
        priority=priority,
        not_before_ms=call.not_before_ms,
        deadline_ms=deadline_ms,
        webhook_id=await named_webhook(services, caller, call.webhook),
        metadata=call.metadata,
        idempotency_key=key,
        body_digest="" if key is None else body_digest(body),
    )
