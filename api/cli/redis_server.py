"""The Redis of `spillway up`: the configured server, or an embedded one that is started, watched and stopped here."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

from scheduler.errors import StartupError
from scheduler.queue.connection import check_server, connect
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.queue.redis_binary import find_redis_binary
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

_LOOK_S = 0.5
_RETRY_S = 5.0

log = get_logger(__name__)
T = TypeVar("T")


class RedisServer:
    """Children find an embedded server by its record in the home, a configured one by their settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._embedded = EmbeddedRedis(settings.home) if settings.redis_url is None else None

    async def start(self) -> str:
        """Returns, in a few words, what answers now; raises StartupError."""
        if self._embedded is None:
            return await self._check_configured()
        await _in_thread(self._embedded.start)
        binary = self._embedded.binary
        assert binary is not None
        return f"embedded, {binary.version_text} from {binary.source}"

    async def keep_running(self) -> None:
        """Start an embedded server again whenever it died; its data comes back from its append-only file."""
        if self._embedded is None:
            return
        delay_s = _LOOK_S
        while True:
            await asyncio.sleep(delay_s)
            delay_s = _LOOK_S
            if self._embedded.alive:
                continue
            log.error("the embedded Redis died and is started again")
            try:
                await _in_thread(self._embedded.stop)
                await _in_thread(self._embedded.start)
            except StartupError as error:
                log.error(error.message)
                delay_s = _RETRY_S

    async def stop(self) -> None:
        """End an embedded server with all its data on disk; harmless where it never started."""
        if self._embedded is not None:
            await _in_thread(self._embedded.stop)

    async def _check_configured(self) -> str:
        redis = connect(self._settings, "command")
        try:
            facts = await check_server(redis)
        finally:
            await redis.aclose()
        return f"SPILLWAY_REDIS_URL, {'.'.join(map(str, facts.version))}"


def offer_to_install() -> None:
    """On a Mac with Homebrew and no redis-server: ask, and install it. Elsewhere the start itself says what to do."""
    brew = shutil.which("brew")
    if sys.platform != "darwin" or brew is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    try:
        find_redis_binary()
    except StartupError as error:
        print(error.message)
        if input("Install it now with `brew install redis`? [Y/n] ").strip().lower() in {"", "y", "yes"}:
            subprocess.run([brew, "install", "redis"], check=False)  # noqa: S603 - asked for


async def _in_thread(work: Callable[[], T]) -> T:
    """Run blocking work; where the caller is cancelled, the work still ends before anything else is done to it."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
