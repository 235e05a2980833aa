"""Script calls of one process, those of one moment in one write: a burst costs a round trip, not one each.

    idle ──call──► sending (what comes meanwhile waits for the next write) ──nothing waits──► idle

Called by job_queue.py. Each caller gets its own reply or error; one that is cancelled leaves the others alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError, ResponseError

from scheduler.queue.scripts import CALL_TIMEOUT_S, Argument, Script, available

_MOST_IN_ONE_WRITE = 128

Command = tuple[Argument, ...]


class _Wire(Protocol):
    """What is used of redis-py's connection. (Its own pipeline would quote whole commands, bodies too, in errors.)"""

    retry: Any
    retry_on_error: list[type[Exception]]

    async def send_packed_command(self, command: Any) -> None: ...

    def pack_commands(self, commands: Sequence[Command]) -> list[bytes]: ...

    async def read_response(self) -> Any: ...

    async def disconnect(self, nowait: bool = False) -> None: ...


class Pipelined:
    """One write is under way at a time, on one connection of the client's pool. Lives on one event loop."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: deque[tuple[Command, asyncio.Future[Any]]] = deque()
        self._sender: asyncio.Task[None] | None = None

    async def run(self, script: Script, prefix: str, *args: Argument) -> Any:
        """Raw reply; raises QueueUnavailable where Redis cannot be reached or refuses."""
        return await available(self._reply(script, prefix, args), script.name)

    async def _reply(self, script: Script, prefix: str, args: tuple[Argument, ...]) -> Any:
        patience_s: float | None = getattr(self._redis, "patience_s", None)
        async with asyncio.timeout(patience_s):
            try:
                return await self._send(("EVALSHA", script.sha, 1, prefix, *args))
            except NoScriptError:
                return await self._send(("EVAL", script.text, 1, prefix, *args))

    def _send(self, command: Command) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, future))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all(), name="pipelined")
        return future

    async def _send_all(self) -> None:
        """Ends when nothing waits; every wait for a reply of Redis has a timeout, so it does end."""
        try:
            while self._waiting:
                count = min(len(self._waiting), _MOST_IN_ONE_WRITE)
                await self._send_some([self._waiting.popleft() for _ in range(count)])
        finally:
            self._sender = None
            while self._waiting:  # only where the loop is being closed
                self._waiting.popleft()[1].cancel()

    async def _send_some(self, calls: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        wanted = [(command, future) for command, future in calls if not future.done()]
        if not wanted:
            return
        replies: list[Any]
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                replies = await self._exchange([command for command, _ in wanted])
        except (RedisError, OSError, TimeoutError) as error:
            replies = [error] * len(wanted)
        except BaseException:
            for _, future in wanted:
                future.cancel()
            raise
        for (_, future), reply in zip(wanted, replies, strict=True):
            _settle(future, reply)

    async def _exchange(self, commands: list[Command]) -> list[Any]:
        pool = cast(Any, self._redis.connection_pool)
        wire: _Wire = await pool.get_connection()

        async def ask() -> list[Any]:
            await wire.send_packed_command(wire.pack_commands(commands))
            return [await _read(wire) for _ in commands]

        async def fail(error: RedisError) -> None:
            await wire.disconnect()
            if not isinstance(error, tuple(wire.retry_on_error)):
                raise error

        try:
            return await wire.retry.call_with_retry(ask, fail)
        finally:
            await pool.release(wire)


async def _read(wire: _Wire) -> Any:
    """The next reply, or the error that stands in its place."""
    try:
        return await wire.read_response()
    except ResponseError as error:
        return error


def _settle(future: asyncio.Future[Any], reply: Any) -> None:
    if future.done():
        return
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)
