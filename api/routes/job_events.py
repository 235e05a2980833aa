"""GET /v1/jobs/{id}/events: a job's log and what follows as SSE, resumable on any replica by the last event's id."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from api.errors import EventsExpired
from api.job_lookup import Caller, find_job
from api.protocols.openai_chat_answer import usage_body
from api.protocols.parameters import BadParameter
from api.services import Services
from api.sse import KEEP_ALIVE, EventStream, sse_event
from scheduler.errors import QueueUnavailable, SpillwayError
from scheduler.queue.token_bus import Subscription
from scheduler.tokens import SEQ_TERMINAL, ChoiceDelta, Delta, EventId, Failed, Finished, Started, TokenEvent

READ_SLICE_S = 1.0
_EVENT_ID = re.compile(r"[0-9]{1,10}-[0-9]{1,10}")
router = APIRouter()


@router.get("/v1/jobs/{job_id}/events")
async def job_events(request: Request, caller: Caller, job_id: str) -> Response:
    """The job's events as SSE; `Last-Event-ID` (or `?after=`) continues behind that event."""
    services: Services = request.app.state.services
    after = _read_cursor(request)
    job = await find_job(services, caller, job_id)
    request.state.job_id = job.id
    if after is not None and after.is_terminal:
        if after.attempt >= job.view.attempt or job.state.is_terminal:
            return Response(status_code=204)  # tells an EventSource to stop reconnecting
        after = EventId(after.attempt, SEQ_TERMINAL + 1)  # tried again since: what follows that end
    if not job.in_redis and job.state.is_terminal:
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
            if job is None:
                durable = await self._services.durable.get(self._job_id)
                return durable is None or durable.state.is_terminal
            if not job.state.is_terminal:
                return False
            return not await queue.read_events(self._job_id, subscription.last_id, 1)
        except QueueUnavailable:
            return False


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


def _choice_body(choice: ChoiceDelta) -> dict[str, Any]:
    return {
        "index": choice.index,
        "token_ids": choice.token_ids,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
    }
