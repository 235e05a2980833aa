"""Connections to Redis: one kind per use (commands, blocking reads, pub/sub), with retries and timeouts set out loud.

redis-py's async client retries nothing unless told which errors; every script of ours is safe to repeat, so it is.
A server that became a replica counts as a lost connection: the next one reaches its successor.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass
from typing import Any, Literal, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from scheduler.errors import StartupError
from scheduler.queue.sentinel import SCHEME as SENTINEL
from scheduler.queue.sentinel import SentinelPool, parse_sentinel_url
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

Role = Literal["command", "blocking", "pubsub"]

EMBEDDED_STATE = "redis/embedded.json"  # below SPILLWAY_HOME: how other processes find an embedded server
MIN_VERSION = (6, 2)
_RETRY_S = 0.3
_TIMEOUT_S: dict[Role, float | None] = {"command": 4.0, "blocking": 15.0, "pubsub": None}
_SENTINEL_S = 1.0  # a Sentinel that does not answer holds up a reconnect; there are others
_CONCURRENT = 64  # commands of one client in flight, hence its connections; further ones wait

# What a replica says to a write, alone or inside a script's error, and to a read that blocked while it was demoted;
# what a replaced primary says that may not write alone.
_DEMOTED = re.compile(r"\b(READONLY|MASTERDOWN|UNBLOCKED|NOREPLICAS)\b")

log = get_logger(__name__)


class _CancellableWrites:
    """For a redis-py connection: its write goes through asyncio.wait_for, which before Python 3.12 loses a cancellation
    that arrives as the write ends, so that a cancelled task lives on."""

    async def send_packed_command(self: Any, command: Any, check_health: bool = True) -> None:
        if not self.is_connected:
            await self.connect()
        elif check_health:
            await self.check_health()
        limit_s, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(limit_s):
                await super().send_packed_command(command, check_health=False)  # pyright: ignore
        except TimeoutError as error:
            raise RedisTimeoutError("Timeout writing to socket") from error
        except RuntimeError as error:  # how uvloop says that the transport is closed
            raise RedisConnectionError(f"the connection is closed: {error}") from error
        finally:
            self.socket_timeout = limit_s


class _LeavesReplicas:
    """For a redis-py connection: ends it once the server is no primary, so that the retry looks for another one."""

    async def read_response(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)  # pyright: ignore
        except ResponseError as error:
            if not (isinstance(error, (ReadOnlyError, MasterDownError)) or _DEMOTED.search(str(error))):
                raise
            await self.disconnect(nowait=True)
            raise RedisConnectionError(f"the server is no primary any more: {error}") from error


class _BoundedRedis(Redis):
    """In a burst, commands wait for a connection; redis-py's own pool fails, and its blocking one leaks on a cancel."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # pyright: ignore[reportUnknownMemberType]
        self._slots = asyncio.Semaphore(_CONCURRENT)
        self.patience_s: float | None = None
        pool: Any = self.connection_pool
        pool.connection_class = type("Connection", (_CancellableWrites, _LeavesReplicas, pool.connection_class), {})

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        async with asyncio.timeout(self.patience_s), self._slots:
            return await super().execute_command(*args, **options)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a start-up or `doctor` wants to know of a server; `maxmemory_bytes` 0: no limit."""

    version: tuple[int, ...]
    maxmemory_policy: str
    maxmemory_bytes: int
    run_id: str


def redis_url(settings: Settings) -> str:
    """The configured server, else the embedded one that runs for this home; raises StartupError without either."""
    if settings.redis_url is not None:
        return settings.redis_url
    state = settings.home / EMBEDDED_STATE
    try:
        return str(json.loads(state.read_text(encoding="utf-8"))["url"])
    except (OSError, ValueError, KeyError) as error:
        raise StartupError(
            f"No Redis: SPILLWAY_REDIS_URL is not set and no embedded server runs for {settings.home}; "
            "start `spillway up` or set SPILLWAY_REDIS_URL"
        ) from error


def connect(settings: Settings, role: Role, patience_s: float | None = None) -> Redis:
    """A client for one role; connects lazily, replies are bytes. URLs: unix, redis, rediss, sentinel.

    `patience_s`: how long a command may take with all its retries, where somebody waits for its answer.
    """
    options: dict[str, Any] = {
        "decode_responses": False,
        "socket_timeout": _TIMEOUT_S[role],
        "socket_connect_timeout": 4.0,
        "max_connections": _CONCURRENT + 16,  # pipelines and pub/sub take theirs beside the commands
        "lib_name": None,
        "lib_version": None,
    }
    if role != "pubsub":  # the token bus reconnects by itself: it must know of each gap
        options["retry"] = Retry(ExponentialBackoff(cap=0.5, base=0.02), 4)
        options["retry_on_error"] = [RedisConnectionError, RedisTimeoutError]
    client = _client(redis_url(settings), options)
    client.patience_s = patience_s
    return client


def _client(url: str, options: dict[str, Any]) -> _BoundedRedis:
    if not url.startswith("unix://"):
        options["socket_keepalive"] = True
    try:
        if url.startswith(SENTINEL):
            return _BoundedRedis.from_pool(SentinelPool(parse_sentinel_url(url), _sentinel, options))  # pyright: ignore
        return _BoundedRedis.from_url(url, **options)  # pyright: ignore[reportUnknownMemberType]
    except ValueError as error:
        raise StartupError(f"SPILLWAY_REDIS_URL: {error}") from error


def _sentinel(**address: Any) -> Redis:
    patience = {"socket_timeout": _SENTINEL_S, "socket_connect_timeout": _SENTINEL_S}
    return _BoundedRedis(**address, **patience, lib_name=None, lib_version=None)


async def check_server(redis: Redis, *, owned: bool = False, wait_s: float = 0.0) -> ServerFacts:
    """Version and eviction policy. Raises StartupError below 6.2, and, on a server of our own, on any eviction.

    `wait_s`: how long a server may take to come up, where nobody starts it before its clients.
    """
    info = await _server_info(redis, time.monotonic() + wait_s)
    facts = ServerFacts(
        version=tuple(int(part) for part in re.findall(r"\d+", str(info["redis_version"]))[:3]),
        maxmemory_policy=str(info.get("maxmemory_policy", "noeviction")),
        maxmemory_bytes=int(info.get("maxmemory", 0)),
        run_id=str(info.get("run_id", "")),
    )
    if facts.version < MIN_VERSION:
        raise StartupError(f"Redis {info['redis_version']} is too old: Spillway needs 6.2 or newer (or any Valkey)")
    if facts.maxmemory_policy != "noeviction":
        line = (
            f"Redis evicts keys (maxmemory-policy {facts.maxmemory_policy}); accepted jobs may vanish, set noeviction"
        )
        if owned:
            raise StartupError(line)
        log.warning(line)
    return facts


async def _server_info(redis: Redis, give_up_s: float) -> dict[str, Any]:
    while True:
        try:
            return cast(dict[str, Any], await redis.info())  # pyright: ignore[reportUnknownMemberType]
        except RedisError as error:
            if time.monotonic() >= give_up_s:
                raise StartupError(f"Redis cannot be used: {error}") from error
        await asyncio.sleep(_RETRY_S)
