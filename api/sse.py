"""Server-sent events: the response that carries them, keep-alive, and noticing that the client went.

OpenAI routes send `data:` only: its SDK fails on an `id:` followed by a comment, so ids are for our own routes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from sse_starlette.sse import AppStatus, EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from api.errors import ClientGone
from scheduler.telemetry import get_logger

KEEP_ALIVE = b": keep-alive\n\n"
SEND_TIMEOUT_S = 300.0  # a client that reads nothing for this long is gone

# The library logs every chunk, hence every answer, at debug level.
logging.getLogger("sse_starlette.sse").setLevel(logging.INFO)
# It would cut all streams on SIGTERM; how long they may still run is for drain.py to say.
AppStatus.disable_automatic_graceful_drain()

log = get_logger(__name__)
T = TypeVar("T")


class EventStream(EventSourceResponse):
    """sse-starlette's response with a lean loop: the bytes of `body` go out as they come, one write each.

    Keep-alives are part of the body: only it knows when it is silent. The library's own loop opens an anyio cancel
    scope per chunk, a third of a relayed token's cost; here one watchdog per stream sees a client that reads nothing.
    """

    def __init__(self, body: AsyncGenerator[bytes]) -> None:
        headers = {"cache-control": "no-cache"}
        super().__init__(body, ping=0, sep="\n", headers=headers, data_sender_callable=self._watch_sending)
        self._body = body
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError as error:
            log.warning("gave a stream up", reason=str(error))

    async def _stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        clock = asyncio.get_running_loop().time
        async for data in self._body:
            self._sending_since = clock()
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._sending_since = None
        self.active = False
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch_sending(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(SEND_TIMEOUT_S / 10)
            if self._sending_since is not None and clock() - self._sending_since > SEND_TIMEOUT_S:
                raise SendTimeoutError(f"The client read nothing for {SEND_TIMEOUT_S:g} s.")


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
