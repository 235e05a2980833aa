"""An asynchronous job is accepted: its row is committed, then it goes to Redis where that is possible now.

Called by POST /v1/jobs and by requests that prefer an asynchronous answer.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from api.job_lookup import KnownJob, look_up, merged
from api.protocols.native_job import JobCall
from api.protocols.parameters import BadParameter
from api.services import Services
from scheduler.db.durable import Accepted, NewDurable
from scheduler.dialect import ParsedCall
from scheduler.errors import ClientError, InternalError
from scheduler.job import Priority, new_job_id
from scheduler.request import InferenceRequest, encode_request


@dataclass(frozen=True, slots=True)
class AsyncOrder:
    """A request as it goes to the outbox; times are Unix ms."""

    endpoint: str
    request: InferenceRequest
    tenant: str
    priority: Priority
    not_before_ms: int | None = None
    deadline_ms: int | None = None
    webhook_id: str | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    idempotency_key: str | None = None
    body_digest: str = ""


async def accept_order(services: Services, order: AsyncOrder) -> Accepted:
    """Commit the order as a job. Raises IdempotencyMismatch, UnknownModel, QueueFull."""
    new = NewDurable(
        id=new_job_id(services.settings.shard),
        tenant=order.tenant,
        endpoint=order.endpoint,
        model=order.request.model,
        priority=order.priority,
        request=encode_request(order.request),
        created_ms=int(time.time() * 1000),
        details=msgspec.json.encode(order.metadata).decode(),
        not_before_ms=order.not_before_ms,
        deadline_ms=order.deadline_ms,
        idempotency_key=order.idempotency_key,
        body_digest=order.body_digest,
        webhook_id=order.webhook_id,
    )
    return await services.acceptance.accept(new)


async def accepted_job(services: Services, accepted: Accepted) -> KnownJob:
    """The job that answers an order. A new one is shown as SQL has it: Redis may be away, and the job is accepted."""
    if accepted.created:
        job = merged(None, await services.durable.get(accepted.job_id), None)
    else:
        job = await look_up(services, accepted.job_id)
    if job is None:
        raise InternalError(f"{accepted.job_id} was accepted and is gone.")
    return job


def parse_inference(services: Services, call: JobCall) -> ParsedCall:
    """The submission's inference body, as its endpoint reads it; errors name its members from the outside."""
    if call.endpoint not in services.dialect.endpoints:
        known = ", ".join(sorted(services.dialect.endpoints))
        message = f"'{call.endpoint[:64]}' does not run as a job; these do: {known}."
        raise BadParameter(message, param="endpoint", reason="invalid_value")
    with named_from_outside():
        parsed = services.dialect.parse(call.endpoint, call.body, fallback_seed=secrets.randbits(63))
    if parsed.stream:
        raise BadParameter(
            "A job has no stream; leave 'stream' out and read its events at /v1/jobs/{id}/events.",
            param="body.stream",
            reason="invalid_value",
        )
    return parsed


@contextmanager
def named_from_outside() -> Iterator[None]:
    """Errors about the inference body get its place in the submission as their param."""
    try:
        yield
    except ClientError as error:
        error.param = "body" if error.param is None else f"body.{error.param}"
        raise
