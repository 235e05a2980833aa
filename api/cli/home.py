"""SPILLWAY_HOME: made private, checked for room, and marked with the format of the state that it holds."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

from scheduler.errors import StartupError

STATE_FORMAT = 1
"""Raised by a release whose files in the home an older release cannot read; SQL has its own revisions."""

NEEDED_BYTES = 200 * 2**20
STATE_FILE = "state.json"


def prepare_home(home: Path, needed_bytes: int = NEEDED_BYTES) -> None:
    """Make the home or check the one that is there; raises StartupError with one line that says what is wrong."""
    make_home(home)
    check_room(home, needed_bytes)
    check_state_format(home)


def make_home(home: Path) -> None:
    """Create the home, readable by its owner only. An existing directory keeps the mode that its owner gave it."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        home.mkdir(mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StartupError(f"{home} is not a directory. Choose another with --home.") from None
    except OSError as error:
        raise StartupError(f"{home} cannot be made: {error.strerror}. Choose another with --home.") from error
    if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        raise StartupError(f"{home} cannot be written by this user. Choose another with --home.")


def check_room(home: Path, needed_bytes: int) -> None:
    """Raise StartupError where the disk of the home is too full for queue, database and logs."""
    free = free_bytes(home)
    if free < needed_bytes:
        raise StartupError(
            f"The disk of {home} is full: {free >> 20} MB left, Spillway needs {needed_bytes >> 20} MB. "
            "Free some space, or choose another disk with --home."
        )


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write on the disk of `path`."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def check_state_format(home: Path) -> None:
    """Refuse a home that a newer release wrote; mark a fresh one."""
    path = home / STATE_FILE
    try:
        state = json.loads(path.read_text())
        found = int(state["format"])
    except FileNotFoundError:
        write_atomically(path, json.dumps({"format": STATE_FORMAT, "version": version("spillway")}))
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{path} cannot be read ({error}). Move it away, or choose another --home.") from error
    if found > STATE_FORMAT:
        raise StartupError(
            f"{home} was written by a newer Spillway ({state.get('version', '?')}, state format {found}); this is "
            f"{version('spillway')}, which reads format {STATE_FORMAT}. Upgrade, or choose another --home."
        )


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that readers see the old text or the new one; raises StartupError where that fails."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise StartupError(f"{path} cannot be written: {error.strerror}.") from error
