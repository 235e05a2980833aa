"""A raw HTTP/1.1 client: no retries of its own, every broken connection and every silence is told to the caller."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

SILENCE_S = 25.0  # keep-alives come every 2 s, an unreachable Redis costs a look of 3 s more


class Broken(Exception):
    """The connection was refused or broke before the answer's end."""


class Silent(Exception):
    """The server held the connection and said nothing, not even a keep-alive."""


@dataclass(slots=True)
class Answer:
    """An answer whose body is still to be read; `headers` have lower-case names."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader = field(repr=False)

    async def blocks(self) -> AsyncGenerator[bytes]:
        """The body as it comes; raises Broken, Silent."""
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            yield await _within(self.reader.readexactly(int(self.headers.get("content-length", "0"))))
            return
        while size := int((await _within(self.reader.readuntil(b"\r\n"))).strip() or b"0", 16):
            yield (await _within(self.reader.readexactly(size + 2)))[:-2]

    async def events(self, pause_s: float = 0.0) -> AsyncGenerator[dict[str, str]]:
        """SSE events as their fields (comments left out); `pause_s`: how long this client dawdles after each."""
        pending = b""
        async with aclosing(self.blocks()) as blocks:
            async for block in blocks:
                *events, pending = (pending + block).split(b"\n\n")
                for event in filter(None, map(_fields, events)):
                    yield event
                    if pause_s:
                        await asyncio.sleep(pause_s)

    async def whole(self) -> bytes:
        async with aclosing(self.blocks()) as blocks:
            return b"".join([block async for block in blocks])

    async def json(self) -> Any:
        body = await self.whole()
        return json.loads(body) if body else None


@asynccontextmanager
async def exchange(
    port: int, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, limit: int = 65536
) -> AsyncGenerator[Answer]:
    """One request on a connection of its own, closed on leaving; bytes go as they are. Raises Broken, Silent."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit)
    except OSError as error:
        raise Broken(f"connect: {error}") from error
    try:
        writer.write(_request(port, method, path, body, {} if headers is None else headers))
        head = (await _within(reader.readuntil(b"\r\n\r\n"))).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in head[1:] if line)
        yield Answer(int(head[0].split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}, reader)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error
    finally:
        writer.close()


async def call(
    port: int, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    """Status and JSON of a whole answer; raises Broken, Silent."""
    async with exchange(port, method, path, body, headers) as answer:
        return answer.status, await answer.json()


def _request(port: int, method: str, path: str, body: Any, headers: Mapping[str, str]) -> bytes:
    payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close"]
    if body is not None:
        lines.append(f"Content-Length: {len(payload)}")
    if body is not None and not isinstance(body, bytes):
        lines.append("Content-Type: application/json")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + payload


async def _within(reading: Any) -> bytes:
    try:
        async with asyncio.timeout(SILENCE_S):
            return await reading
    except TimeoutError as error:
        raise Silent(f"no byte for {SILENCE_S:g} s") from error
    except (OSError, asyncio.IncompleteReadError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


def _fields(event: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in event.decode().split("\n") if line and not line.startswith(":"))
    return {name: value.removeprefix(" ") for name, _, value in lines}
