"""Runs the API for main.serve: its socket, uvicorn, SIGTERM drain, and the watch on the process that started it."""

from __future__ import annotations

import asyncio
import errno
import math
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from api.drain import Drain
from scheduler.errors import StartupError
from scheduler.parent_watch import watch
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

BACKLOG = 2048
IDLE_CONNECTION_S = 75
FAREWELL_S = 3  # after the drain: time to write the streams' last event

log = get_logger(__name__)


async def run(app: FastAPI, settings: Settings) -> None:
    """Serve `app` until SIGTERM or SIGINT. Raises StartupError in one line where it cannot start."""
    async with app.router.lifespan_context(app):
        with listening_socket(settings.host, settings.port) as listener:
            server = DrainingServer(uvicorn_config(app, settings), app.state.drain, settings.drain_s)
            log.info("listening", host=settings.host, port=settings.port)
            async with _watching_parent(settings.parent_pipe, server.stop):
                await server.serve([listener])
            log.info("stopped")


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs here: no log of its own, no lifespan (run holds it), a bounded end."""
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_s) + FAREWELL_S,
    )


@asynccontextmanager
async def _watching_parent(pipe: int | None, stop: Callable[[], None]) -> AsyncIterator[None]:
    """Stop when the process that started this one is gone."""
    if pipe is None:
        yield
        return
    watcher = asyncio.create_task(watch(pipe, stop), name="parent-watch")
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


class DrainingServer(uvicorn.Server):
    """On the first signal: accept no more, let open requests run for the drain time. On the second: end at once."""

    def __init__(self, config: uvicorn.Config, drain: Drain, drain_s: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_s = drain_s

    def stop(self) -> None:
        """Begin to stop; called again, stop now."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._drain.begin(self._drain_s)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """uvicorn's own raises the signal again at the end, so that a clean stop would look like a death."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread hears signals; here `stop` is called by whoever runs the server
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


@contextmanager
def listening_socket(host: str, port: int) -> Generator[socket.socket]:
    """A bound socket, closed at the end; raises StartupError naming what is in the way."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # of a name with both, IPv4: what clients and people mean by localhost
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"SPILLWAY_HOST: {host} is no address of this machine ({error.strerror}).") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise _unusable(host, port, error) from error
        yield listener


def _unusable(host: str, port: int, error: OSError) -> StartupError:
    match error.errno:
        case errno.EADDRINUSE:
            return StartupError(f"Port {port} on {host} is in use. Stop what listens there, or choose another --port.")
        case errno.EACCES:
            return StartupError(f"Port {port} needs more rights than this user has. Choose one above 1023.")
        case _:
            return StartupError(f"Cannot listen on {host}:{port}: {error.strerror}.")
