"""Reads the request headers that steer a job: Spillway-Priority, Spillway-Deadline-Ms, Idempotency-Key, Prefer."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from api.protocols.parameters import BadParameter, without_bom
from scheduler.job import Priority

MAX_DEADLINE_MS = 30 * 24 * 3600 * 1000
MAX_WAIT_S = 60
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
MAX_PREFER_CHARS = 1000
_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*")+')  # a comma inside quotes separates nothing


@dataclass(frozen=True, slots=True)
class Preference:
    """`Prefer: respond-async`; `wait_s`: answer as if synchronous where the job ends that soon, None: at once."""

    wait_s: int | None = None

    @property
    def applied(self) -> dict[str, str]:
        wait = "" if self.wait_s is None else f", wait={self.wait_s}"
        return {"preference-applied": f"respond-async{wait}"}


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


def read_prefer(headers: Headers) -> Preference | None:
    """The wish for an asynchronous answer (RFC 7240), None where there is none; other preferences are ignored."""
    wishes = _preferences(headers)
    if "respond-async" not in wishes:
        return None
    wait = wishes.get("wait")
    if wait is None:
        return Preference()
    if not (wait.isascii() and wait.isdigit() and len(wait) <= 9):
        raise BadParameter("Prefer: wait is a whole number of seconds.", param="Prefer", reason="invalid_value")
    return Preference(min(int(wait), MAX_WAIT_S))


def _preferences(headers: Headers) -> dict[str, str]:
    """Preference → value; of a repeated one the first counts. Parameters of a preference are dropped."""
    found: dict[str, str] = {}
    for text in _PREFERENCE.findall(",".join(headers.getlist("prefer"))[:MAX_PREFER_CHARS]):
        name, _, value = text.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    return found


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
