"""The parent process of an embedded redis-server: ends it when its own parent is gone. Standard library only.

    python -I -S redis_guard.py <cleanup paths, one argument, separated by newlines> <redis-server> <arguments…>

Standard input is a pipe that only the owner holds: its end (close, or kill -9 of the owner) means stop. Prints the
server's pid, then nothing more. Exits with the server's status, after removing the cleanup paths.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

_LOOK_S = 0.1
_STOP_S = 15.0


def main() -> int:
    cleanup = [Path(line) for line in sys.argv[1].split("\n") if line]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # noqa: S603
    try:
        sys.stdout.write(f"{server.pid}\n")
        sys.stdout.flush()
        _wait(server)
    except BrokenPipeError:
        pass
    finally:
        _stop(server)
        _remove(cleanup)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def _exit_on_signal(_signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _wait(server: subprocess.Popen[bytes]) -> None:
    """Until the pipe ends or the server does."""
    while server.poll() is None:
        readable, _, _ = select.select([0], [], [], _LOOK_S)
        if readable and not os.read(0, 4096):
            return


def _stop(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM makes the server write and sync its append-only file."""
    server.terminate()
    try:
        server.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
