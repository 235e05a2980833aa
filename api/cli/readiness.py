"""When `spillway up` may say ready: the API answers, and every worker has published every model."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import httpx2
from redis.exceptions import RedisError

from api.cli.start_view import StartView
from api.cli.supervisor import Supervisor
from scheduler.errors import QueueUnavailable
from scheduler.queue.connection import connect
from scheduler.queue.fleet import Fleet
from scheduler.settings import Settings

_POLL_S = 0.1


class Readiness:
    """Asks the API over HTTP and the fleet registry in Redis (which needs no API key)."""

    def __init__(self, settings: Settings, address: str) -> None:
        self._settings = settings
        # No proxy may come between this machine and itself.
        self._http = httpx2.AsyncClient(base_url=address, timeout=2.0, trust_env=False)
        self._redis = connect(settings, "command")
        self._fleet = Fleet(self._redis, settings)
        self.models: tuple[str, ...] = ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self._http.aclose()
        await self._redis.aclose()

    async def wait(self, supervisor: Supervisor, view: StartView) -> None:
        """Return when everything is there; the supervisor bounds it by giving up on what cannot start."""
        while True:
            workers = await self._workers_ready(supervisor, view)
            if await self._answers("/livez") and not view.is_done("api"):
                view.done("api", str(self._http.base_url))
            if view.has_spoken("scheduler") and not view.is_done("scheduler"):
                view.done("scheduler")
            if workers and view.is_done("scheduler") and await self._answers("/readyz"):
                return
            await asyncio.sleep(_POLL_S)

    async def _answers(self, path: str) -> bool:
        try:
            return (await self._http.get(path)).status_code == httpx2.codes.OK
        except httpx2.TransportError:
            return False

    async def _workers_ready(self, supervisor: Supervisor, view: StartView) -> bool:
        names = {child.pid: name for name, child in supervisor.children.items() if name.startswith("worker")}
        try:
            found = await self._fleet.workers()
            self.models = tuple(card.id for card in await self._fleet.models())
        except (QueueUnavailable, RedisError):
            return False
        serving: dict[str, set[str]] = {}
        for worker in found:
            if worker.pid in names:
                serving.setdefault(names[worker.pid], set()).update(worker.models)
        for name, models in serving.items():
            if len(models) >= len(self._settings.model_refs) and not view.is_done(name):
                view.done(name, ", ".join(sorted(models)))
        return len(names) == self._settings.workers and all(view.is_done(name) for name in names.values())
