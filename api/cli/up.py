"""`spillway up`: everything on one machine, from an empty home to a ready service, and back to nothing.

home, lock, port ──► redis ──► workers beside database ► scheduler, api ──► ready ──signal──► drain ──► redis stopped

Large imports wait until their step is on the screen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from api.cli.announcement import print_announcement
from api.cli.child import ProcessSpec
from api.cli.home import prepare_home
from api.cli.home_lock import HomeLock
from api.cli.log_relay import LogRelay, print_safely
from api.cli.preflight import address_of, check_port
from api.cli.run_file import (
    ProcessNote,
    RunNote,
    await_leftovers,
    process_started_s,
    remove_run_note,
    write_run_note,
)
from api.cli.start_view import StartView, SteadyConsole
from api.cli.supervisor import Supervisor
from scheduler.errors import StartupError
from scheduler.settings import Settings
from scheduler.telemetry import configure, get_logger

if TYPE_CHECKING:
    from api.cli.redis_server import RedisServer

# A stage has the drain time that its settings promise to clients, and this much to put its things away.
TIDY_S = 5.0

log = get_logger(__name__)


def run_up(settings: Settings) -> None:
    """Run until a signal; raises StartupError with the one line that the user sees."""
    os.umask(0o077)
    address = address_of(settings.host, settings.port)
    prepare_home(settings.home)
    if settings.redis_url is None and sys.platform == "darwin":
        from api.cli.redis_server import offer_to_install

        offer_to_install()
    lock = HomeLock.acquire(settings.home, address)
    relay = LogRelay(settings.home, settings)
    try:
        configure(settings, "up", relay.writer("up"))
        asyncio.run(Up(settings, address, relay).run())
    finally:
        relay.close()
        lock.release()


class Up:
    """One run. `_stop` is the first signal, `_hurry` the second."""

    def __init__(self, settings: Settings, address: str, relay: LogRelay) -> None:
        self._settings = settings
        self._address = address
        self._relay = relay
        self._console = SteadyConsole(highlight=False)
        self._view = StartView(self._console, lambda name: relay.last_words(name).doing)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._database_ready = asyncio.Event()
        self._started_s = time.time()
        self._redis: RedisServer | None = None
        self._supervisor: Supervisor | None = None
        self._ready = False
        self._needs_key = False

    async def run(self) -> None:
        self._relay.quiet = self._console.is_terminal
        with self._signals(), self._view:
            await self._clear_leftovers()
            check_port(self._settings.host, self._settings.port)
            log.info("starting", version=version("spillway"), home=str(self._settings.home), address=self._address)
            try:
                await self._start_redis()
                await self._run_processes()
            except StartupError:
                self._view.fail_rest()
                raise
            finally:
                self._view.close()
                if self._redis is not None:
                    await self._redis.stop()
                remove_run_note(self._settings.home)
                log.info("stopped")
        self._say("Stopped.")

    async def _clear_leftovers(self) -> None:
        found = await asyncio.to_thread(await_leftovers, self._settings.home)
        if found:
            log.warning("the last run was killed; its processes are gone now", processes=found)

    async def _start_redis(self) -> None:
        self._view.working("redis")
        from api.cli.redis_server import RedisServer

        self._redis = RedisServer(self._settings)
        self._view.done("redis", await self._redis.start())

    async def _prepare_database(self) -> None:
        from scheduler.db.keys import KeyStore
        from scheduler.db.schema import migrate
        from scheduler.db.session import Database

        revision = await asyncio.to_thread(migrate, self._settings)
        database = Database(self._settings)
        try:
            self._needs_key = await KeyStore(database).any_keys()
        finally:
            await database.close()
        kind = "SQLite" if self._settings.database_url is None else "PostgreSQL"
        self._view.done("database", f"{kind}, revision {revision}")
        self._database_ready.set()

    async def _run_processes(self) -> None:
        assert self._redis is not None
        if self._stop.is_set():
            return
        specs = process_specs(self._settings, self._database_ready)
        self._supervisor = Supervisor(
            specs,
            child_environment(self._settings),
            self._relay,
            stage_grace_s=self._settings.drain_s + TIDY_S,
            on_change=self._write_note,
        )
        for part in ("database", *(spec.name for spec in specs)):
            self._view.working(part)
        beside = (self._prepare_database, self._announce_when_ready, self._redis.keep_running)
        await self._supervisor.run(beside, self._stop, self._hurry)

    async def _announce_when_ready(self) -> None:
        from api.cli.readiness import Readiness

        supervisor = self._supervisor
        assert supervisor is not None
        readiness = Readiness(self._settings, self._address)
        async with readiness:
            await readiness.wait(supervisor, self._view)
        supervisor.was_ready = self._ready = True
        self._write_note()
        self._view.close()
        log.info("ready", address=self._address, seconds=round(self._view.elapsed_s, 1))
        self._relay.quiet = False
        with contextlib.suppress(OSError):  # the terminal was closed; the service goes on
            print_announcement(
                self._console, self._settings, self._address, readiness.models, needs_key=self._needs_key
            )

    def _write_note(self) -> None:
        supervisor = self._supervisor
        assert supervisor is not None
        processes = [
            ProcessNote(name, child.pid, process_started_s(child.pid), supervisor.history[name].restarts)
            for name, child in supervisor.children.items()
        ]
        note = RunNote(
            pid=os.getpid(),
            version=version("spillway"),
            address=self._address,
            started_s=self._started_s,
            ready=self._ready,
            models=self._settings.model_refs,
            processes=tuple(processes),
        )
        try:
            write_run_note(self._settings.home, note)
        except StartupError as error:  # a full disk must not end what runs
            log.warning(error.message)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        kinds = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` asked to outlive the terminal
            kinds.append(signal.SIGHUP)
        for kind in kinds:
            loop.add_signal_handler(kind, self._on_signal)
        try:
            yield
        finally:
            for kind in kinds:
                loop.remove_signal_handler(kind)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
            return
        self._stop.set()
        self._view.close()
        if self._ready:
            self._say(
                f"Stopping: running answers have up to {self._settings.drain_s:g} s to end. Ctrl-C again stops at once."
            )

    def _say(self, text: str) -> None:
        if self._console.is_terminal:
            print_safely(f"\r{text}")


def process_specs(settings: Settings, database_ready: asyncio.Event) -> tuple[ProcessSpec, ...]:
    """The processes of one machine; workers use no database. The API is stopped first: workers still answer it then."""
    python = (sys.executable, "-m")
    models = tuple(part for ref in settings.model_refs for part in ("--model", ref))
    return (
        ProcessSpec("scheduler", (*python, "api.cli", "scheduler"), 2, database_ready),
        ProcessSpec("api", (*python, "api.cli", "api"), 0, database_ready),
        *(
            ProcessSpec(f"worker-{number}", (*python, "workers", "local", *models), 1)
            for number in range(1, settings.workers + 1)
        ),
    )


def child_environment(settings: Settings) -> dict[str, str]:
    """What children inherit: the settings of this `up`, and an interpreter that trusts no current directory."""
    return {
        **os.environ,
        **settings.as_environment(),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "SPILLWAY_LOG_FORMAT": "json",
    }
