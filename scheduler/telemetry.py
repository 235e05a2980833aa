"""Structured logs of every process: readable on a terminal, else one JSON object per line; the sink removes secrets.

Each process calls `configure` once. Lines about a job are written inside `log_context(job=…)`, which follows awaits
and tasks. A failed start is one `critical` line with the message of its StartupError: `spillway up` shows it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from types import TracebackType
from typing import Any, TextIO, cast

import structlog

from scheduler.settings import Settings

REDACTED = "[redacted]"
_SECRET_FIELDS = frozenset(
    {
        "api_key",
        "apikey",
        "x-api-key",
        "authorization",
        "proxy-authorization",
        "cookie",
        "set-cookie",
        "password",
        "secret",
    }
)
_LEVEL_STYLES = {"debug": "\x1b[2m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[1;31m"}
_PROCESS_STYLES = ("\x1b[36m", "\x1b[35m", "\x1b[34m", "\x1b[32m")
_DIM, _RESET = "\x1b[2m", "\x1b[0m"
_ENVELOPE = frozenset({"ts", "level", "process", "logger", "event", "exception", "stack"})
_QUIET_LOGGERS = ("alembic", "asyncio", "filelock", "httpcore2", "httpx2", "huggingface_hub", "urllib3", "uvicorn")

_ASSIGN = r"(?:\\*[\"']?\s*[:=]\s*(?:b?\\*[\"'])?|\\*[\"']\s*,\s*b?\\*[\"'])"
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{4,}", re.IGNORECASE), rf"\1 {REDACTED}"),
    (re.compile(r"\b(sk|pk|rk)-[\w-]{8,}"), rf"\1-{REDACTED}"),
    (re.compile(r"\bhf_\w{16,}|\bgh[opsu]_\w{16,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"), REDACTED),
    (re.compile(r"\bwhsec_[\w+/=-]{8,}"), REDACTED),
    (re.compile(r"\bgAAAAA[\w-]{20,}={0,2}"), REDACTED),
    (re.compile(r"\beyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]*"), REDACTED),
    (re.compile(r"(://[^\s/:@\"']*:)[^\s@\"']+@"), rf"\1{REDACTED}@"),
    (
        re.compile(r"([?&](?:api_?key|key|(?:access_)?token|sig(?:nature)?)=)[^\s&\"']+", re.IGNORECASE),
        rf"\1{REDACTED}",
    ),
    (
        re.compile(
            rf"((?:x-api-key|api[_-]?key|authorization|(?:set-)?cookie|passw(?:or)?d|secret){_ASSIGN})"
            rf"(?!\[redacted|(?:bearer|basic)\s)[^\s\"',;)}}\]\\]+",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

Logger = structlog.stdlib.BoundLogger
LogFields = MutableMapping[str, Any]


def get_logger(name: str) -> Logger:
    """The logger of a module: `log.info("claimed jobs", count=3)`; the event is a short phrase, values are fields."""
    return structlog.stdlib.get_logger(name)


def log_context(**fields: str | int) -> contextlib.AbstractContextManager[None]:
    """Every line written inside carries these fields: `with log_context(job=job.id): …`."""
    return cast("contextlib.AbstractContextManager[None]", structlog.contextvars.bound_contextvars(**fields))


def configure(settings: Settings, process: str, stream: TextIO | None = None) -> None:
    """Route structlog and stdlib logging of this process to `stream` (stderr); `process` names it on every line."""
    target = sys.stderr if stream is None else stream
    human = settings.log_format == "human" or (settings.log_format == "auto" and target.isatty())
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *_ENRICH, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = _SinkHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _SinkRenderer(process, human=human, colours=human and target.isatty()),
            ],
            foreign_pre_chain=_ENRICH,
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


def redact(text: str) -> str:
    """The text without credentials: API keys, bearer tokens, passwords in URLs, sealed values."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def render_human(fields: Mapping[str, Any], *, colours: bool) -> str:
    """One log event as a person reads it: time, process, level when it matters, what happened, then the fields."""
    level = str(fields.get("level", "info"))
    process = str(fields.get("process", ""))
    event = _printable(fields.get("event", ""))
    if level != "info":
        event = f"{level}: {event}"
    pairs = [(key, _value(value)) for key, value in fields.items() if key not in _ENVELOPE]
    clock = str(fields.get("ts", ""))[11:19]
    if colours:
        hue = _PROCESS_STYLES[sum(process.encode()) % len(_PROCESS_STYLES)]
        style = _LEVEL_STYLES.get(level, "")
        shown = [f"{_DIM}{key}={_RESET}{value}" for key, value in pairs]
        head = f"{_DIM}{clock}{_RESET} {hue}{process:<10}{_RESET} {style}{event}{_RESET if style else ''}"
    else:
        shown = [f"{key}={value}" for key, value in pairs]
        head = f"{clock} {process:<10} {event}"
    trace = "".join(f"\n    {line}" for key in ("stack", "exception") for line in _lines(fields.get(key)))
    return redact("  ".join([head, " ".join(shown)]).rstrip() + trace)


class _SinkRenderer:
    """The last processor of structlog's and stdlib's records alike; nothing passes it without `redact`."""

    def __init__(self, process: str, *, human: bool, colours: bool) -> None:
        self._process = process
        self._human = human
        self._colours = colours

    def __call__(self, _logger: Any, _method: str, fields: LogFields) -> str:
        head = {name: fields.pop(name) for name in ("ts", "level", "event")}
        ordered = {**head, "process": self._process, **fields}
        if self._human:
            return render_human(ordered, colours=self._colours)
        return redact(json.dumps(ordered, ensure_ascii=False, default=str))


class _SinkHandler(logging.StreamHandler[TextIO]):
    """A reader that went away (`spillway up` was killed) must not turn every log call into a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def _hide_secret_fields(_logger: Any, _method: str, fields: LogFields) -> LogFields:
    for key in fields:
        if key.lower() in _SECRET_FIELDS:
            fields[key] = REDACTED
    return fields


_ENRICH: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    structlog.processors.StackInfoRenderer(),
    structlog.processors.format_exc_info,
    _hide_secret_fields,
]


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    get_logger("uncaught").critical(f"{kind.__name__}: {error}", exc_info=(kind, error, trace))


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if text == "" or any(character in text for character in " \"'="):
        text = json.dumps(text, ensure_ascii=False) if isinstance(value, str) else text
    return _printable(text)


def _printable(value: object) -> str:
    """Control characters escaped: what a client sent must not drive the operator's terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", str(value))


def _lines(value: object) -> list[str]:
    return [_printable(line) for line in str(value).splitlines()] if value else []
