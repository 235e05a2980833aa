"""One `spillway up` per home: a lock that the kernel drops with its holder, and a note that says who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from scheduler.errors import StartupError

LOCK_FILE = "spillway.lock"
# A prober (`spillway status`) holds the lock for a moment, and so does a holder that has not written its note yet.
_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class Holder:
    """The running `spillway up` of a home."""

    pid: int
    address: str


class HomeLock:
    """Held from `acquire` to `release` or the end of the process; children do not inherit it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, home: Path, address: str) -> Self:
        """Take the lock; raises StartupError that names the holder."""
        descriptor = os.open(home / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _locked_within(descriptor, _PATIENCE_S):
            os.close(descriptor)
            raise StartupError(_refusal(home, _read_note(home)))
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "address": address}).encode())
        return cls(descriptor)

    def release(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def holder(home: Path) -> Holder | None:
    """Who holds the lock of this home now; None where nobody does."""
    try:
        descriptor = os.open(home / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_note(home)
    finally:
        os.close(descriptor)
    return None


def _locked_within(descriptor: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def _read_note(home: Path) -> Holder | None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            note = json.loads((home / LOCK_FILE).read_text())
            return Holder(int(note["pid"]), str(note["address"]))
        except (OSError, ValueError, KeyError):
            time.sleep(0.05)
    return None


def _refusal(home: Path, found: Holder | None) -> str:
    who = "by a process that gave no name" if found is None else f"at {found.address} (pid {found.pid})"
    return f"Spillway already runs on {home} {who}. End it with `spillway stop`, or choose another --home and --port."
