"""Live events of jobs for this process: one pub/sub connection, many listeners. The API relays them as SSE.

    connecting ──SUBSCRIBE all──► relaying ──error, no pong──► connecting (every listener catches up from the log)

A listener of a job that is yet to be submitted does not wait for Redis to confirm: what is published before Redis has
read its SUBSCRIBE shows as a gap in what it hears, or as silence, and is read from the log.
A listener that is slow or gone never stalls the shared reader. The bus needs no lock: it lives on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from scheduler.errors import QueueUnavailable
from scheduler.queue.connection import connect
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.keys import Keys
from scheduler.queue.subscription import Subscription
from scheduler.settings import Settings
from scheduler.telemetry import get_logger
from scheduler.tokens import EventId

_IDLE_S = 5.0  # without traffic for this long: PING; without a pong for as long: reconnect
_CONNECT_S = 10.0
_CONFIRM_S = 3.0  # a client waits meanwhile, and had better come again
_SUBSCRIBE_CHUNK = 500
_BACKOFF_S = (0.02, 1.0)

log = get_logger(__name__)


class _Wire(Protocol):
    """What the bus uses of redis-py's connection; no socket timeout is set, it would cost a task per write."""

    @property
    def is_connected(self) -> bool: ...

    async def connect(self) -> None: ...

    async def send_command(self, *args: Any, check_health: bool = True) -> None: ...

    async def read_response(self, *, timeout: float | None = None) -> Any: ...  # noqa: ASYNC109 - redis-py's signature

    async def disconnect(self, nowait: bool = False) -> None: ...


@dataclass(slots=True)
class _Channel:
    """`missed`: a connection that was to carry it got lost, so that messages went by until the next confirmation."""

    listeners: list[Subscription] = field(default_factory=list[Subscription])
    confirmed: asyncio.Event = field(default_factory=asyncio.Event)
    missed: bool = False


class TokenBus:
    """start → subscribe* → close. Owns its two connections (pub/sub and log reads)."""

    def __init__(self, settings: Settings) -> None:
        self._keys = Keys(settings.shard)
        self._redis = connect(settings, "command")
        self._queue = JobQueue(self._redis, settings)
        self._pubsub = connect(settings, "pubsub")
        self._channels: dict[bytes, _Channel] = {}
        self._unconfirmed: Counter[bytes] = Counter()
        self._wire: _Wire | None = None
        self._reader: asyncio.Task[None] | None = None
        self.connects = 0

    async def start(self) -> None:
        """Starts the reader; connecting goes on in the background, also when Redis is not there yet."""
        if self._reader is None:
            self._reader = asyncio.create_task(self._run(), name="token-bus")

    async def close(self) -> None:
        """Ends the reader and closes the connections; idempotent."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
            self._reader = None
        await self._hang_up()
        await self._pubsub.aclose()
        await self._redis.aclose()

    @asynccontextmanager
    async def subscribe(
        self, job_id: str, after: EventId | None = None, *, is_new: bool = False
    ) -> AsyncGenerator[Subscription, None]:
        """Listens to a job from the event after `after` (None: from its first). Entered = confirmed by Redis.

        `is_new`: the caller made this id and submits the job only once it listens, so there is no log to read yet;
        entered = sent to Redis. Raises QueueUnavailable where Redis does not confirm in 3 s, or is not connected.
        """
        name = self._keys.channel(job_id).encode()
        listener = Subscription(job_id, after, self._queue.read_events, is_new=is_new)
        channel = self._channels.setdefault(name, _Channel())
        channel.listeners.append(listener)
        try:
            is_sent = len(channel.listeners) == 1 and await self._say("SUBSCRIBE", name)
            if not (is_new and is_sent):
                await _confirmation(channel)
            yield listener
        finally:
            channel.listeners.remove(listener)
            if not channel.listeners:
                del self._channels[name]
                await self._say("UNSUBSCRIBE", name)

    async def _say(self, command: str, *names: bytes) -> bool:
        """Sends if there is a connection; without one, the next connection subscribes to all that is wanted then."""
        wire = self._wire
        if wire is None or not wire.is_connected:
            return False
        if command == "SUBSCRIBE":
            self._unconfirmed.update(names)
        with contextlib.suppress(RedisError):  # the reader meets the same broken connection, and heals it
            await wire.send_command(command, *names, check_health=False)
        return True

    async def _run(self) -> None:
        pause = _BACKOFF_S[0]
        while True:
            try:
                await self._dial()
                pause = _BACKOFF_S[0]
                await self._relay()
            except (RedisError, OSError) as error:
                log.warning("token bus lost its connection; listeners catch up from the log", error=str(error))
            except Exception:
                log.exception("token bus failed; connecting anew")
            await self._hang_up()
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, _BACKOFF_S[1])

    async def _dial(self) -> None:
        wire = cast(_Wire, self._pubsub.connection_pool.make_connection())
        async with asyncio.timeout(_CONNECT_S):
            await wire.connect()
        self._unconfirmed.clear()
        self._wire = wire
        self.connects += 1
        for channel in self._channels.values():
            channel.missed = True
        names = list(self._channels)
        for start in range(0, len(names), _SUBSCRIBE_CHUNK):
            await self._say("SUBSCRIBE", *names[start : start + _SUBSCRIBE_CHUNK])

    async def _hang_up(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            with contextlib.suppress(RedisError, OSError):
                await wire.disconnect(nowait=True)

    async def _relay(self) -> None:
        wire = self._wire
        assert wire is not None
        pinged = False
        while True:
            reply = await wire.read_response(timeout=_IDLE_S)
            if reply is not None:
                pinged = False
                self._dispatch(reply)
            elif pinged:
                raise RedisConnectionError(f"no sign of life for {2 * _IDLE_S:.0f} s")
            else:
                pinged = True
                await wire.send_command("PING", check_health=False)

    def _dispatch(self, reply: list[Any]) -> None:
        kind, name = reply[0], reply[1]
        if kind == b"message":
            channel = self._channels.get(name)
            if channel is not None:
                for listener in channel.listeners:
                    listener.offer(reply[2])
        elif kind == b"subscribe":
            self._confirm(name)

    def _confirm(self, name: bytes) -> None:
        """The last SUBSCRIBE sent for a name counts: an UNSUBSCRIBE may stand between an earlier one and it."""
        self._unconfirmed[name] -= 1
        if self._unconfirmed[name] > 0:
            return
        del self._unconfirmed[name]
        channel = self._channels.get(name)
        if channel is None:
            return
        if channel.missed:
            channel.missed = False
            for listener in channel.listeners:
                listener.catch_up()
        channel.confirmed.set()


async def _confirmation(channel: _Channel) -> None:
    try:
        async with asyncio.timeout(_CONFIRM_S):
            await channel.confirmed.wait()
    except TimeoutError as error:
        raise QueueUnavailable("Redis did not confirm a subscription in time; try again") from error
