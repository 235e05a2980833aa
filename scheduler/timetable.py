"""When a cron expression is due, in a time zone, across changes to and from daylight saving time. Pure.

As Debian's cron has it: a job at a fixed hour that the clock skips runs right after the skip, one that the clock
repeats runs once; jobs with `*` in minute or hour follow the real time.
"""

from __future__ import annotations

import zoneinfo
from datetime import datetime

from cronsim import CronSim, CronSimError

FIELDS = 5
MACROS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


class BadTimetable(ValueError):
    """The expression or the zone says nothing; `field` is `cron` or `timezone`."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def next_turn_ms(cron: str, timezone: str, after_ms: int) -> int | None:
    """The first turn after that moment (Unix ms); None: there is none within 50 years. Raises BadTimetable."""
    zone = _zone(timezone)
    expression = MACROS.get(cron.strip().lower(), cron)
    if len(expression.split()) != FIELDS:
        raise BadTimetable(
            f"'{cron[:80]}' is no cron expression: it has five fields (minute hour day month weekday), or is one of "
            f"{', '.join(MACROS)}",
            "cron",
        )
    try:
        turn = next(CronSim(expression, datetime.fromtimestamp(after_ms / 1000, zone)), None)
    except CronSimError as error:
        raise BadTimetable(f"'{cron[:80]}' is no cron expression: {error}", "cron") from error
    return None if turn is None else int(turn.timestamp() * 1000)


def _zone(name: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise BadTimetable(f"'{name[:64]}' is no time zone; one looks like Europe/Berlin", "timezone") from error
