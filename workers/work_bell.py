"""Hears of work for one pool: a bell in Redis, each ring of which wakes one of the workers that listen.

    deaf ──listen──► listening ──a ring, or a second without──► rang, and deaf
                         └──ignore──► deaf, once the call that waits in Redis is back: it may have taken a ring

One per consumer, for all its incarnations: a call that waits in Redis is never cancelled, its ring would be lost.
A bell that rings while nobody listens goes on ringing until somebody does.
"""

from __future__ import annotations

import asyncio

from scheduler.errors import QueueUnavailable
from scheduler.lifecycle import Lifecycle
from workers.shutdown import any_set

_WAIT_S = 1.0
_RETRY_S = 0.5


class WorkBell:
    """`rang` is set when there may be work to claim, by a ring or by whoever else knows of a reason."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.rang = asyncio.Event()
        self._lifecycle = lifecycle
        self._listening = asyncio.Event()
        self._is_full = False
        self._over = asyncio.Event()

    def listen(self, *, full: bool) -> None:
        """For any work, or (`full`) for such as the worker would hand batch jobs back for."""
        self._is_full = full
        self._listening.set()

    def ignore(self) -> None:
        """The next ring is for another worker."""
        self._listening.clear()

    def close(self) -> None:
        """Ends `run`, at the latest when its call is back."""
        self._over.set()
        self._listening.set()

    async def run(self, pool: str) -> None:
        """Listens when asked to, until `close`."""
        while not self._over.is_set():
            await self._listening.wait()
            if self._listening.is_set() and not self._over.is_set():
                await self._hear(pool)

    async def _hear(self, pool: str) -> None:
        try:
            await self._lifecycle.wait_for_work(pool, _WAIT_S, full=self._is_full)
        except QueueUnavailable:
            await any_set(self._over, timeout_s=_RETRY_S)
            return
        self.ignore()
        self.rang.set()
