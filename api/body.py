"""Reads a request's body in bounded memory and bounded time; called by every route that takes one."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from api.errors import ClientGone, RequestTimeout, UnsupportedEncoding
from scheduler.errors import BodyTooLarge

IDLE_S = 30.0


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge, UnsupportedEncoding, RequestTimeout, or ClientGone in mid-body.

    A body over the limit is refused as soon as that is known; the server discards what the client still sends, so
    that the client reads the answer instead of a reset.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedEncoding(f"Content-Encoding '{encoding[:32]}' is not supported. Send the body uncompressed.")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit_bytes:
        raise _too_large(limit_bytes)
    body = bytearray()
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_S):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            raise RequestTimeout(f"No more of the body arrived within {IDLE_S:g} s.") from error
        except ClientDisconnect as error:
            raise ClientGone("The client closed its connection before the end of its body.") from error
        if chunk is None:
            return bytes(body)
        body += chunk
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than the limit of {limit_bytes} bytes (SPILLWAY_MAX_BODY_BYTES).")
