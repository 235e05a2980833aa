"""/v1/jobs: every request seen as the job it is: state, attempts, timings, events, cancel."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from starlette.types import Receive, Scope, Send

from api.auth import Principal, require_principal
from api.errors import EventsExpired
from api.protocols.openai_chat_answer import usage_body
from api.protocols.parameters import BadParameter
from api.responses import json_response
from api.routes.models import read_limit
from api.services import Services
from api.sse import KEEP_ALIVE, EventStream, sse_event
from scheduler.errors import JobConflict, JobNotFound, QueueUnavailable, SpillwayError
from scheduler.job import JobState, JobView, shard_of
from scheduler.queue.token_bus import Subscription
from scheduler.tokens import SEQ_TERMINAL, Delta, EventId, Failed, Finished, Started, TokenEvent

MAX_LIMIT = 1000
READ_SLICE_S = 1.0
_EVENT_ID = re.compile(r"[0-9]{1,10}-[0-9]{1,10}")
Caller = Annotated[Principal, Depends(require_principal)]
router = APIRouter()


@router.get("/v1/jobs")
async def list_jobs(request: Request, caller: Caller, limit: str | None = None) -> Response:
    """The newest jobs that the caller may see, waiting, running and finished."""
    services: Services = request.app.state.services
    count = read_limit(limit, 20, MAX_LIMIT)
    live = [job for job in await services.queue.list_jobs(MAX_LIMIT) if caller.may_see(job.tenant)]
    finished = await services.jobs.recent(count + 1, None if caller.key_id is None else caller.tenant)
    jobs = {job.id: job for job in (*live, *finished)}
    newest = sorted(jobs.values(), key=lambda job: (job.created_ms, job.id), reverse=True)
    body = {"object": "list", "data": [job_body(job) for job in newest[:count]], "has_more": len(newest) > count}
    return json_response(body)


@router.get("/v1/jobs/{job_id}")
async def get_job(request: Request, caller: Caller, job_id: str) -> Response:
    """One job."""
    request.state.job_id = (job := await _find(request, caller, job_id)).id
    return json_response(job_body(job))


@router.post("/v1/jobs/{job_id}/cancel")
async def cancel_job(request: Request, caller: Caller, job_id: str) -> Response:
    """Cancel a job: at once where it waits, within two decode steps where it runs. Repeating it changes nothing."""
    services: Services = request.app.state.services
    job = await _find(request, caller, job_id)
    request.state.job_id = job.id
    if job.state.is_terminal and job.state is not JobState.CANCELLED:
        raise JobConflict(f"{job.id} has already {job.state.value}; there is nothing to cancel.")
    state = await services.lifecycle.cancel(job.id)
    after = await services.queue.view(job.id)
    shown = replace(job, state=job.state if state is None else state) if after is None else after
    return json_response({**job_body(shown), "cancel_requested": True})


@router.get("/v1/jobs/{job_id}/events")
async def job_events(request: Request, caller: Caller, job_id: str) -> Response:
    """The job's events as SSE; `Last-Event-ID` (or `?after=`) continues behind that event."""
    services: Services = request.app.state.services
    after = _read_cursor(request)
    job = await _find(request, caller, job_id)
    request.state.job_id = job.id
    if after is not None and after.is_terminal:
        return Response(status_code=204)  # tells an EventSource to stop reconnecting
    if await services.queue.view(job.id) is None:
        raise EventsExpired(f"The events of {job.id} are no longer kept; its record is at /v1/jobs/{job.id}.")
    return EventsStream(services, job.id, after)


class EventsStream(Response):
    """Relays one job's log and what follows; a reader that leaves changes nothing for the job."""

    def __init__(self, services: Services, job_id: str, after: EventId | None) -> None:
        super().__init__()
        self._services = services
        self._job_id = job_id
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with (
            self._services.bus.subscribe(self._job_id, self._after) as subscription,
            aclosing(self._lines(subscription)) as lines,
        ):
            await EventStream(lines)(scope, receive, send)

    async def _lines(self, subscription: Subscription) -> AsyncGenerator[bytes]:
        keepalive_s = self._services.settings.keepalive_s
        written = time.monotonic()
        while not subscription.ended:
            left = written + keepalive_s - time.monotonic()
            events = await subscription.read(min(max(left, 0.0), READ_SLICE_S))
            try:
                self._services.drain.check()
            except SpillwayError:
                return  # the cursor is with the client: it goes on at the next server
            if events:
                yield b"".join(sse_event(str(at), *_named(event)) for at, event in events)
            elif left > 0:
                continue
            elif await self._over(subscription):
                return
            else:
                yield KEEP_ALIVE
            written = time.monotonic()

    async def _over(self, subscription: Subscription) -> bool:
        """After a long silence: whether nothing can follow any more, the job being lost, or done before the cursor."""
        queue = self._services.queue
        try:
            job = await queue.view(self._job_id)
            if job is None or not job.state.is_terminal:
                return job is None
            return not await queue.read_events(self._job_id, subscription.last_id, 1)
        except QueueUnavailable:
            return False


def job_body(job: JobView) -> dict[str, Any]:
    """A job as JSON; times are Unix ms, durations ms, null where not reached."""
    error = None if job.error_code is None else {"code": job.error_code, "message": job.error_message}
    return {
        "id": job.id,
        "object": "job",
        "state": job.state.value,
        "model": job.model,
        "pool": job.pool,
        "priority": job.priority.value,
        "tenant": job.tenant,
        "attempt": job.attempt,
        "attempts": [
            {"attempt": attempt.attempt, "worker": attempt.worker, "started_ms": attempt.started_ms}
            for attempt in job.attempts
        ],
        "created_ms": job.created_ms,
        "started_ms": job.started_ms,
        "first_token_ms": job.first_token_ms,
        "finished_ms": job.finished_ms,
        "deadline_ms": job.deadline_ms,
        "timings": {
            "queued_ms": _between(job.created_ms, job.started_ms),
            "first_token_ms": _between(job.created_ms, job.first_token_ms),
            "total_ms": _between(job.created_ms, job.finished_ms),
        },
        "usage": None if job.usage is None else usage_body(job.usage),
        "error": error,
    }


async def _find(request: Request, caller: Principal, job_id: str) -> JobView:
    """The job, live or from SQL; one that the caller may not see is one that does not exist."""
    services: Services = request.app.state.services
    error = JobNotFound(f"No job {job_id[:80]!r}.", param="job_id")
    try:
        shard = shard_of(job_id)
    except ValueError:
        raise error from None
    job = await services.queue.view(job_id) if shard == services.settings.shard else None
    if job is None:
        job = await services.jobs.get(job_id)
    if job is None or not caller.may_see(job.tenant):
        raise error
    return job


def _read_cursor(request: Request) -> EventId | None:
    text = request.headers.get("last-event-id") or request.query_params.get("after")
    if not text:
        return None
    if _EVENT_ID.fullmatch(text) is None or (at := EventId.parse(text)).seq > SEQ_TERMINAL:
        raise BadParameter(
            f"'{text[:40]}' is no event id; one looks like 1-42.", param="Last-Event-ID", reason="invalid_value"
        )
    return at


def _named(event: TokenEvent) -> tuple[str, bytes]:
    """An event's name and its data as JSON."""
    match event:
        case Started():
            return "started", msgspec.json.encode({"worker": event.worker, "at_ms": event.at_ms})
        case Delta():
            return "delta", msgspec.json.encode({"choices": [_choice_body(choice) for choice in event.choices]})
        case Finished():
            return "finished", msgspec.json.encode({"usage": usage_body(event.usage)})
        case Failed():
            return "failed", msgspec.json.encode(
                {"error": {"code": event.code, "message": event.message, "param": event.param}}
            )


def _choice_body(choice: Any) -> dict[str, Any]:
    return {
        "index": choice.index,
        "token_ids": choice.token_ids,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
    }


def _between(start_ms: int, end_ms: int | None) -> int | None:
    return None if end_ms is None else max(0, end_ms - start_ms)
