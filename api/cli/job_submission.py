"""What `spillway jobs submit` was told, as the body of POST /v1/jobs. Times and pairs are read here."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from scheduler.errors import InvalidRequest

_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|min|h|d)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Submission:
    """The options of the command."""

    prompt: str | None
    file: Path | None
    model: str
    max_tokens: int | None
    priority: str | None
    at: str | None
    delay: str | None
    deadline: str | None
    webhook: str | None
    metadata: list[str]

    def body(self) -> dict[str, Any]:
        """Raises InvalidRequest where an option cannot be read."""
        if self.at is not None and self.delay is not None:
            raise InvalidRequest("--at and --in say the same thing; give one of them.")
        body: dict[str, Any] = {"body": self._inference()}
        given = {"priority": self.priority, "webhook": self.webhook}
        body |= {name: value for name, value in given.items() if value is not None}
        if self.at is not None:
            body["not_before"] = read_moment("--at", self.at)
        if self.delay is not None:
            body["delay_ms"] = read_duration_ms("--in", self.delay)
        if self.deadline is not None:
            body["deadline"] = _read_deadline(self.deadline)
        if self.metadata:
            body["metadata"] = dict(_read_pair(text) for text in self.metadata)
        return body

    def _inference(self) -> dict[str, Any]:
        if self.file is not None:
            if self.prompt is not None:
                raise InvalidRequest("Give a prompt or --file, not both.")
            return _read_file(self.file)
        prompt = _read_prompt(self.prompt)
        limit = {} if self.max_tokens is None else {"max_completion_tokens": self.max_tokens}
        return {"model": self.model, "messages": [{"role": "user", "content": prompt}], **limit}


def read_moment(option: str, text: str) -> str:
    """ISO 8601 with an offset; a time without one is this machine's."""
    try:
        return datetime.fromisoformat(text.strip()).astimezone().isoformat()
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{option} {text!r} is no time like 2026-12-24T18:00.") from None


def read_duration_ms(option: str, text: str) -> int:
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest(f"{option} {text!r} is no duration like 90s, 10m, 2h or 1d.")
    return round(float(match[1]) * _UNIT_S[match[2]] * 1000)


def read_past(option: str, text: str) -> str:
    """A moment, or how long ago it was."""
    if _DURATION.fullmatch(text.strip()) is None:
        return read_moment(option, text)
    return f"{time.time() - read_duration_ms(option, text) / 1000:.3f}"


def _read_deadline(text: str) -> str:
    if _DURATION.fullmatch(text.strip()) is None:
        return read_moment("--deadline", text)
    try:
        at = datetime.now().astimezone() + timedelta(milliseconds=read_duration_ms("--deadline", text))
    except OverflowError:
        raise InvalidRequest(f"--deadline {text!r} is too far away.") from None
    return at.isoformat()


def _read_pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InvalidRequest(f"--metadata {text!r} is no pair like run=7.")
    return key, value


def _read_prompt(prompt: str | None) -> str:
    text = prompt
    if text is None or text == "-":
        if sys.stdin.isatty():
            raise InvalidRequest("Nothing to ask: give a prompt, pipe one in, or give --file.")
        text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise InvalidRequest("Nothing to ask: the prompt is empty.")
    return text


def _read_file(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"{path} holds no JSON object, as /v1/chat/completions takes it.")
    return body
