"""A primary that Redis Sentinel names: its URL, and a pool whose connections ask Sentinel each time they connect.

    sentinel://[[user]:password@]host[:26379][,host…]/service[/db][?sentinel_password=…]

Used by connection.py only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

SCHEME = "sentinel://"
PORT = 26379
_LOOK_S, _LOOK_AGAIN_S = 1.0, 10.0  # between two looks at who is primary; after one without an answer
_FORM = "sentinel://[:password@]host1:26379,host2:26379/service[/db]"
_OPTIONS = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """`login`: for the primary and its replicas; `sentinel_login`: for the Sentinels themselves."""

    hosts: tuple[tuple[str, int], ...]
    service: str
    db: int = 0
    login: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    sentinel_login: dict[str, str] = field(default_factory=dict[str, str], repr=False)


def parse_sentinel_url(url: str) -> SentinelUrl:
    """Raises ValueError that says what is wrong, and holds no password."""
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.removeprefix("/").partition("/")
    if not service:
        raise ValueError(f"names no service; write {_FORM}")
    if db and not db.isdecimal():
        raise ValueError(f"database {db!r} is no number; write {_FORM}")
    return SentinelUrl(
        hosts=tuple(_host(one) for one in hosts.split(",")),
        service=unquote(service),
        db=int(db) if db else 0,
        login=_login(*login.partition(":")[::2]),
        sentinel_login=_sentinel_login(parts),
    )


def _host(text: str) -> tuple[str, int]:
    try:
        address = urlsplit(f"//{text}")
        port = address.port
    except ValueError as error:
        raise ValueError(f"{text!r} is no host:port ({error}); write {_FORM}") from error
    if not address.hostname:
        raise ValueError(f"a Sentinel has no host name; write {_FORM}")
    return address.hostname, PORT if port is None else port


def _login(user: str, password: str) -> dict[str, str]:
    given = {"username": unquote(user), "password": unquote(password)}
    return {name: value for name, value in given.items() if value}


def _sentinel_login(parts: SplitResult) -> dict[str, str]:
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(given.keys() - set(_OPTIONS))
    if unknown:
        raise ValueError(f"option {unknown[0]!r} is unknown for Sentinel; there are {', '.join(_OPTIONS)}")
    return {name.removeprefix("sentinel_"): value for name, value in given.items()}


class _Connection(SentinelManagedConnection):
    """One try at the address that Sentinel gave: the next try asks anew, as the primary may have moved meanwhile."""

    async def connect_to(self, address: Any) -> None:
        patient, self.retry = self.retry, Retry(NoBackoff(), 0)
        try:
            await super().connect_to(address)  # pyright: ignore[reportUnknownMemberType]
        finally:
            self.retry = patient


class SentinelPool(SentinelConnectionPool):
    """Connections to the primary of `url.service`; `ask` makes the client for one Sentinel, which this pool owns."""

    def __init__(self, url: SentinelUrl, ask: Callable[..., Redis], options: dict[str, Any]) -> None:
        manager = Sentinel([])  # pyright: ignore[reportUnknownMemberType]
        manager.sentinels = [ask(host=host, port=port, **url.sentinel_login) for host, port in url.hosts]
        super().__init__(  # pyright: ignore[reportUnknownMemberType]
            url.service, manager, connection_class=_Connection, db=url.db, **url.login, **options
        )
        self._clients: list[Redis] = list(manager.sentinels)
        self._hosts = ", ".join(f"{host}:{port}" for host, port in url.hosts)
        self._look_at = float("-inf")

    async def get_master_address(self) -> Any:
        try:
            return cast(Any, await super().get_master_address())  # pyright: ignore[reportUnknownMemberType]
        except MasterNotFoundError as error:
            raise RedisConnectionError(
                f"no Sentinel ({self._hosts}) names a primary of {self.service_name!r} now"
            ) from error

    async def ensure_connection(self, connection: Any) -> None:
        """Also leaves a primary that was replaced but still takes writes: Sentinel demotes it only seconds later."""
        await self._look()
        primary = cast(Any, self.master_address)  # pyright: ignore[reportUnknownMemberType]
        if primary not in (None, (connection.host, connection.port)):
            await connection.disconnect()
        await super().ensure_connection(connection)

    async def _look(self) -> None:
        """Asks now and then who is primary, one caller for all; no answer is no news."""
        now = asyncio.get_running_loop().time()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        try:
            await self.get_master_address()
        except (RedisError, TimeoutError):
            self._look_at = now + _LOOK_AGAIN_S

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            await asyncio.gather(*(client.aclose() for client in self._clients))
