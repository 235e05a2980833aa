"""Runs the API process: its socket, uvicorn, SIGTERM drain, and the watch on the process that started it."""

from __future__ import annotations

import asyncio
import errno
import math
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn

from api.drain import Drain
from api.main import create_app
from scheduler import telemetry
from scheduler.db.schema import migrate
from scheduler.errors import StartupError
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

BACKLOG = 2048
IDLE_CONNECTION_S = 75
FAREWELL_S = 3  # after the drain: time to write the streams' last event
MAX_HEADER_BYTES = 64 * 1024

log = get_logger(__name__)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartupError in one line where it cannot start."""
    telemetry.configure(settings, "api")
    migrate(settings)
    config = uvicorn.Config("", loop="uvloop")
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        with listening_socket(settings.host, settings.port) as listener:
            config = uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=IDLE_CONNECTION_S,
                timeout_graceful_shutdown=math.ceil(settings.drain_s) + FAREWELL_S,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
            log.info("listening", host=settings.host, port=settings.port)
            await DrainingServer(config, app.state.drain, settings.drain_s).serve([listener])
            log.info("stopped")


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
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
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
