"""One child process of `spillway up`: out of the terminal's reach, its output relayed, ended with all it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_LINE_LIMIT_BYTES = 256 * 1024
_KILL_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run, once `after` is set. Of two stages, the lower one is stopped first."""

    name: str
    command: tuple[str, ...]
    stage: int
    after: asyncio.Event | None = None


class Child:
    """A started process. `start_new_session` keeps the terminal's Ctrl-C away: only `up` decides who ends when."""

    def __init__(self, process: asyncio.subprocess.Process, output: asyncio.StreamReader) -> None:
        self._process = process
        self._output = output
        self.started_monotonic_s = time.monotonic()

    @classmethod
    async def spawn(cls, spec: ProcessSpec, environment: Mapping[str, str], parent_pipe: int) -> Child:
        """Start the process; `parent_pipe` is the reading end whose end of file means that `up` is gone."""
        reading, writing = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.command,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                env={**environment, "SPILLWAY_PARENT_PIPE": str(parent_pipe)},
                pass_fds=(parent_pipe,),
                start_new_session=True,
            )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        output = asyncio.StreamReader(limit=_LINE_LIMIT_BYTES)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(reading, "rb")
        )
        return cls(process, output)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    @property
    def ran_s(self) -> float:
        return time.monotonic() - self.started_monotonic_s

    async def relay_output(self, take: Callable[[str], None]) -> None:
        """Hand on every line until the process, and whatever it started, has closed its output."""
        while chunk := await self._read_line():
            take(chunk.decode("utf-8", "replace"))

    async def _read_line(self) -> bytes:
        try:
            return await self._output.readuntil(b"\n")
        except asyncio.IncompleteReadError as end:
            return end.partial
        except asyncio.LimitOverrunError as long:
            return await self._output.readexactly(long.consumed)

    async def wait(self) -> int:
        """Its exit status: negative is the signal that ended it."""
        return await self._process.wait()

    def terminate(self) -> None:
        """Ask it to end; its own children are its own business."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    async def ended_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self.wait()
        except TimeoutError:
            return False
        return True

    async def kill_group(self) -> None:
        """End it and everything in its session now; harmless where nothing is left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        await self.ended_within(_KILL_WAIT_S)
