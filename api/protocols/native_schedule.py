"""Bodies of /v1/schedules: an inference body, and when it recurs. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from api.protocols.native_job import (
    DEFAULT_ENDPOINT,
    MAX_WEBHOOK_CHARS,
    decode_strict,
    read_metadata,
    read_priority_name,
)
from api.protocols.parameters import BadParameter, check_range, check_text
from scheduler.job import Priority
from scheduler.timetable import BadTimetable, next_turn_ms

MAX_NAME_CHARS = 128
MAX_CRON_CHARS = 128
MAX_AFTER_MS = 366 * 24 * 3600 * 1000


class WireSchedule(msgspec.Struct, kw_only=True):
    cron: str
    body: msgspec.Raw
    name: str = ""
    timezone: str = "UTC"
    endpoint: str = DEFAULT_ENDPOINT
    priority: str | None = None
    deadline_after_ms: int | None = None
    webhook: str | None = None
    metadata: dict[str, str] | None = None
    paused: bool = False


class WireScheduleChange(msgspec.Struct, kw_only=True):
    cron: str | msgspec.UnsetType = msgspec.UNSET
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    timezone: str | msgspec.UnsetType = msgspec.UNSET
    endpoint: str | msgspec.UnsetType = msgspec.UNSET
    priority: str | msgspec.UnsetType | None = msgspec.UNSET
    deadline_after_ms: int | msgspec.UnsetType | None = msgspec.UNSET
    webhook: str | msgspec.UnsetType | None = msgspec.UNSET
    metadata: dict[str, str] | msgspec.UnsetType | None = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class ScheduleCall:
    """A parsed schedule. `body` is the inference body as it came; `webhook` an id or URL; `next_ms` its first turn."""

    name: str
    cron: str
    timezone: str
    endpoint: str
    body: bytes
    priority: Priority | None
    deadline_after_ms: int | None
    webhook: str | None
    metadata: dict[str, str]
    paused: bool
    next_ms: int


def parse_schedule(body: bytes, now_ms: int) -> ScheduleCall:
    """A new schedule; its inference body is for the Dialect to read. Raises BadParameter."""
    wire: WireSchedule = decode_strict(body, WireSchedule)
    _check(wire)
    return ScheduleCall(
        name=wire.name,
        cron=wire.cron.strip(),
        timezone=wire.timezone,
        endpoint=wire.endpoint,
        body=bytes(wire.body),
        priority=None if wire.priority is None else read_priority_name(wire.priority),
        deadline_after_ms=wire.deadline_after_ms,
        webhook=wire.webhook,
        metadata=read_metadata(wire.metadata),
        paused=wire.paused,
        next_ms=first_turn(wire.cron, wire.timezone, now_ms),
    )


def parse_schedule_change(body: bytes, before: dict[str, Any], now_ms: int) -> ScheduleCall:
    """The members that are given, over those of `before` (a body as `parse_schedule` takes it). Raises BadParameter."""
    decode_strict(body, WireScheduleChange)
    changed = before | msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return parse_schedule(msgspec.json.encode(changed), now_ms)


def first_turn(cron: str, timezone: str, now_ms: int) -> int:
    """The first turn after now. Raises BadParameter where there is none."""
    try:
        turn_ms = next_turn_ms(cron, timezone, now_ms)
    except BadTimetable as error:
        raise BadParameter(f"{error}.", param=error.field, reason="invalid_value") from error
    if turn_ms is None:
        raise BadParameter(f"'{cron[:80]}' never comes.", param="cron", reason="invalid_value")
    return turn_ms


def _check(wire: WireSchedule) -> None:
    check_text("name", wire.name, MAX_NAME_CHARS)
    check_text("cron", wire.cron, MAX_CRON_CHARS)
    check_range("deadline_after_ms", wire.deadline_after_ms, 1, MAX_AFTER_MS)
    if wire.webhook is not None:
        check_text("webhook", wire.webhook, MAX_WEBHOOK_CHARS)
    if not bytes(wire.body).startswith(b"{"):
        message = "Invalid type for 'body': expected an object, the request as the endpoint takes it."
        raise BadParameter(message, param="body", reason="invalid_type")
