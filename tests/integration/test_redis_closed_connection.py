"""A write to a connection that broke a moment ago is a lost connection, on uvloop as on asyncio's own loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from redis.exceptions import ConnectionError as RedisConnectionError

from scheduler.queue.connection import connect
from scheduler.settings import Settings


async def _write_after_the_end(settings: Settings) -> None:
    client = connect(settings, "pubsub")
    wire: Any = client.connection_pool.make_connection()
    try:
        await wire.connect()
        wire._writer.transport.abort()
        await asyncio.sleep(0)  # the loop closes the handle
        await wire.send_command("SUBSCRIBE", "channel", check_health=False)
        await wire.read_response(timeout=5)
    finally:
        await wire.disconnect(nowait=True)
        await client.aclose()


@pytest.mark.parametrize("loop_factory", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_writing_to_a_closed_connection_is_a_lost_connection(
    settings: Settings, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner, pytest.raises(RedisConnectionError):
        runner.run(_write_after_the_end(settings))
