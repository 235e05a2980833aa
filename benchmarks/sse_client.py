"""A load client that costs little: one raw HTTP/1.1 connection per streamed chat completion, timed event by event.

It speaks just enough HTTP for the servers that the benchmarks compare: chunked bodies and bodies that end with the
connection. Official SDKs cost more CPU per token than the servers do and would measure themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec


@dataclass(slots=True)
class StreamTiming:
    """One stream: when it was sent, when each event with text came (perf_counter seconds), and what it said."""

    sent_s: float
    text_at_s: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""
    done: bool = False
    error: str | None = None
    job_id: str = ""  # Spillway's; other servers name none

    @property
    def ttft_s(self) -> float:
        return self.text_at_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.text_at_s, self.text_at_s[1:], strict=False)]


async def stream_chat(host: str, port: int, body: dict[str, object], timeout_s: float = 300.0) -> StreamTiming:
    """Send one streamed chat completion and read it to its end; errors are reported in the timing, not raised."""
    timing = StreamTiming(sent_s=time.perf_counter())
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(_request_bytes(host, port, body))
                await writer.drain()
                await _read_answer(reader, timing)
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    return timing


def _request_bytes(host: str, port: int, body: dict[str, object]) -> bytes:
    payload = msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + payload


async def _read_answer(reader: asyncio.StreamReader, timing: StreamTiming) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    chunked = b"transfer-encoding: chunked" in head.lower()
    timing.job_id = next(
        (line.partition(b":")[2].strip().decode() for line in head.split(b"\r\n") if line.startswith(b"spillway-job:")),
        "",
    )
    if status != 200:
        raise ValueError(f"HTTP {status}: {(await reader.read(500))!r}")
    pending = b""
    async for block in _blocks(reader, chunked):
        now = time.perf_counter()
        pending += block
        *events, pending = pending.split(b"\n\n")
        for event in events:
            _account(event, now, timing)


async def _blocks(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    while chunked:
        size = int((await reader.readline()).strip() or b"0", 16)
        if size == 0:
            return
        yield (await reader.readexactly(size + 2))[:-2]
    while block := await reader.read(65536):
        yield block


def _account(event: bytes, now: float, timing: StreamTiming) -> None:
    if not event.startswith(b"data: "):
        return
    data = event[6:]
    if data == b"[DONE]":
        timing.done = True
        return
    chunk = msgspec.json.decode(data)
    if "error" in chunk:
        raise ValueError(str(chunk["error"]))
    if chunk.get("usage"):
        timing.prompt_tokens = chunk["usage"]["prompt_tokens"]
        timing.completion_tokens = chunk["usage"]["completion_tokens"]
    for choice in chunk.get("choices", ()):
        timing.finish_reason = choice.get("finish_reason") or timing.finish_reason
        piece = choice["delta"].get("content") or choice["delta"].get("reasoning") or ""
        if piece:
            timing.text_at_s.append(now)
            timing.text += piece
