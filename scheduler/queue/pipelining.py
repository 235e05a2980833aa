"""Script calls of one process, those of one moment in one write: a burst costs a round trip, not one each.

    idle ──call──► sending (what comes meanwhile waits for the next write) ──nothing waits──► idle

Called by job_queue.py. Calls of a script that takes several items become one call of it. Each caller gets its own reply
or error; one that is cancelled leaves the others alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import hiredis
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError, ResponseError

from scheduler.queue.scripts import CALL_TIMEOUT_S, Argument, Script, available

_MOST_IN_ONE_WRITE = 128
_MOST_ITEMS = 32  # of one script call: Redis serves nobody else meanwhile
_MOST_ITEM_BYTES = 256 * 1024
_KEPT_S = 0.5  # the pool looks whether a connection still leads to the primary

Item = tuple[Argument, ...]
_pack = cast(Callable[[Item], bytes], getattr(hiredis, "pack_command"))  # noqa: B009 - its own types allow one word


@dataclass(slots=True)
class _Call:
    """A script with arguments of its own or, where it takes `items`, with those that such calls may share."""

    script: Script
    arguments: Item
    items: Sequence[Item]
    future: asyncio.Future[Any]
    alone: bool = False

    @property
    def size(self) -> int:
        return sum(len(word) for item in self.items for word in item if isinstance(word, bytes))


@dataclass(slots=True)
class _Command:
    """What goes to Redis as one command: one call, or several of the same script."""

    calls: list[_Call]
    count: int = 0
    size: int = 0
    reply: Any = field(default=None)

    def add(self, call: _Call) -> bool:
        """Whether the call found room here."""
        size = call.size
        if self.calls:
            first = self.calls[0]
            fits = self.count + len(call.items) <= _MOST_ITEMS and self.size + size <= _MOST_ITEM_BYTES
            same = call.script is first.script and call.arguments == first.arguments
            if not (call.items and same and fits) or call.alone or first.alone:
                return False
        self.calls.append(call)
        self.count += len(call.items)
        self.size += size
        return True

    def packed(self, *, with_text: bool) -> bytes:
        script, words = self.calls[0].script, list(self.calls[0].arguments)
        for call in self.calls:
            for item in call.items:
                words += item
        start = ("EVAL", script.text) if with_text else ("EVALSHA", script.sha)
        return _pack((*start, 1, *words))


class _Wire(Protocol):
    """What is used of redis-py's connection. (Its own pipeline would quote whole commands, bodies too, in errors.)"""

    retry: Any
    retry_on_error: list[type[Exception]]

    async def send_packed_command(self, command: Any) -> None: ...

    async def read_response(self) -> Any: ...

    async def disconnect(self, nowait: bool = False) -> None: ...


class Pipelined:
    """One write is under way at a time, on one connection of the client's pool. Lives on one event loop."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: deque[_Call] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._wire: _Wire | None = None
        self._taken_at = 0.0

    async def run(self, script: Script, prefix: str, *args: Argument) -> Any:
        """Raw reply; raises QueueUnavailable where Redis cannot be reached or refuses."""
        (reply,) = await self._replies([self._call(script, (prefix, *args), ())])
        return reply

    async def run_each(self, script: Script, prefix: str, shared: Item, items: Sequence[Item]) -> list[Any]:
        """One raw reply per item, of a script that takes several; after an error some of them may have been done."""
        parts = [items[start : start + _MOST_ITEMS] for start in range(0, len(items), _MOST_ITEMS)]
        replies = await self._replies([self._call(script, (prefix, *shared), part) for part in parts])
        return [reply for part in replies for reply in part]

    def _call(self, script: Script, arguments: Item, items: Sequence[Item]) -> _Call:
        call = _Call(script, arguments, items, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all(), name="pipelined")
        return call

    async def _replies(self, calls: list[_Call]) -> list[Any]:
        try:
            return await available(self._patiently(calls), calls[0].script.name) if calls else []
        finally:
            for call in calls:  # of those that nobody waits for any more, none is sent, and no error goes unseen
                if not call.future.cancel() and not call.future.cancelled():
                    call.future.exception()

    async def _patiently(self, calls: list[_Call]) -> list[Any]:
        patience_s: float | None = getattr(self._redis, "patience_s", None)
        if patience_s is None:
            return [await call.future for call in calls]
        async with asyncio.timeout(patience_s):
            return [await call.future for call in calls]

    async def _send_all(self) -> None:
        """Ends when nothing waits; every wait for a reply of Redis has a timeout, so it does end."""
        try:
            while self._waiting:
                count = min(len(self._waiting), _MOST_IN_ONE_WRITE)
                await self._send_some([self._waiting.popleft() for _ in range(count)])
        finally:
            self._sender = None
            while self._waiting:  # only where the loop is being closed
                self._waiting.popleft().future.cancel()

    async def _send_some(self, calls: list[_Call]) -> None:
        commands = _merged(calls)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._answer(commands, with_text=False)
                unknown = [command for command in commands if isinstance(command.reply, NoScriptError)]
                await self._answer(unknown, with_text=True)
        except (RedisError, OSError, TimeoutError) as error:
            for command in commands:
                command.reply = error
        except BaseException:
            for call in calls:
                call.future.cancel()
            raise
        for command in commands:
            self._settle(command)

    async def _answer(self, commands: list[_Command], *, with_text: bool) -> None:
        if not commands:
            return
        replies = await self._exchange([command.packed(with_text=with_text) for command in commands])
        for command, reply in zip(commands, replies, strict=True):
            command.reply = reply

    async def _exchange(self, packed: list[bytes]) -> list[Any]:
        wire = await self._connection()

        async def ask() -> list[Any]:
            await wire.send_packed_command(packed)
            return [await _read(wire) for _ in packed]

        async def fail(error: RedisError) -> None:
            await wire.disconnect()
            if not isinstance(error, tuple(wire.retry_on_error)):
                raise error

        try:
            return await wire.retry.call_with_retry(ask, fail)
        except BaseException:  # a reply may still come in on it
            await self._let_go(broken=True)
            raise

    async def _connection(self) -> _Wire:
        """A connection of the pool's, kept for a moment: asking the pool costs as much as a small script."""
        now = asyncio.get_running_loop().time()
        if self._wire is None or now - self._taken_at > _KEPT_S:
            await self._let_go()
            self._wire = cast(_Wire, await cast(Any, self._redis.connection_pool).get_connection())
            self._taken_at = now
        return self._wire

    async def _let_go(self, *, broken: bool = False) -> None:
        wire, self._wire = self._wire, None
        if wire is None:
            return
        if broken:
            await wire.disconnect(nowait=True)
        await cast(Any, self._redis.connection_pool).release(wire)

    def _settle(self, command: _Command) -> None:
        """Refused together, calls are sent again one by one: the refusal may be due to one of them."""
        if len(command.calls) > 1 and isinstance(command.reply, ResponseError):
            for call in command.calls:
                call.alone = True
            self._waiting.extend(command.calls)
            return
        start = 0
        for call in command.calls:
            end = start + len(call.items)
            if not call.future.done():
                if isinstance(command.reply, Exception):
                    call.future.set_exception(command.reply)
                else:
                    call.future.set_result(command.reply[start:end] if call.items else command.reply)
            start = end


def _merged(calls: list[_Call]) -> list[_Command]:
    """What to send for those that still wait, in their order."""
    commands: list[_Command] = []
    latest: dict[Script, _Command] = {}
    for call in calls:
        if call.future.done():
            continue
        command = latest.get(call.script)
        if command is None or not command.add(call):
            command = _Command([])
            command.add(call)
            commands.append(command)
            latest[call.script] = command
    return commands


async def _read(wire: _Wire) -> Any:
    """The next reply, or the error that stands in its place."""
    try:
        return await wire.read_response()
    except ResponseError as error:
        return error
