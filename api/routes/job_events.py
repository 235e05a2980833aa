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

from api.job_lookup import Caller, check_reach, find_job
from api.job_outlook import opening, outlook, restart_after
from api.protocols.openai_chat_answer import usage_body
from api.protocols.parameters import BadParameter
from api.services import Services
from api.sse import KEEP_ALIVE, EventStream, sse_event
from scheduler.errors import ShuttingDown
from scheduler.queue.token_bus import Subscription
from scheduler.tokens import SEQ_TERMINAL, ChoiceDelta, Delta, EventId, Failed, Finished, Started, TokenEvent

READ_SLICE_S = 1.0
HELD_LOOK_S = 2.0
_HEADERS = {"cache-control": "no-cache"}
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
        if job.state.is_terminal:
            return Response(status_code=204)  # tells an EventSource to stop reconnecting
        after = restart_after(job, after)
    ending = opening(job, after)
    if ending is not None:
        return Response(_line(ending.at, ending.event), headers=_HEADERS, media_type="text/event-stream")
    if not job.state.is_terminal:
        check_reach(services, job)
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
        silence = _Silence(self._services.settings.keepalive_s)
        while not subscription.ended:
            events = await subscription.read(silence.left_s)
            try:
                self._services.drain.check()
            except ShuttingDown:
                return  # the cursor is with the client: it goes on at the next server
            if events:
                yield b"".join(_line(at, event) for at, event in events)
                silence.broken()
            elif silence.look_due:
                found = await outlook(self._services, self._job_id, subscription.last_id)
                if found.ending is not None:
                    yield _line(found.ending.at, found.ending.event)
                if found.over:
                    return
                silence.looked(found.in_redis)
            if silence.comment_due:
                yield KEEP_ALIVE
                silence.commented()


class _Silence:
    """When a silent stream sends a comment, and when it looks whether anything can follow: soon, where only a look
    tells of the end, as a job's that is held in SQL.
    """

    def __init__(self, keepalive_s: float) -> None:
        self._keepalive_s = keepalive_s
        self.looked(in_redis=False)
        self.commented()

    @property
    def left_s(self) -> float:
        left_s = min(self._comment_at, self._look_at) - time.monotonic()
        return min(max(left_s, 0.0), READ_SLICE_S)

    @property
    def look_due(self) -> bool:
        return time.monotonic() >= self._look_at

    @property
    def comment_due(self) -> bool:
        return time.monotonic() >= self._comment_at

    def broken(self) -> None:
        """An event was sent."""
        self.looked(in_redis=True)
        self.commented()

    def looked(self, in_redis: bool) -> None:
        pause_s = self._keepalive_s if in_redis else min(HELD_LOOK_S, self._keepalive_s)
        self._look_at = time.monotonic() + pause_s

    def commented(self) -> None:
        self._comment_at = time.monotonic() + self._keepalive_s


def _read_cursor(request: Request) -> EventId | None:
    text = request.headers.get("last-event-id") or request.query_params.get("after")
    if not text:
        return None
    if _EVENT_ID.fullmatch(text) is None or (at := EventId.parse(text)).seq > SEQ_TERMINAL:
        raise BadParameter(
            f"'{text[:40]}' is no event id; one looks like 1-42.", param="Last-Event-ID", reason="invalid_value"
        )
    return at


def _line(at: EventId, event: TokenEvent) -> bytes:
    return sse_event(str(at), *_named(event))


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
