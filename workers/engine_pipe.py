"""One running engine process and the two pipes to it. Knows frames, not jobs; used by local.py only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from workers.engine.protocol import (
    HEADER,
    MAX_FRAME_BYTES,
    FromEngine,
    ToEngine,
    decode_from_engine,
    frame,
)

_CHUNK_BYTES = 1 << 18
_END_WAIT_S = 3.0


class FrameSplitter:
    """Cuts a byte stream into frames, however it arrives."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[FromEngine]:
        """The messages that are whole now; raises ValueError on a stream that is none of frames."""
        self._pending += data
        messages: list[FromEngine] = []
        start = 0
        while len(self._pending) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._pending, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes")
            end = start + HEADER.size + length
            if len(self._pending) < end:
                break
            messages.append(decode_from_engine(bytes(self._pending[start + HEADER.size : end])))
            start = end
        del self._pending[:start]
        return messages


class EnginePipe:
    """A started engine process. It ends when its stdin closes, so it cannot outlive this process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._splitter = FrameSplitter()

    @classmethod
    async def spawn(cls, command: Sequence[str], environment: Mapping[str, str]) -> EnginePipe:
        """Start the process in a session of its own (a terminal's Ctrl-C is for the worker); it logs to our stderr."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            limit=_CHUNK_BYTES,
            start_new_session=True,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def read(self, timeout_s: float) -> list[FromEngine]:
        """Messages that are there, at least one; [] when the process has closed its end. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while data := await self._stdout.read(_CHUNK_BYTES):
                messages = self._splitter.feed(data)
                if messages:
                    return messages
        return []

    async def send(self, message: ToEngine, timeout_s: float) -> None:
        """Write one frame; raises OSError when the process is gone, TimeoutError when it takes nothing any more."""
        self._stdin.write(frame(message))
        async with asyncio.timeout(timeout_s):
            await self._stdin.drain()

    async def exit_status(self) -> int:
        """Its exit status, killing it if it does not end by itself; negative is a signal."""
        try:
            async with asyncio.timeout(_END_WAIT_S):
                return await self._process.wait()
        except TimeoutError:
            return await self.kill()

    async def end(self) -> int:
        """Close its stdin, upon which it ends at once; kill it where it does not."""
        self._stdin.close()
        return await self.exit_status()

    async def kill(self) -> int:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its compilers too
        async with asyncio.timeout(_END_WAIT_S):
            return await self._process.wait()
