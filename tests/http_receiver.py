"""A real HTTP server on a real port that records what it gets and answers, or misbehaves, as a test scripted."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Received:
    """One request; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Receiver:
    """Each request takes the next behaviour of `script`; the last one stays."""

    port: int
    script: list[Behaviour]
    scheme: str = "http"
    received: list[Received] = field(default_factory=list[Received])
    connections: int = 0
    server_names: list[str | None] = field(default_factory=list[str | None])

    @property
    def origin(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.origin}/hook"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while (request := await _read_request(reader)) is not None:
                self.received.append(request)
                behaviour = self.script[0] if len(self.script) == 1 else self.script.pop(0)
                await behaviour(writer)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def receiving(*script: Behaviour, port: int = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """A receiver that answers 200 where no script is given."""
    receiver = Receiver(port, list(script) or [status(200)], "http" if tls is None else "https")
    handlers: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            await receiver.serve(reader, writer)
        except asyncio.CancelledError:
            writer.close()
        finally:
            handlers.discard(task)

    if tls is not None:
        tls.sni_callback = lambda _socket, name, _context: receiver.server_names.append(name)
    server = await asyncio.start_server(serve, "127.0.0.1", port, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in list(handlers):
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


def status(code: int, body: bytes = b"ok", **headers: str) -> Behaviour:
    """A plain answer; header names are written with underscores."""
    lines = [f"HTTP/1.1 {code} Said", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def raw(data: bytes) -> Behaviour:
    """These bytes, and the connection stays open."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


def cut(data: bytes = b"") -> Behaviour:
    """These bytes, then the connection is reset."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        writer.transport.abort()

    return answer


def drip(piece: bytes, every_s: float) -> Behaviour:
    """An answer that never ends, piece by piece."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
            await asyncio.sleep(every_s)

    return answer


def hang(until: asyncio.Event, then: Behaviour) -> Behaviour:
    """Nothing before the event."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        await until.wait()
        await then(writer)

    return answer


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    if not head[0]:
        return None
    method, path, _ = head[0].split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, path, headers, body)
