"""How a loop waits out what it depends on: Redis or SQL away. Told once when it begins and once when it is over."""

from __future__ import annotations

import asyncio
import contextlib

from scheduler.telemetry import Logger

PAUSE_S = 1.0


class Patience:
    """One loop's trouble; `what` completes "… cannot be done now" in its log. Pauses end when `stop` is set."""

    def __init__(self, what: str, log: Logger) -> None:
        self._what = what
        self._log = log
        self._trouble = ""

    async def wait_out(self, trouble: str, stop: asyncio.Event) -> None:
        if trouble != self._trouble:
            self._log.warning(f"{self._what} cannot be done now; trying on", error=trouble)
        self._trouble = trouble
        await self.pause(PAUSE_S, stop)

    def recovered(self) -> None:
        if self._trouble:
            self._log.info(f"{self._what} goes on")
        self._trouble = ""

    @staticmethod
    async def pause(seconds: float, stop: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stop.wait()
