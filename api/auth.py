"""Who is calling: API key → Principal, and whether a key is needed at all.

Bound to loopback with no key ever created, the API is open. As soon as a key exists, or on any other address, every
request needs one; on another address the server does not start without one.
"""

from __future__ import annotations

import hashlib
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from sqlalchemy.exc import SQLAlchemyError

from scheduler.db.keys import KeyRecord, KeyStore
from scheduler.errors import AuthenticationRequired, CapacityError, StartupError
from scheduler.settings import Settings

CACHE_S = 2.0  # how long a revoked key may still work, and a first key go unnoticed
CACHE_KEYS = 1024
OPEN_TENANT = "default"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller. `key_id` None: an open API, which sees the jobs of every tenant."""

    tenant: str
    key_id: str | None = None

    def may_see(self, tenant: str) -> bool:
        return self.key_id is None or tenant == self.tenant


OPEN_PRINCIPAL = Principal(tenant=OPEN_TENANT)


class Authenticator:
    """Looks keys up, and remembers each answer for CACHE_S."""

    def __init__(self, settings: Settings, keys: KeyStore) -> None:
        self._keys = keys
        self._loopback = is_loopback(settings.host)
        self._host = settings.host
        self._open: tuple[float, bool] | None = None
        self._known: OrderedDict[bytes, tuple[float, KeyRecord | None]] = OrderedDict()

    async def check_start(self) -> None:
        """Raise StartupError where the address needs a key and there is none."""
        if not self._loopback and not await self._keys.any_keys():
            raise StartupError(
                f"Refusing to listen on {self._host} without an API key: anybody who reaches it could use it. "
                "Run `spillway keys create NAME` first, or set SPILLWAY_HOST=127.0.0.1."
            )

    async def is_open(self) -> bool:
        """Whether requests need no key."""
        if not self._loopback:
            return False
        now = time.monotonic()
        if self._open is None or now >= self._open[0]:
            self._open = (now + CACHE_S, not await _readable(self._keys.any_keys()))
        return self._open[1]

    async def authenticate(self, headers: Mapping[str, str]) -> Principal:
        """The caller of a request with these headers. Raises AuthenticationRequired."""
        if await self.is_open():
            return OPEN_PRINCIPAL
        secret = presented_key(headers)
        if secret is None:
            raise AuthenticationRequired(
                "You didn't provide an API key. Send it as `Authorization: Bearer KEY` (or `x-api-key: KEY`); "
                "make one with `spillway keys create NAME`."
            )
        record = await self._look_up(secret)
        if record is None:
            raise AuthenticationRequired("Incorrect API key provided: it is unknown or was revoked.")
        return Principal(tenant=record.tenant, key_id=record.id)

    async def _look_up(self, secret: str) -> KeyRecord | None:
        digest = hashlib.sha256(secret.encode()).digest()
        now = time.monotonic()
        cached = self._known.get(digest)
        if cached is not None and now < cached[0]:
            return cached[1]
        record = await _readable(self._keys.verify(secret))
        self._known[digest] = (now + CACHE_S, record)
        self._known.move_to_end(digest)
        while len(self._known) > CACHE_KEYS:
            self._known.popitem(last=False)
        return record


async def _readable(look: Awaitable[T]) -> T:
    try:
        return await look
    except (SQLAlchemyError, OSError) as error:
        raise CapacityError("The database that holds the API keys cannot be read now.") from error


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The key that a request shows; where both headers are there, x-api-key counts (as Anthropic's API has it)."""
    key = headers.get("x-api-key", "").strip()
    if key:
        return key
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def is_loopback(host: str) -> bool:
    """Whether this name or address only reaches this machine."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def require_principal(request: Request) -> Principal:
    """Dependency of every route that needs a caller."""
    authenticator: Authenticator = request.app.state.services.authenticator
    return await authenticator.authenticate(request.headers)
