"""Limits of a Metal device: memory is pinned only where the owner says so, and never more than the device allows."""

from __future__ import annotations

import pytest

from scheduler.errors import StartupError
from workers.engine.metal import DeviceLimits, device_limits

GIB = 1 << 30


def test_nothing_is_pinned_unless_asked_for() -> None:
    assert device_limits(40 * GIB, wired_bytes=None, cache_bytes=None) == DeviceLimits(4 * GIB, None)


def test_the_owner_may_choose_both_limits() -> None:
    assert device_limits(40 * GIB, wired_bytes=30 * GIB, cache_bytes=0) == DeviceLimits(0, 30 * GIB)


def test_more_than_the_device_allows_stops_the_start_and_names_the_setting() -> None:
    with pytest.raises(StartupError, match="SPILLWAY_WIRED_LIMIT_BYTES"):
        device_limits(40 * GIB, wired_bytes=41 * GIB, cache_bytes=None)
