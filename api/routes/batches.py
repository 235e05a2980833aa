"""/v1/batches: OpenAI's Batch API. Creating one commits a row; the scheduler reads its file and runs its lines."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from api.auth import Principal, require_principal
from api.body import read_body
from api.named_webhook import named_webhook
from api.protocols.openai_batch import BatchCall, batch_body, parse_batch
from api.protocols.parameters import BadParameter
from api.request_headers import body_digest, read_idempotency_key
from api.responses import json_response
from api.routes.files import BATCH, find_file
from api.routes.models import read_limit
from api.services import Services
from scheduler.batch import EXPAND_BATCH, BatchRecord, BatchStatus, LineCounts, NewBatch
from scheduler.errors import BatchConflict, BatchNotFound, FileNotFound
from scheduler.job import JobState

MAX_LIMIT = 100

Caller = Annotated[Principal, Depends(require_principal)]
router = APIRouter()


@router.post("/v1/batches")
async def create_batch(request: Request, caller: Caller) -> Response:
    """Accept a batch; its lines are judged by the scheduler. A repeated Idempotency-Key is answered by its batch."""
    services: Services = request.app.state.services
    body = await read_body(request, services.settings.max_body_bytes)
    call = parse_batch(body, services.dialect.endpoints)
    key = read_idempotency_key(request.headers)
    digest = "" if key is None else body_digest(body)
    # An earlier batch answers also when its input file or its webhook is gone.
    batch = None if key is None else await services.batches.answering(caller.tenant, key, digest)
    if batch is None:
        await _check_file(services, caller, call.input_file_id)
        webhook_id = await named_webhook(services, caller, call.webhook)
        new = _new_batch(caller.tenant, call, webhook_id, now_ms := int(time.time() * 1000))
        new = replace(new, idempotency_key=key, body_digest=digest)
        batch = await services.batches.create(new, now_ms, services.settings.open_batches_cap)
        await services.kick(EXPAND_BATCH, batch.id)
    return json_response(batch_body(batch, await _counts(services, batch)))


@router.get("/v1/batches")
async def list_batches(
    request: Request, caller: Caller, after: str | None = None, limit: str | None = None
) -> Response:
    """A page of batches, newest first."""
    services: Services = request.app.state.services
    count = read_limit(limit, 20, MAX_LIMIT)
    tenant = None if caller.key_id is None else caller.tenant
    found = await services.batches.list(tenant, after, count + 1)
    page = found[:count]
    return json_response(
        {
            "object": "list",
            "data": [batch_body(batch, await _counts(services, batch)) for batch in page],
            "has_more": len(found) > count,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
        }
    )


@router.get("/v1/batches/{batch_id}")
async def get_batch(request: Request, caller: Caller, batch_id: str) -> Response:
    """One batch, with live counts."""
    services: Services = request.app.state.services
    batch = await _find(services, caller, batch_id)
    return json_response(batch_body(batch, await _counts(services, batch)))


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(request: Request, caller: Caller, batch_id: str) -> Response:
    """Lines that wait end at once, those that run within two decode steps; what is done is kept. May be repeated."""
    services: Services = request.app.state.services
    batch = await _find(services, caller, batch_id)
    while batch.status in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):
        await services.batches.move(batch, BatchStatus.CANCELLING, int(time.time() * 1000))
        batch = await _find(services, caller, batch_id)
    if batch.status not in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
        raise BatchConflict(f"{batch.id} is {batch.status.value}; there is nothing left to cancel.")
    await services.kick(EXPAND_BATCH, batch.id)
    return json_response(batch_body(batch, await _counts(services, batch)))


async def _find(services: Services, caller: Principal, batch_id: str) -> BatchRecord:
    """The batch; one that the caller may not see is one that does not exist."""
    batch = await services.batches.get(batch_id[:64])
    if batch is None or not caller.may_see(batch.tenant):
        raise BatchNotFound(f"No batch found with id '{batch_id[:64]}'.", param="id")
    return batch


async def _check_file(services: Services, caller: Principal, file_id: str) -> None:
    try:
        record = await find_file(services, caller, file_id)
    except FileNotFound as error:
        raise BadParameter(error.message, param="input_file_id", reason="invalid_value") from error
    if record.purpose != BATCH:
        message = f"The file {record.id} has the purpose '{record.purpose}'; the input of a batch has '{BATCH}'."
        raise BadParameter(message, param="input_file_id", reason="invalid_value")


async def _counts(services: Services, batch: BatchRecord) -> LineCounts:
    """How its lines stand now. A batch at its end knows; another one's lines are counted, over an index alone."""
    if batch.status.is_terminal:
        return batch.counts
    found = await services.durable.counts(batch.id)
    completed = found.get(JobState.SUCCEEDED, 0)
    failed = sum(count for state, count in found.items() if state.is_terminal) - completed
    return LineCounts(batch.counts.total, completed, failed)


def _new_batch(tenant: str, call: BatchCall, webhook_id: str | None, now_ms: int) -> NewBatch:
    return NewBatch(
        tenant=tenant,
        endpoint=call.endpoint,
        input_file_id=call.input_file_id,
        completion_window=call.completion_window,
        expires_ms=now_ms + call.window_ms,
        output_expires_after_s=call.output_expires_after_s,
        metadata=call.metadata,
        webhook_id=webhook_id,
    )
