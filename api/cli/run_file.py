"""`run.json` in the home: what one `spillway up` runs, for `spillway status` and for the next start after a crash."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import msgspec
import psutil

from api.cli.home import write_atomically

RUN_FILE = "run.json"


class ProcessNote(msgspec.Struct, frozen=True):
    """One child. `started_s` (Unix time) tells it from a later process with the same pid."""

    name: str
    pid: int
    started_s: float
    restarts: int = 0


class RunNote(msgspec.Struct, frozen=True, kw_only=True):
    """One `spillway up`."""

    pid: int
    version: str
    address: str
    started_s: float
    ready: bool = False
    models: tuple[str, ...] = ()
    processes: tuple[ProcessNote, ...] = ()


def write_run_note(home: Path, note: RunNote) -> None:
    write_atomically(home / RUN_FILE, msgspec.json.encode(note).decode())


def read_run_note(home: Path) -> RunNote | None:
    """What `spillway up` wrote last; None where there is none that this version can read."""
    try:
        return msgspec.json.decode((home / RUN_FILE).read_bytes(), type=RunNote)
    except (OSError, msgspec.DecodeError):
        return None


def remove_run_note(home: Path) -> None:
    (home / RUN_FILE).unlink(missing_ok=True)


def process_started_s(pid: int) -> float:
    """When a process began, Unix time; 0 where it has ended."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def is_running(process: ProcessNote) -> bool:
    """Whether it is this very process and not a later one with its pid; a zombie has ended."""
    try:
        found = psutil.Process(process.pid)
        return abs(found.create_time() - process.started_s) < 1.0 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def await_leftovers(home: Path, patience_s: float = 10.0) -> int:
    """Wait until the children of an `up` that was killed have noticed, and end those that have not; their number."""
    note = read_run_note(home)
    left = [process for process in note.processes if is_running(process)] if note is not None else []
    found = len(left)
    deadline = time.monotonic() + patience_s
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [process for process in left if is_running(process)]
    for process in left:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    remove_run_note(home)
    return found
