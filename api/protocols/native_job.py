"""POST and PATCH bodies of /v1/jobs: an inference body plus when, how urgently and for whom. Pure.

Unlike the endpoints that imitate others, a member that nobody knows is refused: a misspelt `not_before` would run now.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from api.protocols.parameters import BadParameter, check_range, check_text, decode_fields, decode_struct
from scheduler.job import Priority

DEFAULT_ENDPOINT = "/v1/chat/completions"
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_WEBHOOK_CHARS = 2048
MAX_AHEAD_MS = 366 * 24 * 3600 * 1000
_LATEST_S = 253_402_300_799  # the year 9999; beyond it Unix seconds were milliseconds, or nonsense

Moment = float | str


class WireJob(msgspec.Struct, kw_only=True):
    body: msgspec.Raw
    endpoint: str | None = None
    priority: str | None = None
    not_before: Moment | None = None
    delay_ms: int | None = None
    deadline: Moment | None = None
    deadline_ms: int | None = None
    webhook: str | None = None
    metadata: dict[str, str] | None = None


class WireChange(msgspec.Struct, kw_only=True):
    priority: str


@dataclass(frozen=True, slots=True)
class JobCall:
    """One parsed submission. `body` is the inference body as it came; times are Unix ms, `not_before_ms` None: now."""

    endpoint: str
    body: bytes
    priority: Priority | None = None
    not_before_ms: int | None = None
    deadline_ms: int | None = None
    webhook: str | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])


def parse_job(body: bytes, now_ms: int) -> JobCall:
    """The submission in `body`; its inference body is for the Dialect to read. Raises BadParameter."""
    wire = decode_strict(body, WireJob)
    not_before_ms = _read_moment("not_before", wire.not_before, "delay_ms", wire.delay_ms, now_ms)
    deadline_ms = _read_moment("deadline", wire.deadline, "deadline_ms", wire.deadline_ms, now_ms)
    _check_order(not_before_ms, deadline_ms, now_ms, "deadline" if wire.deadline_ms is None else "deadline_ms")
    if wire.webhook is not None:
        check_text("webhook", wire.webhook, MAX_WEBHOOK_CHARS)
    return JobCall(
        endpoint=DEFAULT_ENDPOINT if wire.endpoint is None else wire.endpoint,
        body=_read_body(wire.body),
        priority=None if wire.priority is None else read_priority_name(wire.priority),
        not_before_ms=not_before_ms if not_before_ms is not None and not_before_ms > now_ms else None,
        deadline_ms=deadline_ms,
        webhook=wire.webhook,
        metadata=read_metadata(wire.metadata),
    )


def parse_change(body: bytes) -> Priority:
    """The new priority that a PATCH asks for. Raises BadParameter."""
    return read_priority_name(decode_strict(body, WireChange).priority)


def read_priority_name(name: str) -> Priority:
    try:
        return Priority(name)
    except ValueError as error:
        known = ", ".join(priority.value for priority in Priority)
        raise BadParameter(
            f"Invalid 'priority': '{name[:40]}'. It is one of: {known}.", param="priority", reason="invalid_value"
        ) from error


def read_metadata(metadata: dict[str, str] | None) -> dict[str, str]:
    """Up to 16 pairs of short strings, as OpenAI's API has them."""
    if metadata is None:
        return {}
    if len(metadata) > MAX_METADATA:
        raise BadParameter(
            f"Invalid 'metadata': too many pairs. Expected at most {MAX_METADATA}, but got {len(metadata)} instead.",
            param="metadata",
            reason="object_above_max_properties",
        )
    for key, value in metadata.items():
        check_text("metadata", key, MAX_METADATA_KEY)
        check_text(f"metadata.{key}", value, MAX_METADATA_VALUE)
    return metadata


def decode_strict(body: bytes, kind: type[Any]) -> Any:
    """A body whose every member is known to `kind`; raises BadParameter with the nearest name."""
    known: tuple[str, ...] = kind.__struct_fields__
    for name in decode_fields(body):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean '{near[0]}'?" if near else f"known are: {', '.join(known)}."
            raise BadParameter(f"Unknown parameter: '{name[:64]}'; {hint}", param=name[:64], reason="unknown_parameter")
    return decode_struct(body, kind)


def _read_body(raw: msgspec.Raw) -> bytes:
    body = bytes(raw)
    if not body.startswith(b"{"):
        raise BadParameter(
            "Invalid type for 'body': expected an object, the request as the endpoint takes it.",
            param="body",
            reason="invalid_type",
        )
    return body


def _read_moment(name: str, moment: Moment | None, delay_name: str, delay_ms: int | None, now_ms: int) -> int | None:
    """Unix ms of a point in time that is given as such, or as ms from now."""
    if moment is not None and delay_ms is not None:
        raise BadParameter(
            f"'{name}' and '{delay_name}' say the same thing; give one of them.",
            param=delay_name,
            reason="invalid_value",
        )
    if delay_ms is not None:
        check_range(delay_name, delay_ms, 0 if delay_name == "delay_ms" else 1, MAX_AHEAD_MS)
        return now_ms + delay_ms
    if moment is None:
        return None
    at_ms = unix_ms(name, moment)
    if at_ms - now_ms > MAX_AHEAD_MS:
        raise _bad_moment(name, "it lies more than a year ahead")
    return at_ms


def unix_ms(name: str, moment: Moment) -> int:
    """A point in time that is given as Unix seconds or as ISO 8601 with an offset."""
    if isinstance(moment, str):
        try:
            at = datetime.fromisoformat(moment.strip())
        except ValueError as error:
            raise _bad_moment(name, f"'{moment[:40]}' is neither") from error
        if at.tzinfo is None:
            raise _bad_moment(name, f"'{moment[:40]}' has no offset from UTC")
        return math.floor(at.timestamp() * 1000)
    if not 0 <= moment <= _LATEST_S:
        raise _bad_moment(name, f"{moment:g} is out of range")
    return math.floor(moment * 1000)


def _bad_moment(name: str, why: str) -> BadParameter:
    message = f"Invalid '{name}': {why}. Give Unix seconds, or ISO 8601 with an offset like 2026-12-24T18:00:00+01:00."
    return BadParameter(message, param=name, reason="invalid_value")


def _check_order(not_before_ms: int | None, deadline_ms: int | None, now_ms: int, param: str) -> None:
    if deadline_ms is None:
        return
    if deadline_ms <= now_ms:
        raise BadParameter(f"'{param}' has passed already.", param=param, reason="invalid_value")
    if not_before_ms is not None and deadline_ms <= not_before_ms:
        raise BadParameter(f"'{param}' is not after the job's start.", param=param, reason="invalid_value")
