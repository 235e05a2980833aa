"""A cancelled task that talks to Redis ends, at whatever moment the cancellation comes."""

from __future__ import annotations

import asyncio

import pytest

from scheduler.queue.connection import Role, connect
from scheduler.settings import Settings


@pytest.mark.parametrize("role", ["command", "blocking"])
async def test_a_cancellation_is_never_lost_in_a_command(settings: Settings, role: Role) -> None:
    client = connect(settings, role)

    async def ask_for_ever() -> None:
        while True:
            await client.get("nothing")

    try:
        for ticks in range(60):
            task = asyncio.create_task(ask_for_ever())
            for _ in range(ticks):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=5)
            assert done, f"cancelled after {ticks} turns of the loop, the task went on"
            assert task.cancelled()
    finally:
        await client.aclose()
