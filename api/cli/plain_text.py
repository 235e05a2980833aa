"""Printing for people and pipes: what others wrote must not drive the terminal, a pipe has no width."""

from __future__ import annotations

import re
import sys
import time
from datetime import datetime

from rich.console import Console

_PIPE_COLUMNS = 250
# All control characters but line ends and tabs; \r would let a line overwrite itself.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text with control characters shown as U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def write_answer(text: str) -> None:
    """A piece of an answer to stdout at once: exactly as it came into a pipe, made safe on a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def wide_console() -> Console:
    """A console for tables; in a pipe nothing is cut off."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_COLUMNS)


def day_of(moment_s: int | None) -> str:
    """A Unix time as people here read it."""
    if moment_s is None:
        return "–"
    return datetime.fromtimestamp(moment_s).astimezone().strftime("%Y-%m-%d %H:%M")


def age_of(moment_s: int) -> str:
    """How long ago that was, short."""
    seconds = max(0, int(time.time()) - moment_s)
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds // length_s} {unit}"
    return f"{seconds} s"
