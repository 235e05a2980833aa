"""A worker: one backend, kept running, and the claims of one incarnation after another.

start ──► incarnation ──backend died──► restart it (with a growing pause) ──► next incarnation
              │  └──lease lost──► next incarnation, same backend
              └──drained──► end
"""

from __future__ import annotations

import asyncio
import time

from scheduler.errors import StartupError
from scheduler.lifecycle import Lifecycle
from scheduler.model_card import ModelCard
from scheduler.queue.fleet import Fleet
from scheduler.settings import Settings
from scheduler.telemetry import get_logger
from workers.backend import Backend, BackendDied
from workers.incarnation import Ending, Incarnation, WorkerParts
from workers.shutdown import Shutdown, any_set
from workers.work_bell import WorkBell

_log = get_logger(__name__)

_STEADY_S = 30.0
_MOST_QUICK_DEATHS = 5
_FIRST_PAUSE_S = 0.1


class Consumer:
    """Runs jobs of its backend's pool until the shutdown asks it to end."""

    def __init__(
        self, backend: Backend, lifecycle: Lifecycle, fleet: Fleet, settings: Settings, shutdown: Shutdown
    ) -> None:
        self._parts = WorkerParts(backend, lifecycle, fleet, settings, shutdown, WorkBell(lifecycle))
        self._quick_deaths = 0

    async def run(self) -> None:
        """Start the backend and work; returns when drained. Raises StartupError when the backend cannot run."""
        failure: StartupError | None = None
        try:
            card = await self._first_start()
            if card is None:
                return
            async with asyncio.TaskGroup() as group:
                group.create_task(self._parts.bell.run(card.id))
                try:
                    await self._work(card)
                except StartupError as error:
                    failure = error
                finally:
                    self._parts.bell.close()
        finally:
            await self._parts.backend.close()
        if failure is not None:
            raise failure

    async def _work(self, card: ModelCard | None) -> None:
        while card is not None:
            began_s = time.monotonic()
            ending = await Incarnation(self._parts, card).run()
            match ending:
                case Ending.DRAINED:
                    return
                case Ending.LEASE_LOST:
                    continue
                case Ending.BACKEND_DIED:
                    card = await self._restart(time.monotonic() - began_s)

    async def _first_start(self) -> ModelCard | None:
        try:
            return await self._start()
        except BackendDied as death:
            raise StartupError(str(death)) from death

    async def _start(self) -> ModelCard | None:
        """The backend's card; None where the worker is asked to end before it is there."""
        starting = asyncio.ensure_future(self._parts.backend.start())
        draining = asyncio.ensure_future(self._parts.shutdown.draining.wait())
        try:
            await asyncio.wait({starting, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return None
            card = await starting
        finally:
            for task in (starting, draining):
                task.cancel()
            await asyncio.gather(starting, draining, return_exceptions=True)
        _log.info("worker is ready", model=card.id, context_tokens=card.context_tokens, rows=card.max_rows)
        return card

    async def _restart(self, lived_s: float) -> ModelCard | None:
        """The backend's card, after as many starts as it takes: one that is killed while it loads is a quick death."""
        while True:
            try:
                return await self._start_again(lived_s)
            except BackendDied as death:
                _log.error("backend died while it loaded", reason=str(death))
                lived_s = 0.0

    async def _start_again(self, lived_s: float) -> ModelCard | None:
        await self._parts.backend.close()
        self._quick_deaths = 1 if lived_s >= _STEADY_S else self._quick_deaths + 1
        if self._quick_deaths >= _MOST_QUICK_DEATHS:
            raise StartupError(
                f"The engine died {self._quick_deaths} times within {_STEADY_S:.0f} s of its start; giving up. "
                "Its log lines above say why."
            )
        pause_s = _FIRST_PAUSE_S * 2 ** (self._quick_deaths - 1)
        if await any_set(self._parts.shutdown.draining, timeout_s=pause_s):
            return None
        return await self._start()
