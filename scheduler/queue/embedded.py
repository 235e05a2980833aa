"""A redis-server of our own for one home: private unix socket, append-only file, no TCP port. `spillway up` runs it.

    stopped ──start──► (guard ► redis-server, loading) ──PONG──► running ──stop, or the owner dies──► stopped

Calls are synchronous and bounded; from asyncio use `asyncio.to_thread`. The guard (redis_guard.py) is the server's
parent and ends it when the owner is gone, kill -9 included. A lock in the home, held by owner and guard together,
keeps two servers off the same data. After a crash of both, the next start ends the orphan and removes its leavings.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from scheduler.errors import StartupError
from scheduler.queue import redis_guard
from scheduler.queue.connection import EMBEDDED_STATE
from scheduler.queue.redis_binary import RedisBinary, find_redis_binary

_LONGEST_SOCKET_PATH = 100  # bytes; sun_path holds 104 on macOS, 108 on Linux
_SOCKET_DIR_PREFIX = "spillway-redis-"
_LOG_ROTATE_BYTES = 8 * 2**20
_LOCK_S = 20.0
_LOADING_S = 300.0
_POLL_S = 0.02
DEFAULT_MAXMEMORY_BYTES = 2**30


class EmbeddedRedis:
    """One server for one home. start() after stop(), or after the server died, brings it back at the same URL."""

    def __init__(self, home: Path, maxmemory_bytes: int = DEFAULT_MAXMEMORY_BYTES) -> None:
        self._folder = home / "redis"
        self._state = home / EMBEDDED_STATE
        self._log = home / "logs" / "redis.log"
        self._maxmemory_bytes = maxmemory_bytes
        self._guard: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._socket = _socket_path(self._folder)
        self.binary: RedisBinary | None = None
        self.pid: int | None = None

    @property
    def url(self) -> str:
        """For SPILLWAY_REDIS_URL; it stays the same over restarts of this object's server."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def alive(self) -> bool:
        """Whether the server's process lives."""
        return self._guard is not None and self._guard.poll() is None

    def start(self) -> None:
        """Returns when the server answers, its data loaded. Raises StartupError in one line."""
        if self.alive:
            return
        self.stop()
        self.binary = find_redis_binary()
        try:
            self._prepare()
            self._launch(self.binary)
            self._wait_until_ready()
        except OSError as error:
            self.stop()
            raise StartupError(f"The embedded Redis cannot start in {self._folder}: {error}") from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server with all accepted data on disk and leaves no process, socket or lock; idempotent.

        Raises StartupError where a server that lost its guard does not end.
        """
        guard, self._guard = self._guard, None
        if guard is not None:
            for pipe in (guard.stdin, guard.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                guard.wait(20)
            except subprocess.TimeoutExpired:
                guard.kill()
                guard.wait()
        if self._lock is not None:
            self._end_orphan()  # of a guard that was killed: two servers on one append-only file would ruin it
        self._remove_leavings()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self.pid = None

    def _prepare(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > _LOG_ROTATE_BYTES:
            self._log.replace(self._log.with_suffix(".log.1"))
        self._lock = _take_lock(self._folder / "lock")
        self._end_orphan()
        self._remove_leavings()
        assert self.binary is not None
        if self.binary.version < (7,) and (self._folder / "appendonlydir").exists():
            raise StartupError(
                f"The data in {self._folder} was written by Redis 7 or newer; {self.binary.path} "
                f"({self.binary.version_text}) cannot read it. Put the newer redis-server on PATH."
            )
        if self._socket.parent != self._folder:
            self._socket.parent.mkdir(mode=0o700)
        _write_private(self._state, json.dumps({"url": self.url, "socket": str(self._socket)}))

    def _launch(self, binary: RedisBinary) -> None:
        assert self._lock is not None
        cleanup = [str(self._state), str(self._socket)]
        if self._socket.parent != self._folder:
            cleanup.append(str(self._socket.parent))
        guard = [sys.executable, "-I", "-S", str(Path(redis_guard.__file__)), "\n".join(cleanup)]
        self._guard = subprocess.Popen(  # noqa: S603 - our own interpreter and the server just found
            [*guard, str(binary.path), *self._arguments()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            pass_fds=(self._lock,),
            start_new_session=True,  # a Ctrl-C in the terminal is the owner's to handle
        )
        assert self._guard.stdout is not None
        ready, _, _ = select.select([self._guard.stdout], [], [], _LOCK_S)
        line = self._guard.stdout.readline() if ready else b""
        self.pid = int(line) if line.strip() else None

    def _arguments(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "logfile": str(self._log),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory": str(self._maxmemory_bytes),
            "maxmemory-policy": "noeviction",
            "stream-node-max-entries": "16",  # entries of ready streams go one by one, found by a walk through a node
            "hash-max-ziplist-value": "256",  # job hashes stay compact
            "daemonize": "no",
        }
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def _wait_until_ready(self) -> None:
        assert self._guard is not None
        give_up = time.monotonic() + _LOADING_S
        while time.monotonic() < give_up:
            if self._guard.poll() is not None:
                raise StartupError(f"The embedded Redis ended at its start: {self._last_words()} (see {self._log})")
            if _ask(self._socket, b"PING\r\n").startswith(b"+PONG"):
                return
            time.sleep(_POLL_S)
        raise StartupError(f"The embedded Redis did not load its data within {_LOADING_S:.0f} s (see {self._log})")

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "it wrote no log"
        telling = [line for line in lines[-30:] if " # " in line]
        return (telling or lines or ["it said nothing"])[-1].strip()[:300]

    def _end_orphan(self) -> None:
        """We hold the lock, so a server that still answers on the recorded socket has neither owner nor guard."""
        orphan = self._recorded_socket()
        if orphan is None or not _ask(orphan, b"PING\r\n"):
            return
        _ask(orphan, b"SHUTDOWN NOSAVE\r\n")
        give_up = time.monotonic() + _LOCK_S
        while _ask(orphan, b"PING\r\n"):
            if time.monotonic() > give_up:
                raise StartupError(f"An earlier redis-server of this home does not end (socket {orphan}); end it first")
            time.sleep(_POLL_S)

    def _remove_leavings(self) -> None:
        if self._lock is None:
            return
        leftover = self._recorded_socket()
        if leftover is not None:
            leftover.unlink(missing_ok=True)
            if leftover.parent.name.startswith(_SOCKET_DIR_PREFIX):
                shutil.rmtree(leftover.parent, ignore_errors=True)
        self._state.unlink(missing_ok=True)

    def _recorded_socket(self) -> Path | None:
        try:
            return Path(json.loads(self._state.read_text(encoding="utf-8"))["socket"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _socket_path(folder: Path) -> Path:
    """In the home where its path is short enough, else in a private folder (made at start) below the temporary one."""
    inside = folder / "redis.sock"
    if len(os.fsencode(inside)) <= _LONGEST_SOCKET_PATH:
        return inside
    name = _SOCKET_DIR_PREFIX + secrets.token_hex(6)
    elsewhere = Path(tempfile.gettempdir()) / name / "redis.sock"
    if len(os.fsencode(elsewhere)) <= _LONGEST_SOCKET_PATH:
        return elsewhere
    return Path("/tmp") / name / "redis.sock"  # noqa: S108 - a private folder with a random name


def _take_lock(path: Path) -> int:
    """Waits for a predecessor that is just ending; raises StartupError where another one lives."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(handle)
                raise StartupError(
                    f"Another Spillway runs a Redis on {path.parent}; stop it, or use another home"
                ) from None
            time.sleep(_POLL_S)


def _write_private(path: Path, text: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)


def _ask(path: Path, command: bytes) -> bytes:
    """The first bytes of the reply to an inline command; empty where nobody answers."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(2.0)
        wire.connect(str(path))
        wire.sendall(command)
        return wire.recv(256)
    return b""
