"""The control plane on a real Redis: turns, kicks, retries, several schedulers, and what a lost Redis costs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from scheduler.errors import QueueUnavailable
from scheduler.loops.control_plane import DAY_S, HOUR_S, ControlKick, ControlPlane
from scheduler.settings import Settings
from tests.conftest import wait_until


@asynccontextmanager
async def running(*planes: ControlPlane) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(plane.run()) for plane in planes]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)


@pytest.fixture
async def kick(settings: Settings) -> AsyncIterator[ControlKick]:
    kick = ControlKick(settings)
    yield kick
    await kick.aclose()


def plane(settings: Settings, name: str, run: Callable[..., Awaitable[object]]) -> ControlPlane:
    control = ControlPlane(settings)
    control.function(name, run)
    return control


async def test_of_two_schedulers_one_runs_each_turn(settings: Settings) -> None:
    turns: list[float] = []

    async def note() -> None:
        turns.append(time.time())

    planes = [ControlPlane(settings), ControlPlane(settings)]
    for control in planes:
        control.every(1, "tick", note)
    async with running(*planes):
        await wait_until(lambda: len([turn for turn in turns if turn > turns[0] + 1.5]) >= 3)
    later = [int(turn) for turn in turns if turn > turns[0] + 1.5]
    assert len(later) == len(set(later))


async def test_a_turn_is_left_out_while_the_one_before_runs(settings: Settings) -> None:
    begun: list[int] = []
    go_on = asyncio.Event()
    other: list[int] = []

    async def slow() -> None:
        begun.append(1)
        await go_on.wait()

    async def tick() -> None:
        other.append(1)

    control = ControlPlane(settings)
    control.every(1, "slow", slow)
    control.every(1, "tick", tick)
    async with running(control):
        await wait_until(lambda: len(other) >= 4)
        assert len(begun) == 1
        go_on.set()
        await wait_until(lambda: len(begun) >= 2)


async def test_a_kick_runs_its_function_with_its_arguments_in_some_scheduler(
    settings: Settings, kick: ControlKick
) -> None:
    calls: list[tuple[str, ...]] = []

    async def note(*args: str) -> None:
        calls.append(args)

    async with running(plane(settings, "note", note), plane(settings, "note", note)):
        await kick("note", "a", "b")
        await kick("note", "c")
        await wait_until(lambda: sorted(calls) == [("a", "b"), ("c",)])


async def test_kicks_that_wait_for_the_same_are_one(settings: Settings, kick: ControlKick) -> None:
    calls: list[str] = []

    async def note(name: str) -> None:
        calls.append(name)

    for _ in range(5):
        await kick("note", "same")
    await kick("note", "last")
    async with running(plane(settings, "note", note)):
        await wait_until(lambda: "last" in calls and "same" in calls)
    assert sorted(calls) == ["last", "same"]


async def test_a_transient_failure_is_tried_again_any_other_is_not(settings: Settings, kick: ControlKick) -> None:
    calls: list[str] = []

    async def fail(how: str) -> None:
        calls.append(how)
        if how == "bug":
            raise ValueError("a bug")
        if calls.count(how) == 1:
            raise QueueUnavailable("Redis is away.")

    async with running(plane(settings, "fail", fail)):
        await kick("fail", "bug")
        await kick("fail", "transient")
        await wait_until(lambda: calls.count("transient") == 2)
    assert calls.count("bug") == 1


async def test_a_kick_without_redis_is_lost_in_silence_and_in_time(settings: Settings) -> None:
    kick = ControlKick(settings.model_copy(update={"redis_url": "unix:///nowhere/redis.sock"}))
    await kick("note")
    await kick.aclose()


async def test_the_control_plane_outlives_cut_connections(redis: Redis, settings: Settings, kick: ControlKick) -> None:
    calls: list[str] = []

    async def note(name: str) -> None:
        calls.append(name)

    async with running(plane(settings, "note", note)) as (task,):
        for turn in range(3):
            await cast(Any, redis.client_kill_filter(_type="normal", skipme=True))
            await kick("note", str(turn))
        await wait_until(lambda: sorted(calls) == ["0", "1", "2"])
        assert not task.done()


@pytest.mark.parametrize(("period_s", "offset_s"), [(0, 0), (7, 0), (90, 0), (2 * DAY_S, 0), (10, 10), (HOUR_S, -1)])
def test_a_period_that_the_clock_cannot_show_is_refused(settings: Settings, period_s: int, offset_s: int) -> None:
    async def nothing() -> None:
        pass

    with pytest.raises(ValueError, match="is no divisor"):
        ControlPlane(settings).every(period_s, "odd", nothing, offset_s)
