"""Server-sent events: the response that carries them, keep-alive, and noticing that the client went.

OpenAI routes send `data:` only: its SDK fails on an `id:` followed by a comment, so ids are for our own routes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Receive

from api.errors import ClientGone

KEEP_ALIVE = b": keep-alive\n\n"
SEND_TIMEOUT_S = 300.0  # a client that reads nothing for this long is gone

# The library logs every chunk, hence every answer, at debug level.
logging.getLogger("sse_starlette.sse").setLevel(logging.INFO)
# It would cut all streams on SIGTERM; how long they may still run is for drain.py to say.
AppStatus.disable_automatic_graceful_drain()

T = TypeVar("T")


def event_stream(body: AsyncIterator[bytes]) -> EventSourceResponse:
    """A response that sends `body` as it comes. Keep-alives are part of it: only it knows when it is silent."""
    headers = {"cache-control": "no-cache"}
    return EventSourceResponse(body, ping=0, sep="\n", headers=headers, send_timeout=SEND_TIMEOUT_S)


def sse_event(event_id: str, event: str, data: bytes) -> bytes:
    """One event of a native route; `data` is JSON, hence one line."""
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (event_id.encode(), event.encode(), data)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; where the client disconnects first, `work` is cancelled and ClientGone raised.

    Call it after the request's body was read: all that can come then is the disconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("The client closed its connection.")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
