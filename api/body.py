"""Reads a request's body in bounded memory and bounded time; called by every route that takes one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.requests import ClientDisconnect

from api.errors import ClientGone, RequestTimeout, UnsupportedEncoding
from scheduler.errors import BodyTooLarge

IDLE_S = 30.0


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge, UnsupportedEncoding, RequestTimeout, or ClientGone in mid-body."""
    body = bytearray()
    async for chunk in read_chunks(request, limit_bytes, "SPILLWAY_MAX_BODY_BYTES"):
        body += chunk
    return bytes(body)


async def read_chunks(request: Request, limit_bytes: int, setting: str) -> AsyncIterator[bytes]:
    """The body piece by piece, as it arrives; raises as `read_body` does. `setting` is what the limit comes from.

    A body over the limit is refused as soon as that is known; the server discards what the client still sends, so
    that the client reads the answer instead of a reset.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedEncoding(f"Content-Encoding '{encoding[:32]}' is not supported. Send the body uncompressed.")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit_bytes:
        raise _too_large(limit_bytes, setting)
    size = 0
    stream = request.stream()
    while (chunk := await _next_chunk(stream)) is not None:
        size += len(chunk)
        if size > limit_bytes:
            raise _too_large(limit_bytes, setting)
        yield chunk


async def _next_chunk(stream: AsyncIterator[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(IDLE_S):
            return await anext(stream, None)
    except TimeoutError as error:
        raise RequestTimeout(f"No more of the body arrived within {IDLE_S:g} s.") from error
    except ClientDisconnect as error:
        raise ClientGone("The client closed its connection before the end of its body.") from error


def _too_large(limit_bytes: int, setting: str) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than the limit of {limit_bytes} bytes ({setting}).")
