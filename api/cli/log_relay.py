"""Log lines of `up` and its children: each into its own rotated file, and to the terminal in the form that suits it."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from scheduler.settings import Settings
from scheduler.telemetry import redact, render_human

FILE_BYTES = 10 * 2**20
FILES_KEPT = 5
# What is critical ends the start, and `up` itself says it last.
_LOUD = frozenset({"warning", "error"})


@dataclass(slots=True)
class LastWords:
    """What a process said most recently: anything at all, what sounded like trouble, and why it could not start."""

    doing: str = ""
    trouble: str | None = None
    cannot_start: str | None = None


class LogRelay:
    """Takes lines: JSON of scheduler/telemetry.py, or whatever a library or the interpreter printed."""

    def __init__(self, home: Path, settings: Settings) -> None:
        self._directory = home / "logs"
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._files: dict[str, _LogFile] = {}
        self._words: dict[str, LastWords] = {}
        self._human = settings.log_format == "human" or (settings.log_format == "auto" and sys.stderr.isatty())
        self._colours = self._human and sys.stderr.isatty()
        self.quiet = False
        """While the start is shown step by step, only what is loud goes to the terminal."""

    def line(self, process: str, text: str) -> None:
        """Handle one line of a process."""
        text = redact(text.rstrip())
        if not text:
            return
        fields = _parse(process, text)
        self._note(process, fields)
        rendered = json.dumps(fields, ensure_ascii=False)
        self._file(process).write_line(rendered)
        if not self.quiet or fields["level"] in _LOUD:
            print_safely(render_human(fields, colours=self._colours) if self._human else rendered)

    def last_words(self, process: str) -> LastWords:
        return self._words.setdefault(process, LastWords())

    def obituary(self, process: str, status: int | None) -> str:
        """One line about a process that ended at once without giving a reason."""
        words = self.last_words(process)
        said = words.trouble or words.doing or f"status {status}"
        return f"{process} ends at once: {said} ({self._directory / process}.log has the rest)"

    def forget_words(self, process: str) -> None:
        """The process starts anew: what the last one said explains nothing about this one."""
        self._words.pop(process, None)

    def writer(self, process: str) -> TextIO:
        """A stream that hands lines to this relay, for the logging of `up` itself."""
        return _LineWriter(lambda text: self.line(process, text))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _note(self, process: str, fields: dict[str, Any]) -> None:
        words, said = self.last_words(process), str(fields["event"])
        words.doing = said
        if fields["level"] == "critical":
            words.cannot_start = said
        elif fields["level"] == "error":
            words.trouble = said

    def _file(self, process: str) -> _LogFile:
        if process not in self._files:
            self._files[process] = _LogFile(self._directory / f"{process}.log")
        return self._files[process]


def print_safely(text: str) -> None:
    """To stderr; a terminal that was closed must not stop the service from draining."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def _parse(process: str, text: str) -> dict[str, Any]:
    if text.startswith("{"):
        try:
            fields = json.loads(text)
        except ValueError:
            fields = None
        if isinstance(fields, dict) and "event" in fields:
            return {"ts": _now(), "level": "info", **fields, "process": process}
    return {"ts": _now(), "level": "info", "process": process, "event": text}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class _LogFile(RotatingFileHandler):
    """One process's log. A full disk is said once; the service goes on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8", delay=True)
        self._failed = False

    def write_line(self, line: str) -> None:
        self.emit(logging.makeLogRecord({"msg": line}))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not self._failed:
            print_safely(f"spillway: {self.baseFilename} cannot be written: {error}")
        self._failed = True


class _LineWriter(io.StringIO):
    """A text stream for a logging handler: every write is one record, with its line end or followed by it."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__()
        self._take = take

    def write(self, text: str, /) -> int:
        for line in text.split("\n"):
            self._take(line)
        return len(text)
