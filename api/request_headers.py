"""Reads the request headers that steer a job: Spillway-Priority, Spillway-Deadline-Ms, Idempotency-Key."""

from __future__ import annotations

import hashlib
import json
import re

from starlette.datastructures import Headers

from api.protocols.parameters import BadParameter, without_bom
from scheduler.job import Priority

MAX_DEADLINE_MS = 30 * 24 * 3600 * 1000
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def read_priority(headers: Headers, asked: Priority) -> Priority:
    """The priority of the header, else the one that the body asked for."""
    text = headers.get("spillway-priority")
    if text is None:
        return asked
    try:
        return Priority(text.strip().lower())
    except ValueError as error:
        known = ", ".join(priority.value for priority in Priority)
        raise BadParameter(
            f"Spillway-Priority is one of: {known}.", param="Spillway-Priority", reason="invalid_value"
        ) from error


def read_deadline(headers: Headers, now_ms: int) -> int | None:
    """Unix ms by which the job must have ended: `Spillway-Deadline-Ms` says in how many ms from now."""
    text = headers.get("spillway-deadline-ms")
    if text is None:
        return None
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and 1 <= int(text) <= MAX_DEADLINE_MS):
        raise BadParameter(
            f"Spillway-Deadline-Ms is a whole number of milliseconds from now, 1 to {MAX_DEADLINE_MS}.",
            param="Spillway-Deadline-Ms",
            reason="invalid_value",
        )
    return now_ms + int(text)


def read_idempotency_key(headers: Headers) -> str | None:
    """The key, as a structured-field string (quoted) or raw."""
    text = headers.get("idempotency-key")
    if text is None:
        return None
    key = text.strip()
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    if _KEY.fullmatch(key) is None:
        raise BadParameter(
            "Idempotency-Key has 1 to 255 visible ASCII characters.", param="Idempotency-Key", reason="invalid_value"
        )
    return key


def body_digest(body: bytes) -> str:
    """A digest that is equal for equal JSON, however it is laid out; `body` was parsed before."""
    try:
        value = json.loads(without_bom(body), parse_int=_as_written, parse_float=_as_written)
        canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    except RecursionError as error:
        raise BadParameter("The body is nested too deeply.", reason="invalid_json") from error
    return hashlib.sha256(canonical.encode()).hexdigest()


def _as_written(number: str) -> str:
    """Numbers by their digits: no size is too large, and none equals a string that a client would send."""
    return f"\0{number}"
