"""How a worker is asked to end: first to drain, then at once. Set by signals and by the parent's death."""

from __future__ import annotations

import asyncio
import contextlib


class Shutdown:
    """`draining`: claim nothing more, finish what runs. `now`: hand back what runs."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.now = asyncio.Event()

    def request(self) -> None:
        """Asked once: drain. Asked again: at once."""
        if self.draining.is_set():
            self.now.set()
        self.draining.set()

    def at_once(self) -> None:
        self.draining.set()
        self.now.set()


async def any_set(*events: asyncio.Event, timeout_s: float) -> bool:
    """Wait until one of the events is set; False after the timeout."""
    if any(event.is_set() for event in events):
        return True
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for wait in waits:
            wait.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*waits, return_exceptions=True)
