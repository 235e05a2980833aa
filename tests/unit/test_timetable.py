"""Cron expressions in time zones: turns, daylight saving time, and what is no expression."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from scheduler.timetable import BadTimetable, next_turn_ms

BERLIN = "Europe/Berlin"


def ms(text: str, zone: str = "UTC") -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def turns(cron: str, zone: str, after: str, count: int) -> list[str]:
    at_ms, found = ms(after, zone), []
    for _ in range(count):
        turn = next_turn_ms(cron, zone, at_ms)
        assert turn is not None and turn > at_ms
        at_ms = turn
        found.append(datetime.fromtimestamp(turn / 1000, ZoneInfo(zone)).isoformat())
    return found


@pytest.mark.parametrize(
    ("cron", "after", "expected"),
    [
        ("*/15 * * * *", "2026-11-21T10:07:30", "2026-11-21T10:15:00"),
        ("0 9 * * MON-FRI", "2026-11-20T09:00:00", "2026-11-23T09:00:00"),
        ("@hourly", "2026-11-21T10:00:00", "2026-11-21T11:00:00"),
        ("@DAILY", "2026-12-31T10:00:00", "2027-01-01T00:00:00"),
        ("0 0 29 2 *", "2026-01-01T00:00:00", "2028-02-29T00:00:00"),
        ("30 6 L * *", "2026-02-01T00:00:00", "2026-02-28T06:30:00"),
    ],
)
def test_the_next_turn_comes_after_now(cron: str, after: str, expected: str) -> None:
    assert next_turn_ms(cron, "UTC", ms(after)) == ms(expected)


def test_a_turn_in_the_skipped_hour_runs_right_after_it_and_only_once() -> None:
    assert turns("30 2 * * *", BERLIN, "2026-03-28T12:00:00", 2) == [
        "2026-03-29T03:00:00+02:00",
        "2026-03-30T02:30:00+02:00",
    ]


def test_a_turn_in_the_repeated_hour_runs_once() -> None:
    assert turns("30 2 * * *", BERLIN, "2026-10-24T12:00:00", 2) == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-26T02:30:00+01:00",
    ]


def test_every_hour_is_every_hour_of_real_time_in_both_nights() -> None:
    for after in ("2026-03-29T00:30:00", "2026-10-25T00:30:00"):
        found = [datetime.fromisoformat(text) for text in turns("0 * * * *", BERLIN, after, 5)]
        assert all(later - earlier == timedelta(hours=1) for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize(
    "cron", ["", "* * * *", "* * * * * *", "61 * * * *", "x * * * *", "0 0 30 2 *", "@never", "*/0 * * * *"]
)
def test_what_is_no_cron_expression_is_said_so(cron: str) -> None:
    with pytest.raises(BadTimetable) as bad:
        next_turn_ms(cron, "UTC", 0)
    assert bad.value.field == "cron"


@pytest.mark.parametrize("zone", ["", "Mars/Base", "../../etc/passwd", "/etc/localtime", "Europe", "a\0b"])
def test_what_is_no_zone_is_said_so(zone: str) -> None:
    with pytest.raises(BadTimetable) as bad:
        next_turn_ms("* * * * *", zone, 0)
    assert bad.value.field == "timezone"
