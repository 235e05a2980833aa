"""POST /v1/chat/completions: one job per call, relayed as it runs or answered whole."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from starlette.types import Receive, Scope, Send

from api.async_answer import answer_asynchronously
from api.auth import Principal, require_principal
from api.body import read_body
from api.dialect import CHAT
from api.errors import openai_stream_error, problem_of
from api.job_feed import JobFeed, Order, VisibleEvent, error_of, open_feed
from api.job_order import AsyncOrder
from api.protocols.openai_chat import TIER_OF_PRIORITY, ChatCall, parse_chat
from api.protocols.openai_chat_answer import DONE, ChunkEncoder, CompletionBuilder, CompletionHead
from api.protocols.parameters import BadParameter
from api.request_headers import body_digest, read_deadline, read_idempotency_key, read_prefer, read_priority
from api.services import Services
from api.sse import KEEP_ALIVE, EventStream, while_connected
from scheduler.errors import InternalError, SpillwayError
from scheduler.telemetry import get_logger
from scheduler.tokens import Delta, Failed, Finished

router = APIRouter()
log = get_logger(__name__)


@router.post(CHAT)
async def create_chat_completion(
    request: Request, principal: Annotated[Principal, Depends(require_principal)]
) -> Response:
    """OpenAI's chat completions, streamed, whole, or for later (`Prefer: respond-async`)."""
    services: Services = request.app.state.services
    body = await read_body(request, services.settings.max_body_bytes)
    call = parse_chat(body, fallback_seed=secrets.randbits(63))
    if call.ignored:
        log.info("ignored unknown request fields", fields=list(call.ignored))
    order = _order(request, principal, call, body)
    preference = read_prefer(request.headers)
    if preference is not None:
        return await answer_asynchronously(request, _async_order(order, call), preference)
    if call.stream:
        return ChatStream(services, call, order)
    async with open_feed(services, order) as feed:
        request.state.job_id = feed.job_id
        answer = await while_connected(request.receive, _whole_answer(feed, call, order, services.settings.keepalive_s))
        request.state.served_by = feed.served_by
    return Response(answer, media_type="application/json")


class ChatStream(Response):
    """A streamed answer. Until the first token, or the first keep-alive, a failure is a plain HTTP error."""

    def __init__(self, services: Services, call: ChatCall, order: Order) -> None:
        super().__init__()
        self._services = services
        self._call = call
        self._order = order

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with open_feed(self._services, self._order) as feed:
            scope["state"]["job_id"] = feed.job_id
            first = await while_connected(receive, feed.read(self._services.settings.keepalive_s))
            _raise_failure(first)
            scope["state"]["served_by"] = feed.served_by
            async with aclosing(self._chunks(feed, first)) as chunks:
                await EventStream(chunks)(scope, receive, send)

    async def _chunks(self, feed: JobFeed, events: list[VisibleEvent]) -> AsyncGenerator[bytes]:
        silence_s = self._services.settings.keepalive_s
        encoder = ChunkEncoder(_head(feed, self._order), self._call.request.n, self._call.include_usage)
        try:
            while not events:
                yield KEEP_ALIVE
                events = await feed.read(silence_s)
            yield encoder.opening() + self._encode(encoder, events)
            while not feed.ended:
                events = await feed.read(silence_s)
                data = self._encode(encoder, events) if events else KEEP_ALIVE
                if data:
                    yield data
        except SpillwayError as error:
            log.warning("stream ended by an error", job=feed.job_id, code=error.code, error=error.message)
            yield openai_stream_error(problem_of(error))

    def _encode(self, encoder: ChunkEncoder, events: list[VisibleEvent]) -> bytes:
        """All events as one write."""
        parts: list[bytes] = []
        for event in events:
            match event:
                case Delta():
                    parts.append(encoder.delta(event))
                case Finished() if encoder.unfinished:
                    parts.append(openai_stream_error(problem_of(_no_reason(encoder.unfinished))))
                case Finished():
                    if self._call.include_usage:
                        parts.append(encoder.usage(event.usage))
                    parts.append(DONE)
                case Failed():
                    parts.append(openai_stream_error(problem_of(error_of(event))))
        return b"".join(parts)


async def _whole_answer(feed: JobFeed, call: ChatCall, order: Order, silence_s: float) -> bytes:
    builder = CompletionBuilder(call.request.n)
    while True:
        for event in await feed.read(silence_s):
            match event:
                case Delta():
                    builder.add(event)
                case Failed():
                    raise error_of(event)
                case Finished():
                    if builder.unfinished:
                        raise _no_reason(builder.unfinished)
                    return builder.build(_head(feed, order), event.usage, call.request.sampling.logprobs)


def _order(request: Request, principal: Principal, call: ChatCall, body: bytes) -> Order:
    key = read_idempotency_key(request.headers)
    return Order(
        request=call.request,
        tenant=principal.tenant,
        priority=read_priority(request.headers, call.priority),
        deadline_ms=read_deadline(request.headers, now_ms=int(time.time() * 1000)),
        idempotency_key=key,
        body_digest="" if key is None else body_digest(body),
    )


def _async_order(order: Order, call: ChatCall) -> AsyncOrder:
    if call.stream:
        raise BadParameter(
            "An asynchronous answer is no stream; leave 'stream' out, or 'Prefer: respond-async'.",
            param="stream",
            reason="invalid_value",
        )
    return AsyncOrder(
        endpoint=CHAT,
        request=order.request,
        tenant=order.tenant,
        priority=order.priority,
        deadline_ms=order.deadline_ms,
        idempotency_key=order.idempotency_key,
        body_digest=order.body_digest,
    )


def _head(feed: JobFeed, order: Order) -> CompletionHead:
    return CompletionHead(
        id=f"chatcmpl-{feed.job_id.removeprefix('job-')}",
        created_s=feed.created_s,
        model=feed.model,
        service_tier=TIER_OF_PRIORITY[order.priority],
    )


def _raise_failure(events: list[VisibleEvent]) -> None:
    for event in events:
        if isinstance(event, Failed):
            raise error_of(event)


def _no_reason(unfinished: object) -> InternalError:
    return InternalError(f"The job ended, but its choices {unfinished} did not say why.")
